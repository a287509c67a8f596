"""What accumulators of dealt numbers (coefficients, terms) share: slots are no ranges of the tensor."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from holoray.codecs.base import Codec
from holoray.codecs.dealt import DealtCodec
from holoray.compression import decompress
from holoray.fragment import FragmentEntry
from holoray.kernels.accumulator import Accumulator, SharedPart
from holoray.kernels.scratch import Scratch
from holoray.tensor import Array, TensorSpec

Floats = npt.NDArray[np.float32]


class DealtAccumulator(Accumulator):
    """Its state is the essential part and, behind it, float32 numbers: a slot fills its own, so order is free.

    The state stays as it was accumulated; essential numbers join the others when these are turned into weights.
    """

    needs_finalize = True

    def __init__(self, spec: TensorSpec, codec: Codec, out: Array, memory: npt.NDArray[np.uint8] | None = None) -> None:
        super().__init__(spec, codec, out)
        assert isinstance(codec, DealtCodec)
        self._held = np.zeros(codec.fragments, np.uint8)
        self._make_state(memory)

    def _make_state(self, memory: npt.NDArray[np.uint8] | None) -> None:
        """Set `_essential` and `_numbers`, zeros, in `memory` (uint8[state_nbytes]) if that is given."""
        shared, count = self.state_sizes(self.spec, self.codec)
        self._memory = np.zeros(self.state_nbytes(self.spec, self.codec), np.uint8) if memory is None else memory
        numbers_at = self._memory.size - 4 * count
        self._essential = SharedPart(self._memory[:numbers_at], shared)
        self._numbers: Any = self._memory[numbers_at:].view(np.float32)

    @classmethod
    @abstractmethod
    def state_sizes(cls, spec: TensorSpec, codec: Codec) -> tuple[int, int]:
        """Bytes of the essential part as it is kept, and how many numbers there are."""

    @abstractmethod
    def _parse(self, raw: Any) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
        """A raw payload as the essential part, as it is kept, and the slot's own numbers, as they are stored.

        Raises FormatError if the payload is malformed.
        """

    @abstractmethod
    def _count(self, slot: int) -> int:
        """How many numbers a slot has."""

    @abstractmethod
    def _gather(self, slot: int) -> Floats:
        """A copy of the numbers of a slot."""

    @abstractmethod
    def _scatter(self, slot: int, values: npt.NDArray[Any]) -> None:
        """Put the numbers of a slot, float32 or as they are stored, to their places."""

    @classmethod
    def state_nbytes(cls, spec: TensorSpec, codec: Codec) -> int:
        shared, count = cls.state_sizes(spec, codec)
        return -(-SharedPart.state_nbytes(shared) // 4) * 4 + 4 * count

    def slot_range(self, slot: int) -> None:
        return None

    def resume(self, slot: int, layers: int) -> None:
        self._held[slot] = min(layers, 1)

    def slot_nbytes(self, slot: int) -> int:
        return self._essential.content.size + 4 * self._count(slot)

    def read_slot(self, slot: int) -> npt.NDArray[np.uint8]:
        return np.concatenate([self._essential.content, self._gather(slot).reshape(-1).view(np.uint8)])

    def write_slot(self, slot: int, content: npt.NDArray[Any]) -> None:
        head = self._essential.content.size
        self._essential.put(content[:head])
        self._scatter(slot, np.frombuffer(content[head:].tobytes(), np.float32))

    def clear(self, slot: int) -> None:
        """Its numbers only: the essential part belongs to all slots."""
        self._scatter(slot, np.zeros(self._count(slot), np.float32))
        self.resume(slot, 0)

    def decompress(self, entries: Sequence[FragmentEntry], payloads: Sequence[Any], scratch: Scratch) -> Any:
        return decompress(entries[0].compression, payloads[0], entries[0].raw_bytes)

    def accumulate(self, slot: int, decompressed: Any, scratch: Scratch) -> None:
        shared, values = self._parse(decompressed)
        self._essential.put(shared)
        self._scatter(slot, values)
        self._held[slot] = 1

    def state(self) -> dict[str, Array]:
        return {"held": self._held, "numbers": self._numbers.view(np.uint32)}

    def essential(self) -> SharedPart:
        return self._essential
