"""`auto`: the codec whose measured quality, over the bytes of a load, is the best for a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import numpy as np

from holoray.fragment import TensorEntry
from holoray.integrity import Digests
from holoray.kernels.encoder import EncodedFragment, EncodeOptions, Encoder
from holoray.kernels.factors import probed_energy
from holoray.kernels.registry import make_encoder
from holoray.kernels.sums import moments
from holoray.pipelines.curve import curve_of
from holoray.pipelines.entries import fragment_entry, tensor_entry
from holoray.pipelines.plan import with_streaming_order
from holoray.pipelines.policy import suits_transforms
from holoray.quality import widened
from holoray.tensor import Array, TensorSpec, matrix_shape

MAX_ERROR: Final = 1e-5
"""Relative error that a choice of ours may leave when everything is there."""
_PROBED: Final = 4  # the share of the affordable rank that is probed: a quarter
_PROBE_MISSES: Final = 1.25  # probes find at least four fifths of what the best terms hold
_NO_DIGESTS: Final = Digests(0, bytes(32))


class Encoded(Encoder):
    """A tensor that is encoded already."""

    parts = 1

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder.spec, encoder.array, encoder.options)
        self.codec, self.residual, self.essential_gain = encoder.codec, encoder.residual, encoder.essential_gain
        self.fragments = sorted((f for p in range(encoder.parts) for f in encoder.encode(p)), key=lambda f: f.index)

    def encode(self, part: int) -> list[EncodedFragment]:
        return self.fragments

    @property
    def entry(self) -> TensorEntry:
        """What a manifest would say, but for digests."""
        return tensor_entry(self, [fragment_entry(f, _NO_DIGESTS) for f in self.fragments], sha256=bytes(32))


def best_encoding(spec: TensorSpec, array: Array, options: EncodeOptions) -> Encoded:
    """The encoding with the greatest mean quality over the bytes of a load, from 0 to the tensor's own size.

    `planes` unless another one is better: `spectral`, or `lowrank` where random probes say that it could be. These must
    end within `MAX_ERROR`, unless `rank` or `energy` say that terms may be left out.
    """
    best = Encoded(make_encoder("planes", spec, array, options))
    most = mean_quality(best.entry)
    for encoder in _rivals(spec, array, options, most):
        rival = Encoded(encoder)
        quality = mean_quality(rival.entry)
        if quality > most:
            best, most = rival, quality
    return best


def mean_quality(entry: TensorEntry) -> float:
    """Mean of the quality over the bytes read, in streaming order, up to the tensor's own size; 0 before the first."""
    points = curve_of(*with_streaming_order([entry])).points
    size = entry.spec.nbytes
    ends = [min(point.bytes, size) for point in points[1:]] + [size]
    return sum(p.quality * (end - min(p.bytes, size)) for p, end in zip(points, ends, strict=True)) / size


def _rivals(spec: TensorSpec, array: Array, options: EncodeOptions, most: float) -> Iterator[Encoder]:
    """Encoders that might be better, of those that are true about partial loads and end well enough."""
    allowed = MAX_ERROR**2 * moments(array)[0] if suits_transforms(array) else 0.0
    if not allowed:  # a tensor of zeros has no quality to tell codecs apart by
        return
    spectral = make_encoder("spectral", spec, array, options)
    if spectral.faithful and spectral.residual <= allowed:
        yield spectral
    if not _lowrank_could_win(spec, array, options, most):
        return
    truncated = bool(options.rank or options.energy)
    enough = options if truncated else replace(options, energy=1.0 - 0.5 * MAX_ERROR**2)
    lowrank = make_encoder("lowrank", spec, array, enough)
    if lowrank.faithful and (truncated or lowrank.residual <= allowed):
        yield lowrank


def _lowrank_could_win(spec: TensorSpec, array: Array, options: EncodeOptions, most: float) -> bool:
    """Whether a bound on the mean quality of `lowrank`, from some random probes, is above `most`."""
    rows, columns = matrix_shape(spec.shape)
    affordable = spec.nbytes // ((rows + columns) * np.dtype(options.coefficients).itemsize)
    rank = min(affordable // _PROBED, rows, columns)
    if rank == 0:
        return False
    matrix = widened(array.reshape(rows, columns)).astype(np.float64)
    matrix /= np.max(np.abs(matrix))
    held = probed_energy(matrix if rows >= columns else matrix.T, rank, options.seed) / float(np.square(matrix).sum())
    return mean_bound(min(1.0, _PROBE_MISSES * held), rank / affordable) > most


def mean_bound(share: float, at: float) -> float:
    """The greatest mean over [0, 1] of a quality that is concave, at most 1, and `share` at the place `at`.

    Before `at` it is at most `share`; behind, at most on the line from the origin.
    """
    top = min(1.0, at / share)
    return share * at + share / at * (top**2 - at**2) / 2 + (1.0 - top)
