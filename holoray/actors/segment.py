"""Where weights lie on a node: one shared-memory segment a generation, and one for what accumulators keep besides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from holoray.actors import shared_memory
from holoray.actors.goals import first_layer
from holoray.actors.locks import Names
from holoray.actors.marks import Marks
from holoray.actors.messages import Holdings, Slot, Survey
from holoray.errors import SourceError
from holoray.kernels.accumulator import Accumulator
from holoray.kernels.registry import make_accumulator, state_nbytes
from holoray.manifest import Manifest
from holoray.pipelines.plan import Unit
from holoray.tensor import Array, TensorSpec

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


def weights_layout(manifest: Manifest) -> Layout:
    """The tensors of a segment, and as its last part the marks of what it holds."""
    return Layout.of([*(t.spec.nbytes for t in manifest.tensors), Marks.nbytes(manifest)])


def view(segment: Bytes, layout: Layout, tensor: int, spec: TensorSpec) -> Array:
    """A tensor of a segment."""
    return segment[layout.ranges[tensor]].view(spec.numpy_dtype).reshape(spec.shape)


def attach_weights(manifest: Manifest, names: Names, generation: int) -> dict[str, Array]:
    """The tensors of a published generation, read-only and without a copy; valid as long as they are referenced."""
    layout = weights_layout(manifest)
    segment = shared_memory.attach(names.segment(generation), layout.nbytes)
    return {t.name: view(segment, layout, i, t.spec) for i, t in enumerate(manifest.tensors)}


class NodeMemory:
    """The segments of a node as one of its processes sees them; opened when first needed.

    Whatever is written is slots of the generation in the making; generations only go up. Writing a slot again
    overwrites it wholly, whatever an earlier writer left. The segment itself keeps marks of what is whole, so that a
    `survey` by any process of the node tells what others did, who may be dead.
    """

    def __init__(self, manifest: Manifest, names: Names) -> None:
        self._manifest = manifest
        self._names = names
        self._weights = weights_layout(manifest)
        self._states = Layout.of(
            state_nbytes(t.spec, c) for t, c in zip(manifest.tensors, manifest.codecs, strict=True)
        )
        self._state: Bytes | None = None
        self._making = 0
        self._segment: Bytes | None = None
        self._last: Bytes | None = None
        self._marks: Marks | None = None
        self._accumulators: dict[int, Accumulator] = {}

    def survey(self, generation: int) -> Survey:
        """What the node holds of a generation and of the one before; older ones are removed."""
        for old, path in self._names.segments.items():
            if old < generation - 1:
                path.unlink(missing_ok=True)
        return Survey(self._holdings(generation - 1), self._holdings(generation))

    def _holdings(self, generation: int) -> Holdings:
        path = self._names.segment(generation)
        if not path.exists():
            return Holdings()
        return self._marks_of(shared_memory.attach(path, self._weights.nbytes)).holdings()

    def _marks_of(self, segment: Bytes) -> Marks:
        return Marks(self._manifest, segment[self._weights.ranges[-1]])

    def make(self, generation: int) -> None:
        """Turn to a generation: its segment is created if nobody on the node has done so."""
        if generation == self._making:
            return
        self._accumulators.clear()
        self._last = self._segment if generation == self._making + 1 else None
        self._segment = shared_memory.create_or_attach(self._names.segment(generation), self._weights.nbytes)
        self._marks = self._marks_of(self._segment)
        self._making = generation

    def accumulator(self, tensor: int) -> Accumulator:
        """The accumulator of a tensor, over its place in the generation in the making."""
        if tensor not in self._accumulators:
            assert self._segment is not None
            entry, codec = self._manifest.tensors[tensor], self._manifest.codecs[tensor]
            out = view(self._segment, self._weights, tensor, entry.spec)
            memory = self._state_memory(tensor)
            self._accumulators[tensor] = make_accumulator(entry.spec, codec, out, memory)
        return self._accumulators[tensor]

    def prepare(self, unit: Unit) -> None:
        """Bring a slot to where the unit starts: the layers below it, from the last generation, or nothing.

        Say `hold` when the unit has been added.
        """
        slot, layers = (unit.tensor, unit.slot), first_layer(unit)
        self._begin(slot)
        if layers:
            self._copy(slot)
        else:
            self._populate(slot)
        self.accumulator(unit.tensor).resume(unit.slot, layers)

    def hold(self, slot: Slot) -> None:
        """Mark a slot as whole."""
        assert self._marks is not None
        self._marks.hold(slot)

    def carry(self, slot: Slot) -> None:
        """Copy a slot from the last generation (accumulated state stays where it is)."""
        self._begin(slot)
        self._copy(slot)
        self.hold(slot)

    def _begin(self, slot: Slot) -> None:
        assert self._marks is not None
        self._marks.forget(slot)

    def _copy(self, slot: Slot) -> None:
        here = self._populate(slot)
        if here is not None:
            assert self._segment is not None
            self._segment[here] = self._last_segment()[here]

    def _populate(self, slot: Slot) -> slice | None:
        """Where a slot lies in the segment, its pages mapped; None for one that lies in accumulated state."""
        bounds = self.accumulator(slot[0]).slot_range(slot[1])
        if bounds is None:
            return None
        assert self._segment is not None
        start = self._weights.ranges[slot[0]].start
        here = slice(start + bounds[0], start + bounds[1])
        shared_memory.populate(self._segment[here])
        return here

    def read(self, slots: Iterable[Slot]) -> Bytes:
        """The contents of slots, one after the other: what travels to another node."""
        return np.concatenate([self._content(slot) for slot in slots])

    def write(self, slots: Iterable[Slot], contents: Bytes) -> None:
        """Overwrite slots with what `read` of the same slots gave on another node."""
        position = 0
        for slot in slots:
            accumulator = self.accumulator(slot[0])
            like = accumulator.read_slot(slot[1])
            if position + like.nbytes > contents.size:
                break
            self._begin(slot)
            accumulator.write_slot(slot[1], contents[position : position + like.nbytes].view(like.dtype))
            self.hold(slot)
            position += like.nbytes
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

    def retire(self, generation: int) -> None:
        """Forget a generation that nobody needs any more; its memory is free once no process maps it."""
        if generation < self._making:
            self._last = None
        elif generation == self._making:
            self._accumulators.clear()
            self._segment = self._marks = None
        self._names.segment(generation).unlink(missing_ok=True)

    def _content(self, slot: Slot) -> Bytes:
        content = self.accumulator(slot[0]).read_slot(slot[1])
        return np.ascontiguousarray(content).reshape(-1).view(np.uint8)

    def _state_memory(self, tensor: int) -> Bytes | None:
        part = self._states.ranges[tensor]
        if part.start == part.stop:
            return None
        if self._state is None:
            self._state = shared_memory.create_or_attach(self._names.state, self._states.nbytes)
        return self._state[part]

    def _last_segment(self) -> Bytes:
        if self._last is None:
            self._last = shared_memory.attach(self._names.segment(self._making - 1), self._weights.nbytes)
        return self._last
