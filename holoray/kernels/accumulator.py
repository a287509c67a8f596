"""State into which the fragments of one tensor are added, in any order: the interface, and the law it obeys.

Merge law: `combine(acc(A), acc(B)) == acc(A | B)` whenever A and B fill disjoint slots. Each slot belongs to one
holder, so a sum over unsigned views of the state is exact; overlapping slots are refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from holoray.codecs.base import Codec
from holoray.errors import FormatError, UsageError
from holoray.fragment import FragmentEntry
from holoray.kernels.scratch import Scratch
from holoray.tensor import Array, TensorSpec, as_bytes

_FLAG_BYTES = 8


class SharedPart:
    """Bytes of a state that every fragment of a tensor brings along, with a flag of their own that they are there.

    `memory` is zeroed uint8 of `state_nbytes`; processes that share it write the same bytes, and the flag last.
    """

    def __init__(self, memory: npt.NDArray[np.uint8], nbytes: int) -> None:
        self._flag = memory[:_FLAG_BYTES] if nbytes else memory[:0]
        self.content = memory[_FLAG_BYTES : _FLAG_BYTES + nbytes] if nbytes else memory[:0]

    @staticmethod
    def state_nbytes(nbytes: int) -> int:
        """Bytes of memory for a part of `nbytes` and its flag; none for no part."""
        return _FLAG_BYTES + nbytes if nbytes else 0

    @property
    def held(self) -> bool:
        return bool(self._flag.any())

    def put(self, content: npt.NDArray[np.uint8]) -> None:
        """Keep the part; one that is there already must be the same, else FormatError."""
        if not self.held:
            self.content[:] = content
            self._flag[:1] = 1
        elif not np.array_equal(self.content, content):
            raise FormatError("two fragments of one tensor differ in their essential part")


class Accumulator(ABC):
    """Accumulates into `out`, an array of the spec's dtype and shape that starts as zeros and is refined in place.

    One slot is worked on by one thread at a time; different slots may be worked on concurrently. A codec whose state
    is not `out` itself keeps it in `memory` (zeroed uint8 of `state_nbytes`), which may be shared with other processes.
    """

    needs_finalize: ClassVar[bool] = False
    """Whether `out` is stale until `finalize` is called."""

    def __init__(self, spec: TensorSpec, codec: Codec, out: Array, memory: npt.NDArray[np.uint8] | None = None) -> None:
        self.spec = spec
        self.codec = codec
        self.out = out
        self._out_bytes = as_bytes(out)

    @classmethod
    def state_nbytes(cls, spec: TensorSpec, codec: Codec) -> int:
        """Bytes of state besides `out`."""
        return 0

    @abstractmethod
    def slot_range(self, slot: int) -> tuple[int, int] | None:
        """First and past-the-last byte of `out` that the slot fills; None where slots are no ranges of `out`."""

    @abstractmethod
    def resume(self, slot: int, layers: int) -> None:
        """From now on the slot holds exactly its first `layers` layers: another process may have put them there."""

    def slot_nbytes(self, slot: int) -> int:
        """Bytes of state that the slot fills."""
        start, stop = self._range(slot)
        return stop - start

    def read_slot(self, slot: int) -> npt.NDArray[Any]:
        """Contents of a slot as a flat unsigned array: what travels to another node."""
        return self._out_bytes[slice(*self._range(slot))]

    def write_slot(self, slot: int, content: npt.NDArray[Any]) -> None:
        """Overwrite a slot with what `read_slot` gave elsewhere."""
        self._out_bytes[slice(*self._range(slot))] = content

    def clear(self, slot: int) -> None:
        """Whatever somebody had put to the slot, it holds nothing: zeros."""
        self.write_slot(slot, np.zeros(self.slot_nbytes(slot), np.uint8))
        self.resume(slot, 0)

    def _range(self, slot: int) -> tuple[int, int]:
        bounds = self.slot_range(slot)
        if bounds is None:
            raise UsageError(f"slots of {self.codec.name!r} are no ranges of the tensor", tensor=self.spec.name)
        return bounds

    def landing(self, entry: FragmentEntry) -> memoryview | None:
        """Where the stored payload of `entry` may be read to stay, if it is exactly the bytes of its slot.

        Whoever reads there calls `accumulate` once the bytes are verified, and `discard` if they never were.
        """
        return None

    def discard(self, slot: int) -> None:  # noqa: B027 - only landings leave something to forget
        """Forget what was read to a landing and did not prove true."""

    @abstractmethod
    def decompress(self, entries: Sequence[FragmentEntry], payloads: Sequence[Any], scratch: Scratch) -> Any:
        """Turn verified stored payloads of one slot into what `accumulate` takes; may live in `scratch`."""

    @abstractmethod
    def accumulate(self, slot: int, decompressed: Any, scratch: Scratch) -> None:
        """Add the fragments of one slot; a fragment added twice changes nothing."""

    @abstractmethod
    def finalize(self) -> None:
        """Bring `out` up to date with the whole state (also what other processes put there); more may follow."""

    @abstractmethod
    def state(self) -> dict[str, Array]:
        """The state as unsigned views: `held` (uint8, one entry a slot, 0 = nothing) and the slots' contents."""

    def essential(self) -> SharedPart | None:
        """What rides in every fragment: any holder has the same, so it is never summed."""
        return None

    def combine(self, other: Accumulator) -> None:
        """Take over the slots that `other` holds, and its essential part unless that is here.

        Raises UsageError if both hold one of the slots.
        """
        mine, theirs = self.state(), other.state()
        if np.any((mine["held"] != 0) & (theirs["held"] != 0)):
            raise UsageError(f"both accumulators of {self.spec.name!r} hold the same slot", tensor=self.spec.name)
        own, others = self.essential(), other.essential()
        if own is not None and others is not None and others.held:
            own.put(others.content)
        for key, array in theirs.items():
            np.add(mine[key], array, out=mine[key])
