"""Slots of the generation in the making, wherever their tensors lie: the verbs of a worker's memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from holoray.actors.goals import first_layer
from holoray.actors.marks import Marks
from holoray.actors.messages import Slot, Survey
from holoray.errors import SourceError
from holoray.kernels.accumulator import Accumulator
from holoray.kernels.device import Device
from holoray.manifest import Manifest
from holoray.pipelines.plan import Unit

ALIGNMENT: Final = 64

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where in a segment each part lies."""

    ranges: tuple[slice, ...]
    nbytes: int

    @classmethod
    def of(cls, sizes: Iterable[int]) -> Layout:
        """Parts of these sizes one after the other, each aligned to 64 bytes."""
        ranges, end = [], 0
        for size in sizes:
            start = -(-end // ALIGNMENT) * ALIGNMENT
            end = start + size
            ranges.append(slice(start, end))
        return cls(tuple(ranges), end)


class SlotMemory(ABC):
    """Whatever is written is slots of the generation in the making; generations only go up.

    The tensors of a generation are parts of a `segment` of the host or a device. Writing a slot again overwrites it
    wholly, whatever an earlier writer left; marks tell which slots are whole.
    """

    device: Device | None = None
    """Where the tensors lie, if not on the host."""
    opens_frames = False
    """Whether zstd frames are opened there."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._making = 0
        self._segment: Any = None
        self._marks: Marks | None = None
        self._accumulators: dict[int, Accumulator] = {}

    @abstractmethod
    def survey(self, generation: int) -> Survey:
        """What is held of a generation and of the one before; older ones are removed."""

    @abstractmethod
    def retire(self, generation: int) -> None:
        """Forget a generation that nobody needs any more."""

    @abstractmethod
    def _open(self, generation: int) -> tuple[Any, Marks]:
        """The segment of a generation and its marks, made if there is none; called when it is turned to."""

    @abstractmethod
    def _last_segment(self) -> Any:
        """The segment of the generation before."""

    @abstractmethod
    def _place(self, segment: Any, tensor: int) -> Any:
        """The bytes of a tensor in a segment, uint8."""

    @abstractmethod
    def _make_accumulator(self, tensor: int) -> Accumulator:
        """An accumulator over the tensor's place in the segment, with whatever state it had."""

    def width(self, work: Iterable[Unit], threads: int) -> int:
        """Of so many threads, how many may decode at a time."""
        return threads

    def make(self, generation: int) -> None:
        """Turn to a generation."""
        if generation == self._making:
            return
        segment, marks = self._open(generation)
        self._accumulators.clear()
        self._segment, self._marks, self._making = segment, marks, generation

    def accumulator(self, tensor: int) -> Accumulator:
        """The accumulator of a tensor, over its place in the generation in the making."""
        if tensor not in self._accumulators:
            self._accumulators[tensor] = self._make_accumulator(tensor)
        return self._accumulators[tensor]

    def prepare(self, work: Iterable[Unit]) -> None:
        """Bring slots to where the units start: the layers below them, from the last generation, or nothing.

        Say `hold` when a unit has been added.
        """
        for unit in work:
            slot, layers = (unit.tensor, unit.slot), first_layer(unit)
            self.begin(slot)
            if layers:
                self._copy(slot)
            else:
                self._populate(slot)
            self.accumulator(unit.tensor).resume(unit.slot, layers)
        self._await_copies()

    def begin(self, slot: Slot) -> None:
        """The slot is about to be overwritten: it is not whole any more."""
        assert self._marks is not None
        self._marks.forget(slot)

    def hold(self, slot: Slot, count: int) -> None:
        """Mark a slot as whole, with so many fragments."""
        assert self._marks is not None
        self._marks.hold(slot, count)

    def clear(self, slot: Slot) -> None:
        """The slot is whole without any fragment: zeros."""
        self.begin(slot)
        self._populate(slot)
        self.accumulator(slot[0]).clear(slot[1])
        self.hold(slot, 0)

    def finish(self, unit: Unit) -> int:
        """How many fragments of a unit that was prepared, all of which may have been skipped, are in its slot."""
        assert self._marks is not None
        slot, layers = (unit.tensor, unit.slot), first_layer(unit)
        if not self._marks.holds(slot):
            if layers:
                self.hold(slot, layers)
            else:
                self.clear(slot)
        return self._marks.count(slot) - layers

    def carry(self, slots: Mapping[Slot, int]) -> None:
        """Copy slots, of so many fragments, from the last generation (accumulated state stays where it is)."""
        for slot, count in slots.items():
            if count:
                self.begin(slot)
                self._copy(slot)
            else:
                self.clear(slot)
        self._await_copies()
        for slot, count in slots.items():
            self.hold(slot, count)

    def _copy(self, slot: Slot) -> None:
        here = self._populate(slot)
        if here is not None:
            last = self._place(self._last_segment(), slot[0])
            self._copy_bytes(last[here], self._place(self._opened(), slot[0])[here])

    def _copy_bytes(self, content: Any, to: Any) -> None:
        to[...] = content

    def _await_copies(self) -> None:  # noqa: B027 - the host copies at once
        """Return when all that was copied is there."""

    def _populate(self, slot: Slot) -> slice | None:
        """Where a slot lies in its tensor, in bytes; None for one that lies in accumulated state."""
        bounds = self.accumulator(slot[0]).slot_range(slot[1])
        return None if bounds is None else slice(*bounds)

    def read(self, slots: Iterable[Slot]) -> Bytes:
        """The contents of slots, one after the other, on the host: what travels to another node."""
        return np.concatenate([self._content(slot) for slot in slots])

    def write(self, slots: Mapping[Slot, int], contents: Bytes) -> None:
        """Overwrite slots, of so many fragments, with what `read` of the same slots gave on another node."""
        position = 0
        for slot, count in slots.items():
            accumulator = self.accumulator(slot[0])
            end = position + accumulator.slot_nbytes(slot[1])
            if end > contents.size:
                break
            self.begin(slot)
            accumulator.write_slot(slot[1], contents[position:end])
            self.hold(slot, count)
            position = end
        else:
            if position == contents.size:
                return
        raise SourceError("another node sent slots of other sizes")

    def seal(self, tensors: Iterable[int]) -> None:
        """Bring tensors up to date with their accumulated state."""
        assert self._marks is not None
        for tensor in tensors:
            self.accumulator(tensor).finalize()
            self._marks.seal(tensor)

    def _close(self) -> None:
        self._accumulators.clear()
        self._segment = self._marks = None

    def _content(self, slot: Slot) -> Bytes:
        content = self.accumulator(slot[0]).read_slot(slot[1])
        return np.ascontiguousarray(content).reshape(-1).view(np.uint8)

    def _opened(self) -> Any:
        assert self._segment is not None
        return self._segment
