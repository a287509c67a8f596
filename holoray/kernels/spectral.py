"""`spectral` on the CPU: scipy's DCT, balanced dealing, a Numba scatter."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import scipy.fft
from numba import njit

from holoray.codecs.base import Codec
from holoray.codecs.spectral import Deal, SpectralCodec, matrix_shape, tiles
from holoray.compression import MIN_FRAGMENT_SAVING, compress, decompress
from holoray.fragment import NO_PREREQUISITE, FragmentEntry
from holoray.kernels.accumulator import Accumulator
from holoray.kernels.encoder import EncodedFragment, EncodeOptions, Encoder
from holoray.kernels.scratch import Scratch
from holoray.tensor import Array, TensorSpec

_MAX_SHIFTS_TRIED = 64
_UNFELT = 1e-6  # relative errors below this are not told apart


class SpectralEncoder(Encoder):
    """Transforms in the constructor; one part (cutting the raster into fragments is cheap).

    `coefficients`: float32, raster order, padded with zeros to whole strips.
    """

    parts = 1

    def __init__(self, spec: TensorSpec, array: Array, options: EncodeOptions) -> None:
        super().__init__(spec, array, options)
        exponent = self._exponent = _scaling_exponent(array)
        weights = array.astype(np.float32).reshape(matrix_shape(spec.shape))
        if exponent:
            weights = np.ldexp(weights, -exponent)
        deal = Deal(spec.size, options.fragments, options.seed)
        self.coefficients = np.zeros(deal.strips * deal.strip, np.float32)
        raster = self.coefficients[: spec.size].reshape(weights.shape)
        for tile in tiles(weights.shape, options.tile):
            raster[tile] = scipy.fft.dctn(weights[tile], type=2, norm="ortho")
        shifts, shares = _balanced_shifts(self.coefficients, deal)
        self.faithful = _is_faithful(array, float(np.min(shares)), math.ldexp(1.0, -exponent))
        self.codec = SpectralCodec(
            fragments=options.fragments,
            seed=options.seed,
            tile=options.tile,
            exponent=exponent,
            shifts=base64.b64encode(shifts.astype("<u2").tobytes()).decode(),
        )
        self._deal, self._offsets = deal, deal.offsets(shifts)
        self.residual = self._measure_residual()

    def encode(self, part: int) -> list[EncodedFragment]:
        return [self._fragment(index) for index in range(self.options.fragments)]

    def _fragment(self, index: int) -> EncodedFragment:
        values = _gather_fragment(self.coefficients, self._deal, self._offsets, index)
        wide = values.astype(np.float64)
        gain = float(np.ldexp(np.dot(wide, wide), 2 * self._exponent))
        name, payload = compress(self.options.compression, values.view(np.uint8), MIN_FRAGMENT_SAVING)
        return EncodedFragment(index, 0, index, NO_PREREQUISITE, name, values.nbytes, gain, bytes(payload))

    def _measure_residual(self) -> float:
        out = np.zeros(self.spec.shape, self.spec.numpy_dtype)
        SpectralAccumulator(self.spec, self.codec, out, self.coefficients.view(np.uint8)).finalize()
        difference = out.astype(np.float64) - self.array.astype(np.float64)
        return float(np.vdot(difference, difference))


class SpectralAccumulator(Accumulator):
    """Its state are the coefficients (float32, whole strips); a fragment fills its own places, so order is free."""

    codec: SpectralCodec
    needs_finalize = True

    def __init__(self, spec: TensorSpec, codec: Codec, out: Array, memory: npt.NDArray[np.uint8] | None = None) -> None:
        super().__init__(spec, codec, out)
        self._deal = self.codec.deal(spec.size)
        self._offsets = self._deal.offsets(self.codec.group_shifts)
        memory = np.zeros(self.state_nbytes(spec, codec), np.uint8) if memory is None else memory
        self._coefficients = memory.view(np.float32)
        self._held = np.zeros(self.codec.fragments, np.uint8)

    @classmethod
    def state_nbytes(cls, spec: TensorSpec, codec: Codec) -> int:
        assert isinstance(codec, SpectralCodec)
        deal = codec.deal(spec.size)
        return 4 * deal.strips * deal.strip

    def slot_range(self, slot: int) -> None:
        return None

    def resume(self, slot: int, layers: int) -> None:
        self._held[slot] = min(layers, 1)

    def slot_nbytes(self, slot: int) -> int:
        return 4 * self._deal.count((int(self._offsets[-1]) + slot) % self._deal.fragments)

    def read_slot(self, slot: int) -> npt.NDArray[np.uint32]:
        return _gather_fragment(self._coefficients, self._deal, self._offsets, slot).view(np.uint32)

    def write_slot(self, slot: int, content: npt.NDArray[Any]) -> None:
        self._scatter(slot, content.view(np.float32))

    def decompress(self, entries: Sequence[FragmentEntry], payloads: Sequence[Any], scratch: Scratch) -> Any:
        return decompress(entries[0].compression, payloads[0], entries[0].raw_bytes)

    def accumulate(self, slot: int, decompressed: Any, scratch: Scratch) -> None:
        self._scatter(slot, np.frombuffer(decompressed, "<f4"))

    def _scatter(self, slot: int, values: npt.NDArray[np.float32]) -> None:
        values = np.require(values, requirements="A").view()
        values.flags.writeable = False  # one type for Numba, wherever the bytes come from
        deal = self._deal
        _scatter(
            self._coefficients, values, (self._offsets + slot) % deal.fragments, deal.strip, deal.fragments, deal.size
        )
        self._held[slot] = 1

    def finalize(self) -> None:
        shape = matrix_shape(self.spec.shape)
        raster = self._coefficients[: self.spec.size].reshape(shape)
        out = self.out.reshape(shape)
        for tile in tiles(shape, self.codec.tile):
            weights = scipy.fft.idctn(raster[tile], type=2, norm="ortho", workers=1)
            _store(weights, out[tile], self.codec.exponent)

    def state(self) -> dict[str, Array]:
        return {"held": self._held, "coefficients": self._coefficients.view(np.uint32)}


def _store(weights: npt.NDArray[np.float32], out: Array, exponent: int) -> None:
    """Scale, clip to finite values of `out`'s dtype, round to nearest even."""
    largest = float(np.finfo(np.float32).max) if out.dtype == np.float32 else _LARGEST_HALF[out.dtype.name]
    if exponent:
        weights = np.ldexp(weights.astype(np.float64), exponent)
    # A subset of coefficients may overshoot the largest weight; infinity would never come back from that.
    if exponent or out.dtype == np.float16:
        weights = np.clip(weights, -largest, largest)
    out[...] = weights


_LARGEST_HALF = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38}


def _scaling_exponent(array: Array) -> int:
    """0 for ordinary weights; else the exponent that brings the largest into [.5, 1): squares must not overflow."""
    largest = float(np.max(np.abs(array.astype(np.float32)), initial=0.0))
    exponent = int(np.frexp(largest)[1])
    return exponent if largest and not -40 <= exponent <= 40 else 0


def _is_faithful(array: Array, least_share: float, scale: float) -> bool:
    """Whether rounding partial results to the array's dtype leaves reported quality and relative error true.

    Gains are energies of coefficients; what is handed out is rounded. Rounding adds some eps^2 / 7 of the energy, which
    must not be felt beside the smallest error that a subset can have (one fragment missing: `least_share`); and its
    correlation with the error, which a few dominating weights could have, must stay below 1e-4 of the energy.
    """
    eps = float(ml_dtypes.finfo(array.dtype).eps) / 2  # type: ignore[no-untyped-call]
    if eps < _UNFELT:
        return True
    squares = np.square(array.reshape(-1).astype(np.float64) * scale)
    energy = float(squares.sum())
    concentration = math.sqrt(float(np.dot(squares, squares)))
    return eps**2 / 7 * energy <= 0.01 * least_share and concentration * eps <= 1.2e-4 * energy


def _balanced_shifts(
    coefficients: npt.NDArray[np.float32], deal: Deal
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """int64[groups]: greedily, the most energetic group first, the shift that best levels the fragments' energies.

    Also those energies, float64[fragments].
    """
    n = deal.fragments
    rotations = deal.rotations()
    energies = np.zeros((deal.groups, n))
    per_group = deal.strips_per_group
    for group in range(deal.groups):
        strips = slice(group * per_group, min((group + 1) * per_group, deal.strips))
        wide = coefficients[strips.start * deal.strip : strips.stop * deal.strip].astype(np.float64)
        by_residue = np.square(wide).reshape(-1, deal.strip // n, n).sum(axis=1)
        residues = (np.arange(n)[None, :] - rotations[strips, None]) % n
        energies[group] = np.take_along_axis(by_residue, residues, axis=1).sum(axis=0)
    tried = np.arange(min(n, _MAX_SHIFTS_TRIED))
    rolled = (np.arange(n)[None, :] - tried[:, None]) % n
    loads = np.zeros(n)
    shifts = np.zeros(deal.groups, np.int64)
    for group in np.argsort(-energies.sum(axis=1), kind="stable"):
        candidates = energies[group][rolled]
        # sum((loads + c)^2) differs between candidates only in the product: the cheapest shift is the one that
        # puts much where little is.
        best = int(np.argmin(candidates @ loads))
        shifts[group] = tried[best]
        loads += candidates[best]
    return shifts, loads


def _gather_fragment(
    coefficients: npt.NDArray[np.float32], deal: Deal, offsets: npt.NDArray[np.int64], fragment: int
) -> npt.NDArray[np.float32]:
    """A copy of the fragment's coefficients, in raster order."""
    starts = (offsets + fragment) % deal.fragments
    values = np.empty(deal.count(int(starts[-1])), np.float32)
    _gather(coefficients, values, starts, deal.strip, deal.fragments, deal.size)
    return values


@njit(nogil=True, cache=True)
def _gather(coefficients, values, offsets, strip, step, size):  # type: ignore[no-untyped-def]
    k = 0
    for s in range(offsets.size):
        for place in range(s * strip + offsets[s], min((s + 1) * strip, size), step):
            values[k] = coefficients[place]
            k += 1


@njit(nogil=True, cache=True)
def _scatter(coefficients, values, offsets, strip, step, size):  # type: ignore[no-untyped-def]
    k = 0
    for s in range(offsets.size):
        for place in range(s * strip + offsets[s], min((s + 1) * strip, size), step):
            coefficients[place] = values[k]
            k += 1


def warm() -> None:
    """Compile the kernels."""
    values = np.zeros(1, np.float32)
    _gather(np.zeros(1, np.float32), values, np.zeros(1, np.int64), 1, 1, 1)
    values.flags.writeable = False
    _scatter(np.zeros(1, np.float32), values, np.zeros(1, np.int64), 1, 1, 1)
