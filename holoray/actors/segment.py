"""Where weights lie on a node: one shared-memory segment a generation, and one for what accumulators keep besides."""

from __future__ import annotations

from holoray.actors import shared_memory
from holoray.actors.locks import Names
from holoray.actors.marks import Marks
from holoray.actors.messages import Holdings, Slot, Survey
from holoray.actors.slot_memory import Bytes, Layout, SlotMemory
from holoray.kernels.accumulator import Accumulator
from holoray.kernels.registry import make_accumulator, state_nbytes
from holoray.manifest import Manifest
from holoray.tensor import Array, TensorSpec


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


class NodeMemory(SlotMemory):
    """The segments of a node as one of its processes sees them; opened when first needed.

    The segment itself keeps marks of what is whole, so that a `survey` by any process of the node tells what others
    did, who may be dead.
    """

    def __init__(self, manifest: Manifest, names: Names) -> None:
        super().__init__(manifest)
        self._layout = weights_layout(manifest)
        self._names = names
        self._states = Layout.of(
            state_nbytes(t.spec, c) for t, c in zip(manifest.tensors, manifest.codecs, strict=True)
        )
        self._state: Bytes | None = None
        self._last: Bytes | None = None

    def survey(self, generation: int) -> Survey:
        for old, path in self._names.segments.items():
            if old < generation - 1:
                path.unlink(missing_ok=True)
        return Survey(self._holdings(generation - 1), self._holdings(generation))

    def _holdings(self, generation: int) -> Holdings:
        path = self._names.segment(generation)
        if not path.exists():
            return Holdings()
        return self._marks_of(shared_memory.attach(path, self._layout.nbytes)).holdings()

    def _marks_of(self, segment: Bytes) -> Marks:
        return Marks(self._manifest, segment[self._layout.ranges[-1]])

    def _open(self, generation: int) -> tuple[Bytes, Marks]:
        self._last = self._segment if generation == self._making + 1 else None
        segment = shared_memory.create_or_attach(self._names.segment(generation), self._layout.nbytes)
        return segment, self._marks_of(segment)

    def _make_accumulator(self, tensor: int) -> Accumulator:
        entry, codec = self._manifest.tensors[tensor], self._manifest.codecs[tensor]
        out = view(self._opened(), self._layout, tensor, entry.spec)
        return make_accumulator(entry.spec, codec, out, self._state_memory(tensor))

    def _place(self, segment: Bytes, tensor: int) -> Bytes:
        return segment[self._layout.ranges[tensor]]

    def _populate(self, slot: Slot) -> slice | None:
        """Where a slot lies in its tensor, its pages mapped."""
        here = super()._populate(slot)
        if here is not None:
            shared_memory.populate(self._place(self._opened(), slot[0])[here])
        return here

    def retire(self, generation: int) -> None:
        """Forget a generation; its memory is free once no process maps it."""
        if generation < self._making:
            self._last = None
        elif generation == self._making:
            self._close()
        self._names.segment(generation).unlink(missing_ok=True)

    def _state_memory(self, tensor: int) -> Bytes | None:
        part = self._states.ranges[tensor]
        if part.start == part.stop:
            return None
        if self._state is None:
            self._state = shared_memory.create_or_attach(self._names.state, self._states.nbytes)
        return self._state[part]

    def _last_segment(self) -> Bytes:
        if self._last is None:
            self._last = shared_memory.attach(self._names.segment(self._making - 1), self._layout.nbytes)
        return self._last
