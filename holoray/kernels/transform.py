"""What `spectral` and `projection` share on the CPU: coefficients in a raster, an essential part, dealt shares."""

from __future__ import annotations

import base64
from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from holoray.codecs.base import Codec
from holoray.codecs.dealing import Deal
from holoray.codecs.transform import TransformCodec
from holoray.compression import MIN_FRAGMENT_SAVING, compress
from holoray.fragment import NO_PREREQUISITE
from holoray.kernels.dealing import deal_all, gather, level_shifts, scatter
from holoray.kernels.dealt import DealtAccumulator, Floats
from holoray.kernels.encoder import EncodedFragment, EncodeOptions, Encoder
from holoray.kernels.rounding import is_faithful, largest_exponent, scaled, scaling_exponent, store, through_half
from holoray.kernels.sums import squared_distance
from holoray.quality import widened
from holoray.tensor import Array, TensorSpec, matrix_shape

_HALF_RANGE = 15  # the largest coefficient in float16 is brought below 2^15: products and sums stay in range


class TransformEncoder(Encoder):
    """Transforms in the constructor; one part (cutting the raster into fragments is cheap)."""

    parts = 1
    codec: TransformCodec
    accumulator: ClassVar[type[RasterAccumulator]]

    def __init__(self, spec: TensorSpec, array: Array, options: EncodeOptions) -> None:
        super().__init__(spec, array, options)
        self._deal = Deal(spec.size, options.fragments, options.seed)
        exact, exponent = self._coefficients()
        stored = exact
        if options.coefficients == "float16":
            # Only now is it known how large coefficients are.
            more = largest_exponent(exact) - _HALF_RANGE
            np.ldexp(exact, -more, out=exact)
            stored, exponent = through_half(exact), exponent + more
        places = leading(exact[: spec.size], options.essential)
        self._shared = _without(stored, places)
        shifts, gains = level_shifts(exact, self._shared, self._deal)
        self.codec = self._make_codec(exponent, base64.b64encode(shifts.astype("<u2").tobytes()).decode(), places.size)
        self._head = self.codec.essential_part(spec.size).pack(places, stored[places])
        self.essential_gain = float(np.ldexp(_gain(exact[places], stored[places]), 2 * exponent))
        self._gains = np.ldexp(gains, 2 * exponent)
        self.residual = self._measure_residual(stored)
        self.faithful = is_faithful(array, self._gains, self.residual)

    def _coefficients(self) -> tuple[Floats, int]:
        """float32[padded] coefficients in raster order, and the exponent that they were divided by."""
        weights = widened(self.array.reshape(-1))
        exponent = scaling_exponent(weights)
        out = np.zeros(self._deal.padded, np.float32)
        out[: weights.size] = scaled(weights, exponent)
        self._forward(self._raster(out))
        return out, exponent

    def _raster(self, coefficients: Floats) -> Floats:
        """float32[rows, columns]: a view without the padding."""
        return coefficients[: self.spec.size].reshape(matrix_shape(self.spec.shape))

    @abstractmethod
    def _forward(self, raster: Floats) -> None:
        """Turn float32[rows, columns] weights into coefficients, in place."""

    @abstractmethod
    def _make_codec(self, exponent: int, shifts: str, essential: int) -> TransformCodec: ...

    def encode(self, part: int) -> list[EncodedFragment]:
        offsets = self._deal.offsets(self.codec.group_shifts)
        shares = deal_all(self._shared, self._deal, offsets)
        return [self._fragment(index, values) for index, values in enumerate(shares)]

    def _fragment(self, index: int, values: Floats) -> EncodedFragment:
        share = values.astype(self.codec.value_dtype, copy=False).view(np.uint8)
        raw = np.concatenate([self._head, share]) if self._head.size else share
        name, payload = compress(self.options.compression, raw, MIN_FRAGMENT_SAVING)
        gain = float(self._gains[index])
        return EncodedFragment(index, 0, index, NO_PREREQUISITE, name, raw.nbytes, gain, memoryview(payload))

    def _measure_residual(self, stored: Floats) -> float:
        out = np.empty(matrix_shape(self.spec.shape), self.spec.numpy_dtype)
        store(self.accumulator.inverse(self.codec, self._raster(stored)), out, self.codec.exponent)
        return squared_distance(out, self.array)


def leading(values: Floats, share: float) -> npt.NDArray[np.int64]:
    """Positions, ascending, of the fewest values that hold this share of the energy; of equal ones the first."""
    if share == 0.0:
        return np.zeros(0, np.int64)
    sizes = np.abs(values)
    falling = np.sort(sizes)[::-1]
    energies = np.cumsum(np.square(falling, dtype=np.float64))
    if energies[-1] == 0.0:
        return np.zeros(0, np.int64)
    count = int(np.searchsorted(energies, share * energies[-1])) + 1
    least = falling[count - 1]
    larger = np.flatnonzero(sizes > least)
    return np.sort(np.concatenate([larger, np.flatnonzero(sizes == least)[: count - larger.size]]))


def _without(values: Floats, places: npt.NDArray[np.int64]) -> Floats:
    """The values with zeros at some places (the same array if there are none)."""
    if places.size == 0:
        return values
    out = values.copy()
    out[places] = 0.0
    return out


def _gain(exact: Floats, stored: Floats) -> float:
    wide = stored.astype(np.float64)
    return float(((2.0 * exact - wide) * wide).sum())


class TransformAccumulator(DealtAccumulator):
    """Its numbers are coefficients; the essential part is kept as it is stored."""

    codec: TransformCodec

    def __init__(self, spec: TensorSpec, codec: Codec, out: Array, memory: npt.NDArray[np.uint8] | None = None) -> None:
        super().__init__(spec, codec, out, memory)
        self._deal = self.codec.deal(spec.size)
        self._offsets = self._deal.offsets(self.codec.group_shifts)
        self._layout = self.codec.essential_part(spec.size)

    @classmethod
    def state_sizes(cls, spec: TensorSpec, codec: Codec) -> tuple[int, int]:
        assert isinstance(codec, TransformCodec)
        return codec.essential_part(spec.size).nbytes, codec.deal(spec.size).padded

    def _parse(self, raw: Any) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
        self._layout.parse(raw)
        head = self._layout.nbytes
        return np.frombuffer(raw, np.uint8, head), np.frombuffer(raw, self.codec.value_dtype, offset=head)

    def _count(self, slot: int) -> int:
        return self._deal.count((int(self._offsets[-1]) + slot) % self._deal.fragments)


class RasterAccumulator(TransformAccumulator):
    """On the CPU: coefficients (whole strips) in raster order."""

    @staticmethod
    @abstractmethod
    def inverse(codec: Any, raster: Floats) -> Floats:
        """The weights behind float32[rows, columns] coefficients, as a new array."""

    def _gather(self, slot: int) -> Floats:
        return gather(self._numbers, self._deal, self._offsets, slot)

    def _scatter(self, slot: int, values: npt.NDArray[Any]) -> None:
        scatter(self._numbers, values.astype(np.float32, copy=False), self._deal, self._offsets, slot)

    def finalize(self) -> None:
        raster = self._numbers[: self.spec.size]
        if self._essential.held:
            positions, values = self._layout.parse(self._essential.content)
            raster = raster.copy()
            raster[positions] = values
        shape = matrix_shape(self.spec.shape)
        store(self.inverse(self.codec, raster.reshape(shape)), self.out.reshape(shape), self.codec.exponent)
