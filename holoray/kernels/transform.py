"""What `spectral` and `projection` share on the CPU: coefficients in a raster, an essential part, dealt shares."""

from __future__ import annotations

import base64
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from holoray.codecs.base import Codec
from holoray.codecs.dealing import Deal
from holoray.codecs.transform import TransformCodec
from holoray.compression import MIN_FRAGMENT_SAVING, compress, decompress
from holoray.fragment import NO_PREREQUISITE, FragmentEntry
from holoray.kernels.accumulator import Accumulator, SharedPart
from holoray.kernels.dealing import deal_all, gather, level_shifts, scatter
from holoray.kernels.encoder import EncodedFragment, EncodeOptions, Encoder
from holoray.kernels.rounding import is_faithful, largest_exponent, scaled, scaling_exponent, store, through_half
from holoray.kernels.scratch import Scratch
from holoray.kernels.sums import squared_distance
from holoray.quality import widened
from holoray.tensor import Array, TensorSpec, matrix_shape

_HALF_RANGE = 15  # the largest coefficient in float16 is brought below 2^15: products and sums stay in range

Floats = npt.NDArray[np.float32]


class TransformEncoder(Encoder):
    """Transforms in the constructor; one part (cutting the raster into fragments is cheap)."""

    parts = 1
    codec: TransformCodec
    accumulator: ClassVar[type[TransformAccumulator]]

    def __init__(self, spec: TensorSpec, array: Array, options: EncodeOptions) -> None:
        super().__init__(spec, array, options)
        deal = self._deal = Deal(spec.size, options.fragments, options.seed)
        weights = widened(array.reshape(-1))
        exponent = scaling_exponent(weights)
        exact = np.zeros(deal.padded, np.float32)
        exact[: spec.size] = scaled(weights, exponent)
        raster = exact[: spec.size].reshape(matrix_shape(spec.shape))
        self._forward(raster)
        stored = exact
        if options.coefficients == "float16":
            # Only now is it known how large coefficients are.
            more = largest_exponent(raster) - _HALF_RANGE
            np.ldexp(exact, -more, out=exact)
            stored, exponent = through_half(exact), exponent + more
        places = leading(exact[: spec.size], options.essential)
        values, gain = stored[places], _gain(exact[places], stored[places])
        self._shared = stored
        if places.size:
            self._shared = stored.copy()
            self._shared[places] = 0.0
        shifts, gains = level_shifts(exact, self._shared, deal)
        self.codec = self._make_codec(exponent, base64.b64encode(shifts.astype("<u2").tobytes()).decode(), places.size)
        self._head = self.codec.essential_part(spec.size).pack(places, values)
        self.essential_gain = float(np.ldexp(gain, 2 * exponent))
        self._gains = np.ldexp(gains, 2 * exponent)
        self.residual = self._measure_residual(stored[: spec.size].reshape(raster.shape))
        self.faithful = is_faithful(array, self._gains, self.residual)

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

    def _measure_residual(self, raster: Floats) -> float:
        out = np.empty(raster.shape, self.spec.numpy_dtype)
        store(self.accumulator.inverse(self.codec, raster), out, self.codec.exponent)
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


def _gain(exact: Floats, stored: Floats) -> float:
    wide = stored.astype(np.float64)
    return float(((2.0 * exact - wide) * wide).sum())


class TransformAccumulator(Accumulator):
    """Its state are the coefficients (float32, whole strips); a fragment fills its own places, so order is free.

    The essential coefficients lie beside them: they are laid over the raster when it is turned into weights.
    """

    codec: TransformCodec
    needs_finalize = True

    def __init__(self, spec: TensorSpec, codec: Codec, out: Array, memory: npt.NDArray[np.uint8] | None = None) -> None:
        super().__init__(spec, codec, out)
        self._deal = self.codec.deal(spec.size)
        self._offsets = self._deal.offsets(self.codec.group_shifts)
        self._layout = self.codec.essential_part(spec.size)
        memory = np.zeros(self.state_nbytes(spec, codec), np.uint8) if memory is None else memory
        raster_at = memory.size - 4 * self._deal.padded
        self._essential = SharedPart(memory[:raster_at], self._layout.nbytes)
        self._raster = memory[raster_at:].view(np.float32)
        self._held = np.zeros(self.codec.fragments, np.uint8)

    @staticmethod
    @abstractmethod
    def inverse(codec: Any, raster: Floats) -> Floats:
        """The weights behind float32[rows, columns] coefficients, as a new array."""

    @classmethod
    def state_nbytes(cls, spec: TensorSpec, codec: Codec) -> int:
        assert isinstance(codec, TransformCodec)
        return SharedPart.state_nbytes(codec.essential_part(spec.size).nbytes) + 4 * codec.deal(spec.size).padded

    def slot_range(self, slot: int) -> None:
        return None

    def resume(self, slot: int, layers: int) -> None:
        self._held[slot] = min(layers, 1)

    def slot_nbytes(self, slot: int) -> int:
        share = self._deal.count((int(self._offsets[-1]) + slot) % self._deal.fragments)
        return self._layout.nbytes + 4 * share

    def read_slot(self, slot: int) -> npt.NDArray[np.uint8]:
        share = gather(self._raster, self._deal, self._offsets, slot).view(np.uint8)
        return np.concatenate([self._essential.content, share])

    def write_slot(self, slot: int, content: npt.NDArray[Any]) -> None:
        head = self._layout.nbytes
        self._essential.put(content[:head])
        self._scatter(slot, np.frombuffer(content[head:].tobytes(), np.float32))

    def decompress(self, entries: Sequence[FragmentEntry], payloads: Sequence[Any], scratch: Scratch) -> Any:
        return decompress(entries[0].compression, payloads[0], entries[0].raw_bytes)

    def accumulate(self, slot: int, decompressed: Any, scratch: Scratch) -> None:
        head = self._layout.nbytes
        self._layout.parse(decompressed)  # before anything of it is used
        self._essential.put(np.frombuffer(decompressed, np.uint8, head))
        values = np.frombuffer(decompressed, self.codec.value_dtype, offset=head)
        self._scatter(slot, values.astype(np.float32, copy=False))

    def _scatter(self, slot: int, values: Floats) -> None:
        scatter(self._raster, values, self._deal, self._offsets, slot)
        self._held[slot] = 1

    def finalize(self) -> None:
        shape = matrix_shape(self.spec.shape)
        raster = self._raster[: self.spec.size]
        if self._essential.held:
            positions, values = self._layout.parse(self._essential.content)
            raster = raster.copy()  # the state stays as it was accumulated: disjoint slots
            raster[positions] = values
        store(self.inverse(self.codec, raster.reshape(shape)), self.out.reshape(shape), self.codec.exponent)

    def state(self) -> dict[str, Array]:
        return {"held": self._held, "coefficients": self._raster.view(np.uint32)}

    def essential(self) -> SharedPart:
        return self._essential
