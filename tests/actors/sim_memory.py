"""What simulated nodes hold: segments as {slot: fragments in it}, and what a task does to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from invariants import GARBAGE, Segment, slots_of

from holoray.actors.messages import Assign, Holdings, Kind, Shard, Slot, Survey
from holoray.fragment import FragmentEntry
from holoray.pipelines.curve import Key

if TYPE_CHECKING:
    from simulator import Simulation


class SimMemory:
    """Segments by node and generation, what is sealed there, and what each device knows that it is to hold."""

    def __init__(self, world: Simulation) -> None:
        self._world = world
        self.segments: dict[str, dict[int, Segment]] = {}
        self.sealed: dict[tuple[str, int], set[int]] = {}
        self.told: dict[str, Shard] = {}
        self._marks: dict[tuple[str, int, Slot], int] = {}
        """How many fragments a node's mark says that a slot of a generation holds."""
        self._taken_away: dict[str, Segment] = {}
        """What the task under way on a device goes on from."""

    def write_garbage(self, node: str, task: Assign) -> None:
        if task.kind is Kind.SURVEY:
            return
        if task.generation <= len(self._world.published):
            held = self.segments[node].get(task.generation, {})
            ready = [slot for slot in slots_of(task) if held.get(slot, GARBAGE) != GARBAGE]
            assert not ready, f"in hand: the consumer still looks at what is written: {ready}"
        if self._world.in_place:
            assert self._world.handed >= task.generation - 1, "in place: the consumer still looks at what is written"
            if task.kind is Kind.CARRY:
                return
        segment = self.segments[node].setdefault(task.generation, {})
        for slot in slots_of(task):
            segment[slot] = GARBAGE
        if self._world.in_place:
            last = self.segments[node].get(task.generation - 1, {})
            self._taken_away[node] = {slot: last.pop(slot) for slot in slots_of(task) if slot in last}
        self.sealed.setdefault((node, task.generation), set()).difference_update(task.tensors)

    def apply(self, worker: str, task: Assign) -> frozenset[Key]:
        """Returns what the worker could not read."""
        node, missed = self._world.workers[worker].node, set[Key]()
        segment = self.segments[node].setdefault(task.generation, {})
        last = self.segments[node].get(task.generation - 1, {})
        if self._world.in_place and task.kind is not Kind.CARRY:
            last = self._taken_away.pop(node)
        for unit in task.units:
            self._world.ingested_bytes += unit.stored_bytes
            slot, layers = (unit.tensor, unit.slot), unit.fragments[0].layer
            below = frozenset(f.index for f in self.chain(slot)[:layers])
            if layers:
                assert last.get(slot) == below, f"base: refined {last.get(slot)} with layer {layers}"
            missed |= self._world.sources.missed(worker, unit)
            segment[slot] = below | {f.index for f in unit.fragments if (unit.tensor, f.index) not in missed}
            self._marks[node, task.generation, slot] = len(segment[slot])
        if task.kind is Kind.CARRY:
            self.receive(node, task, {slot: last[slot] if count else frozenset() for slot, count in task.held.items()})
        elif task.kind is Kind.TRANSFER:
            source = self.segments[self._world.workers[task.source].node][task.generation]
            self.receive(node, task, {slot: source[slot] for slot in task.slots})
        self.sealed.setdefault((node, task.generation), set()).update(task.tensors)
        return frozenset(missed)

    def receive(self, node: str, task: Assign, contents: Segment) -> None:
        """These slots arrive, and are marked to be as full as the task says."""
        self.segments[node][task.generation].update(contents)
        self._marks.update({(node, task.generation, slot): task.held[slot] for slot in contents})

    def survey(self, node: str, generation: int) -> Survey:
        for old in [g for g in self.segments[node] if g < generation - 1]:
            assert old < self._world.returned, "in hand: the consumer still looks at what is removed"
            del self.segments[node][old]
        return Survey(self._holdings(node, generation - 1), self._holdings(node, generation), self.told.get(node))

    def settle(self, node: str, shard: Shard, generation: int) -> None:
        """Who is to hold less than before begins anew."""
        before = self.told.get(node)
        self.told[node] = shard
        if before is not None and not before.tensors <= shard.tensors:
            for number in (generation - 1, generation):
                self.segments[node].pop(number, None)
                self.sealed.pop((node, number), None)

    def _holdings(self, node: str, generation: int) -> Holdings:
        segment = self.segments[node].get(generation, {})
        whole = [slot for slot, content in segment.items() if content != GARBAGE]
        counts = {slot: self._marks[node, generation, slot] for slot in whole}
        return Holdings(counts, frozenset(self.sealed.get((node, generation), ())))

    def chain(self, slot: Slot) -> list[FragmentEntry]:
        """Fragments of a slot in the order of their layers."""
        fragments = self._world.manifest.tensors[slot[0]].fragments
        return sorted((f for f in fragments if f.slot == slot[1]), key=lambda f: f.layer)
