"""`spectral`: orthonormal DCT-II coefficients, dealt so that *which* fragments arrive does not matter.

A tensor is a matrix (0-d: 1 x 1, 1-D: 1 x n, n-D: first dimension x the rest), transformed whole (`tile` 0) or in
tiles of `tile` x `tile`; coefficients stand where their tile's weights stood and are read in raster order. Because the
transform is orthonormal, the squared error of any subset is the energy of the coefficients that are missing.

Dealing: the raster is cut into strips of a multiple of N coefficients. In a strip, position i goes to fragment
(i + rotation + shift) mod N: the rotation is pseudo-random (seeded) so that no comb of frequencies belongs to one
fragment (a plain stride leaves combs whenever N divides the width); the shift, one for a group of strips, was chosen by
the encoder so that all fragments carry nearly the same energy.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from holoray.codecs.base import Codec, FragmentShape
from holoray.codecs.registry import register_codec
from holoray.errors import FormatError
from holoray.fragment import NO_PREREQUISITE
from holoray.tensor import DTYPES, TRANSFORMABLE, Array, TensorSpec

MAX_FRAGMENTS: Final = 1 << 12
MAX_GROUPS: Final = 1 << 10
_STRIP: Final = 256
_LARGEST: Final = {"F32": float(np.finfo(np.float32).max), "F16": 65504.0, "BF16": 3.3895313892515355e38}


@register_codec
@dataclass(frozen=True)
class SpectralCodec(Codec):
    """`exponent`: coefficients are stored divided by 2**exponent; `shifts`: base64 of one little-endian u16 a group."""

    name: ClassVar[str] = "spectral"

    fragments: int
    seed: int
    tile: int
    exponent: int
    shifts: str

    def check(self, spec: TensorSpec) -> None:
        if spec.dtype not in TRANSFORMABLE or spec.size == 0:
            raise FormatError(f"{spec.dtype} tensor {spec.name!r} of {spec.size} elements cannot be spectral")
        if not 1 <= self.fragments <= MAX_FRAGMENTS or self.tile < 0 or not 0 <= self.seed < 1 << 64:
            raise FormatError(f"tensor {spec.name!r} has an impossible spectral configuration", tensor=spec.name)
        if not -1100 <= self.exponent <= 1100 or self.group_shifts.size != self.deal(spec.size).groups:
            raise FormatError(f"tensor {spec.name!r} has an impossible spectral configuration", tensor=spec.name)

    @cached_property
    def group_shifts(self) -> npt.NDArray[np.int64]:
        try:
            raw = base64.b64decode(self.shifts, validate=True)
        except binascii.Error:
            raise FormatError("spectral shifts are not base64") from None
        if len(raw) % 2:
            raise FormatError("spectral shifts are not u16 values")
        return np.frombuffer(raw, "<u2").astype(np.int64)

    def deal(self, size: int) -> Deal:
        return Deal(size, self.fragments, self.seed)

    def shapes(self, spec: TensorSpec) -> Iterator[FragmentShape]:
        deal = self.deal(spec.size)
        last = deal.last_offset(self.group_shifts)
        for index in range(self.fragments):
            nbytes = 4 * deal.count((last + index) % self.fragments)
            yield FragmentShape(index, 0, index, NO_PREREQUISITE, nbytes, nbytes)

    def can_reconstruct(self, spec: TensorSpec, present: frozenset[int]) -> bool:
        return bool(present)

    def decode(self, spec: TensorSpec, payloads: Mapping[int, Any]) -> Array:
        deal = self.deal(spec.size)
        offsets = deal.offsets(self.group_shifts)
        coefficients = np.zeros(deal.strips * deal.strip)
        for index, payload in payloads.items():
            places = deal.places(offsets, index)
            values = np.frombuffer(payload, "<f4")
            if values.size != places.size:
                raise FormatError(f"spectral fragment {index} of {spec.name!r} has {values.size} coefficients")
            coefficients[places] = values
        matrix = coefficients[: spec.size].reshape(matrix_shape(spec.shape))
        weights = np.empty_like(matrix)
        for rows, columns in tiles(matrix.shape, self.tile):
            weights[rows, columns] = _inverse_dct(_inverse_dct(matrix[rows, columns]).T).T
        largest = _LARGEST[spec.dtype]
        clipped = np.clip(np.ldexp(weights, self.exponent), -largest, largest)
        return clipped.astype(DTYPES[spec.dtype]).reshape(spec.shape)


@dataclass(frozen=True, slots=True)
class Deal:
    """Who gets which of `size` coefficients in raster order."""

    size: int
    fragments: int
    seed: int

    @property
    def strip(self) -> int:
        """Coefficients of a strip: the multiple of N next above 256."""
        return self.fragments * -(-_STRIP // self.fragments)

    @property
    def strips(self) -> int:
        return -(-self.size // self.strip)

    @property
    def strips_per_group(self) -> int:
        return max(1, -(-self.strips // MAX_GROUPS))

    @property
    def groups(self) -> int:
        return -(-self.strips // self.strips_per_group)

    def rotations(self) -> npt.NDArray[np.int64]:
        """int64[strips]: pseudo-random rotation of each strip (splitmix64 of seed and strip)."""
        return self._rotations(0, self.strips)

    def offsets(self, shifts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """int64[strips]: where in each strip fragment 0 begins; its coefficients follow N apart.

        Fragment i begins at (offset + i) mod N.
        """
        of_strip = np.repeat(shifts, self.strips_per_group)[: self.strips]
        return (-self.rotations() - of_strip) % self.fragments

    def last_offset(self, shifts: npt.NDArray[np.int64]) -> int:
        """Offset of fragment 0 in the last strip, without computing the others: `size` may be an absurd claim."""
        last = self.strips - 1
        rotation = int(self._rotations(last, 1)[0])
        return (-rotation - int(shifts[last // self.strips_per_group])) % self.fragments

    def _rotations(self, first: int, count: int) -> npt.NDArray[np.int64]:
        return (_splitmix64(self.seed, first, count) % np.uint64(self.fragments)).astype(np.int64)

    def count(self, last_offset: int) -> int:
        """Coefficients of a fragment whose offset in the last strip is `last_offset`."""
        in_last = self.size - (self.strips - 1) * self.strip
        before = (self.strips - 1) * (self.strip // self.fragments)
        return before + max(0, -(-(in_last - last_offset) // self.fragments))

    def places(self, offsets: npt.NDArray[np.int64], fragment: int) -> npt.NDArray[np.int64]:
        """Raster positions of the fragment's coefficients, ascending."""
        starts = np.arange(self.strips) * self.strip + (offsets + fragment) % self.fragments
        places = (starts[:, None] + np.arange(0, self.strip, self.fragments)).reshape(-1)
        return places[places < self.size]


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """0-d -> (1, 1); 1-D -> (1, n); n-D -> (d0, product of the rest)."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def tiles(shape: tuple[int, int], tile: int) -> Iterator[tuple[slice, slice]]:
    """Row and column slices of the tiles, edge tiles smaller; `tile` 0 is the whole matrix."""
    rows, columns = shape
    height, width = (tile, tile) if tile else (max(rows, 1), max(columns, 1))
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield slice(top, min(top + height, rows)), slice(left, min(left + width, columns))


def _splitmix64(seed: int, first: int, count: int) -> npt.NDArray[np.uint64]:
    """Numbers first..first+count-1 of the sequence.

    Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014).
    """
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(first + 1, first + count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _inverse_dct(coefficients: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Inverse orthonormal DCT-II along the last axis.

    x_k = sum_j a_j c_j cos(pi j (2k + 1) / 2n), a_0 = sqrt(1/n), a_j = sqrt(2/n): the real part of a 2n-point FFT of
    a_j c_j exp(-i pi j / 2n).
    """
    n = coefficients.shape[-1]
    scale = np.full(n, math.sqrt(2 / n))
    scale[0] = math.sqrt(1 / n)
    turned = coefficients * scale * np.exp(-0.5j * np.pi * np.arange(n) / n)
    return np.fft.fft(turned, 2 * n, axis=-1).real[..., :n]
