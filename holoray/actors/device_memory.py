"""Where weights lie on a device: blocks of each generation, for as long as its worker lives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from holoray.actors.goals import needs_sealing
from holoray.actors.marks import Marks
from holoray.actors.messages import Holdings, Shard, Slot, Survey
from holoray.actors.slot_memory import Layout, SlotMemory
from holoray.errors import CapacityError, SourceError
from holoray.kernels.accumulator import Accumulator
from holoray.kernels.combine import SlotPart
from holoray.kernels.device import Device
from holoray.kernels.device_accumulators import device_dtype, turn_nbytes
from holoray.kernels.registry import make_device_accumulator, state_nbytes
from holoray.manifest import Manifest
from holoray.pipelines.frame_groups import group_nbytes
from holoray.pipelines.plan import Unit
from holoray.pipelines.turns import turns_within
from holoray.pipelines.weights_memory import RESERVE_BYTES, check_device_bytes
from holoray.tensor import TensorSpec


def device_layout(manifest: Manifest, tensors: Iterable[int]) -> Layout:
    """Where these tensors lie in a block."""
    return Layout.of(manifest.tensors[t].spec.nbytes for t in tensors)


def device_view(content: Any, spec: TensorSpec) -> Any:
    """The bytes of a tensor with the dtype that it has on a device."""
    return content.view(device_dtype(spec)).reshape(spec.shape)


@dataclass(frozen=True, slots=True)
class Block:
    """Tensors of a generation that lie in one allocation of a device."""

    tensors: tuple[int, ...]
    layout: Layout
    memory: Any


@dataclass(slots=True)
class Generation:
    """Its blocks, the bytes of each tensor in them, and whether it was sealed since somebody last wrote there."""

    marks: Marks
    blocks: list[Block] = field(default_factory=list)
    places: dict[int, Any] = field(default_factory=dict)
    closed: bool = False

    @property
    def nbytes(self) -> int:
        return sum(block.layout.nbytes for block in self.blocks)

    def add(self, block: Block) -> None:
        self.closed = False
        self.blocks.append(block)
        self.places |= {t: block.memory[at] for t, at in zip(block.tensors, block.layout.ranges, strict=True)}


class DeviceGenerations(SlotMemory):
    """The generations of one worker's device; marks are the worker's own, since nobody outlives it here.

    A generation lies in one block, or in several where the device was told later to hold more. All of it, and what
    decoding takes for a moment, is at most `limit_bytes` (default: what is free when it is made, less a reserve).
    `sharded`: there is room for no tensor before `settle` says for which. `opens_frames`: zstd frames are opened there,
    too. Raises CapacityError where a further generation does not fit beside the last one.
    """

    device: Device
    _spare_states = 1
    """State of so many tensors is there twice for a moment, while the next generation takes it over."""
    _lack_hint = (
        "two generations must fit at a time: ask for fewer target qualities, for in_place, or for placement shard, or "
        "use larger or more devices"
    )

    def __init__(
        self,
        manifest: Manifest,
        device: Device,
        limit_bytes: int | None = None,
        *,
        sharded: bool = False,
        opens_frames: bool = False,
    ) -> None:
        super().__init__(manifest)
        check_device_bytes(limit_bytes)
        self.device = device
        self.opens_frames = opens_frames
        self.limit_bytes = max(device.free_bytes() - RESERVE_BYTES, 0) if limit_bytes is None else limit_bytes
        self._shard: Shard | None = None
        self._tensors = frozenset(() if sharded else range(len(manifest.tensors)))
        pairs = list(zip([t.spec for t in manifest.tensors], manifest.codecs, strict=True))
        self._state_bytes = [state_nbytes(spec, codec) for spec, codec in pairs]
        self._turn_bytes = [turn_nbytes(spec, codec) for spec, codec in pairs]
        self._generations: dict[int, Generation] = {}
        self._before: dict[int, Accumulator] = {}
        """Accumulators of the last generation whose state goes on, until that is taken over."""

    def settle(self, shard: Shard, generation: int) -> None:
        """From now on these tensors are to be held. Who is to hold less than before begins this generation anew."""
        if not self._tensors <= shard.tensors:
            self._close()
            self._making = 0
            self._before.clear()
            self._generations.pop(generation, None)
            for published in self._generations.values():
                published.marks = self._no_marks()
        self._shard, self._tensors = shard, shard.tensors

    def survey(self, generation: int) -> Survey:
        for old in [number for number in self._generations if number < generation - 1]:
            del self._generations[old]
        return Survey(self._holdings(generation - 1), self._holdings(generation), self._shard)

    def make(self, generation: int) -> None:
        super().make(generation)
        missing = sorted(self._tensors - self._opened().places.keys())
        if missing:
            layout = device_layout(self._manifest, missing)
            self._check_room(layout.nbytes)
            with self.device.shared():
                self._opened().add(Block(tuple(missing), layout, self.device.segment(layout.nbytes)))

    def retire(self, generation: int) -> None:
        if generation == self._making:
            self._close()
        self._generations.pop(generation, None)

    def width(self, work: Iterable[Unit], threads: int) -> int:
        return turns_within(self.limit_bytes - self._kept_bytes, self._turn_nbytes(tuple(work)), threads)

    def _turn_nbytes(self, work: Sequence[Unit]) -> int:
        group_bytes = group_nbytes(f for unit in work for f in unit.fragments) if self.opens_frames else 0
        return max((group_bytes, *(self._turn_bytes[unit.tensor] for unit in work)))

    def _largest_turn_nbytes(self) -> int:
        fragments = (f for t in self._tensors for f in self._manifest.tensors[t].fragments)
        groups = group_nbytes(fragments) if self.opens_frames else 0
        return max((groups, *(self._turn_bytes[t] for t in self._tensors)))

    def begin(self, slot: Slot) -> None:
        super().begin(slot)
        self._opened().closed = False

    def seal(self, tensors: Iterable[int]) -> None:
        super().seal(tensors)
        held = self._holdings(self._making)
        self._opened().closed = held.sealed >= {t for t, _ in held.slots if needs_sealing(self._manifest.codecs[t])}

    def part(self, slot: Slot) -> SlotPart:
        """A slot as it is combined."""
        return SlotPart(self.accumulator(slot[0]), slot[1], self.device)

    def holds(self, slot: Slot) -> bool:
        """Whether a slot of the generation in the making is whole."""
        assert self._marks is not None
        return self._marks.holds(slot)

    def share(self, generation: int) -> list[tuple[tuple[int, ...], bytes]]:
        """Tensors of each block, and what a process on this device passes to `Device.attach` to open it.

        Raises SourceError if the generation is gone, or not whole.
        """
        return [(block.tensors, self.device.share(block.memory)) for block in self._published(generation).blocks]

    def fetch(self, generation: int, tensor: int) -> Any:
        """The bytes of a tensor, on the host. Raises SourceError if it is not here, or the generation is not whole."""
        places = self._published(generation).places
        if tensor not in places:
            raise SourceError(f"tensor {tensor} is not on this device", hint="ask the device that holds it")
        return self.device.download(places[tensor])

    def tensors(self, generation: int) -> list[int]:
        """The tensors that `fetch` gives. Raises SourceError as that does."""
        return list(self._published(generation).places)

    def _holdings(self, generation: int) -> Holdings:
        return self._generations[generation].marks.holdings() if generation in self._generations else Holdings()

    def _published(self, generation: int) -> Generation:
        """A generation, unless it is still being made: then it is not known to anybody but a device given up."""
        found = self._generations.get(generation)
        if found is None or not found.closed:
            raise SourceError(f"generation {generation} is not whole on this device", hint="ask for the newest")
        return found

    @property
    def _kept_bytes(self) -> int:
        """Generations, which may share blocks, and what is kept to refine tensors."""
        blocks = {id(block): block.layout.nbytes for g in self._generations.values() for block in g.blocks}
        states = sorted((self._state_bytes[tensor] for tensor in self._tensors), reverse=True)
        return sum(blocks.values()) + sum(states) + sum(states[: self._spare_states])

    def _check_room(self, more: int) -> None:
        """Before a generation is allocated, and so before anything of it is read."""
        turn = self._largest_turn_nbytes()
        if self._kept_bytes + more + turn > self.limit_bytes:
            raise CapacityError(
                f"a generation takes {more} bytes of the device, what is there already and what is kept to refine it "
                f"{self._kept_bytes}, decoding {turn}: more than {self.limit_bytes}",
                hint=self._lack_hint,
            )

    def _open(self, generation: int) -> tuple[Any, Marks]:
        if generation not in self._generations:
            self._generations[generation] = self._make_generation(generation)
        stateful = {t: a for t, a in self._accumulators.items() if a.needs_finalize}
        self._before = self._before | stateful if generation == self._making + 1 else {}
        return self._generations[generation], self._generations[generation].marks

    def _make_generation(self, number: int) -> Generation:
        """A generation of which nothing is there yet."""
        return Generation(self._no_marks())

    def _no_marks(self) -> Marks:
        return Marks(self._manifest, np.zeros(Marks.nbytes(self._manifest), np.uint8))

    def _last_segment(self) -> Any:
        return self._generations[self._making - 1]

    def _place(self, segment: Any, tensor: int) -> Any:
        return segment.places[tensor]

    def _copy_bytes(self, content: Any, to: Any) -> None:
        self.device.copy(content, to)

    def _await_copies(self) -> None:
        self.device.synchronize()

    def _make_accumulator(self, tensor: int) -> Accumulator:
        out = device_view(self._place(self._opened(), tensor), self._manifest.tensors[tensor].spec)
        before = self._before.pop(tensor, None)
        with self.device.shared():  # all threads use it, on streams of their own
            return self._begin_accumulator(tensor, out) if before is None else self._take_over(before, tensor, out)

    def _begin_accumulator(self, tensor: int, out: Any) -> Accumulator:
        return make_device_accumulator(
            self._manifest.tensors[tensor].spec, self._manifest.codecs[tensor], out, self.device
        )

    def _take_over(self, before: Accumulator, tensor: int, out: Any) -> Accumulator:
        """The state of the last generation goes on in a new tensor: the merge law."""
        accumulator = self._begin_accumulator(tensor, out)
        accumulator.combine(before)
        return accumulator
