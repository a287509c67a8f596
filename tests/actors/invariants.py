"""What must hold after every event of a simulated schedule, each under the name that its failure starts with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holoray.actors.goals import Goal, goals
from holoray.actors.messages import Assign, Command, Event, Kind, Publish, Slot
from holoray.errors import IntegrityError
from holoray.pipelines.ledger import QualityLedger

if TYPE_CHECKING:
    from simulator import Simulation

Segment = dict[Slot, frozenset[int]]
GARBAGE = frozenset({-1})
HOME = "n0"


def slots_of(task: Assign) -> tuple[Slot, ...]:
    """The slots that a task writes."""
    return task.slots + tuple((u.tensor, u.slot) for u in task.units)


class Invariants:
    """Checks one simulation, from what truly lies in its segments."""

    def __init__(self, simulation: Simulation) -> None:
        self._world = simulation
        self._goals = goals(simulation.manifest, simulation.qualities)
        self._whole = [_contents(goal) for goal in self._goals]
        self._excused: set[Slot] = set()
        self._largest = max(unit.stored_bytes for goal in self._goals for unit in goal.whole.values())

    def _wanted(self, generation: int) -> Segment:
        """What the segment of a generation is to hold: what it is to hold without losses, less what cannot be read.

        Where that depends on who tried, what the brain says that is left.
        """
        world, whole = self._world, self._whole[generation - 1]
        if world.faults.rotten:
            left = _contents(world.brain._goals[generation - 1])
            assert left.keys() == whole.keys()
            assert all(content <= whole[slot] for slot, content in left.items()), "goals: more than was wanted"
            return left
        return (
            {slot: self._readable(slot, content) for slot, content in whole.items()} if world.sources.skips else whole
        )

    def _readable(self, slot: Slot, content: frozenset[int]) -> frozenset[int]:
        layers = [f.index for f in self._world.memory.chain(slot) if f.index in content]
        bad = (place for place, index in enumerate(layers) if (slot[0], index) in self._world.sources.corrupt)
        return frozenset(layers[: next(bad, len(layers))])

    def excuse(self, task: Assign) -> None:
        """A task whose answer will never be heard: its slots may be done again, though they may be done."""
        self._excused.update(slots_of(task))

    # -- after every event ---------------------------------------------------------------------------------

    def after(self, event: Event, commands: list[Command]) -> None:
        world = self._world
        bound = (world.policy.in_flight + 2) * (len(world.workers) + 1)
        assert len(commands) <= bound, f"no spin: {len(commands)} commands after {event}"

    def always(self) -> None:
        self._in_flight_is_bounded()
        self._generations_only_go_up()
        self._belief_is_true()
        self._the_stopped_are_found()

    def _in_flight_is_bounded(self) -> None:
        world = self._world
        limit = max(world.policy.batch_bytes, self._largest)
        for name, tasks in world.awaited.items():
            assert len(tasks) <= world.policy.in_flight, f"in flight: {name} has {len(tasks)} tasks"
            nbytes = sum(unit.stored_bytes for task in tasks.values() for unit in task.units)
            assert nbytes <= world.policy.in_flight * limit, f"in flight: {name} has {nbytes} bytes"

    def _generations_only_go_up(self) -> None:
        published = self._world.published
        assert [p.generation for p in published] == list(range(1, len(published) + 1)), "generations: a gap"
        ratios = [p.quality.ratio for p in published]
        assert ratios == sorted(ratios), f"generations: quality fell: {ratios}"

    def _belief_is_true(self) -> None:
        """Nothing is lost: whatever the brain takes for held is there, whole, and what the goal wants."""
        world = self._world
        if world.brain.done or world.brain._awaited is not None:
            return
        generation = world.brain.generation
        making, before = self._wanted(generation), self._wanted(generation - 1) if generation > 1 else {}
        for name, node in world.brain._nodes.items():
            if name not in world.segments or not node.known or not self._has_heard(name):
                continue
            segment = world.segments[name].get(generation, {})
            for slot in node.have:
                assert segment.get(slot) == making[slot], f"belief: {slot} on {name} is not held"
            last = world.segments[name].get(generation - 1, {})
            for slot in node.base:
                assert last.get(slot) == before[slot], f"belief: {slot} of the last generation is not on {name}"

    def _has_heard(self, name: str) -> bool:
        """Whether a node knows its shard: before, it may hold what is another's by now, and give that up any moment."""
        brain = self._world.brain
        return brain._shards is None or brain._nodes[name].shard == brain._shards.of_node(name)

    def _the_stopped_are_found(self) -> None:
        """Long before the deadline of a task: in the bound of silence, a tick, and what was still on its way."""
        world = self._world
        for name in world.brain._workers:
            since = world.workers[name].stopped
            if since is not None and world.workers[name].alive:
                silent = world.now - max(since, world.enthroned)
                assert silent <= world.policy.silence_s + 8.0, f"silence: {name} is stopped for {silent:.1f} s"

    # -- of commands ------------------------------------------------------------------------------------------

    def of_assignment(self, task: Assign) -> None:
        world = self._world
        node = world.workers[task.worker].node
        assert task.generation == world.brain.generation, "generations: a task of another one"
        slots = set(slots_of(task))
        for tasks in world.awaited.values():
            for other in tasks.values():
                if task.kind is Kind.INGEST or world.workers[other.worker].node == node:
                    assert not slots & set(slots_of(other)), "one writer: one slot, two workers"
        for name, state in world.brain._nodes.items():
            if (task.kind is Kind.INGEST or name == node) and self._has_heard(name):
                assert not slots & state.have, "nothing twice: a slot is done again"
        if world.shards:
            told = world.told[node].tensors if node in world.told else frozenset()
            assert {tensor for tensor, _ in slots} <= told, f"homes: {node} was not told to hold this"
        if task.kind is Kind.INGEST:
            self._is_needed(task)
        if task.group is not None:
            own = {s for s, rank in zip(task.group.slots, task.group.owners, strict=True) if rank == task.rank}
            assert own <= world.brain._nodes[node].have, f"group: {node} is to contribute what it does not hold"
            assert slots | own <= set(task.group.slots), f"group: {node} is to take what nobody contributes"

    def _is_needed(self, task: Assign) -> None:
        """Nothing is read that a surveyed node holds, also after a coordinator died; unless an answer was lost."""
        world = self._world
        wanted, whole = self._wanted(task.generation), self._whole[task.generation - 1]
        known = {name for name, node in world.brain._nodes.items() if node.known and self._has_heard(name)}
        for name in known & set(world.segments):
            segment = world.segments[name].get(task.generation, {})
            for slot in filter(world.brain._nodes[name].takes, set(slots_of(task)) - self._excused):
                if wanted[slot] == whole[slot]:  # else others may try once more, and nobody knows of a loss from others
                    assert segment.get(slot) != whole[slot], f"nothing twice: {slot} is read, but {name} holds it"

    def of_publication(self, publication: Publish) -> None:
        """Quality is that of what lies where consumers are, and every node has the same there."""
        world = self._world
        if world.shards:
            self._is_whole_in_parts(publication)
            return
        nodes = {worker.node for worker in world.brain._workers.values()}
        homes = nodes if world.devices else {HOME}
        assert not world.devices or len(nodes) >= world.expected, "whole: a device has nothing"
        for home in homes & set(world.segments):
            self._is_told(publication, world.segments[home].get(publication.generation, {}))
        self._is_whole(publication.generation, (nodes | homes) & set(world.segments))

    def _is_whole_in_parts(self, publication: Publish) -> None:
        """Each tensor has one home, which has it wholly and nothing else; quality is that of all homes together."""
        world, generation = self._world, publication.generation
        wanted = self._wanted(generation)
        union: Segment = {}
        for name, node in world.brain._nodes.items():
            own = {slot: content for slot, content in wanted.items() if node.takes(slot)}
            assert not union.keys() & own.keys(), "homes: a tensor has two"
            if name in world.segments:  # else it died since, and nobody has noticed yet
                found = world.segments[name].get(generation, {})
                assert node.shard == world.told[name], f"homes: {name} holds something else"
                assert found == own, f"whole: generation {generation} on {name}"
                stateful = {t for t, _ in own if world.manifest.tensors[t].codec == "spectral"}
                assert stateful <= world.sealed.get((name, generation), set()), f"whole: {name} is not sealed"
            union |= own
        assert union == wanted, "homes: a tensor has none"
        self._is_told(publication, union)

    def _is_published(self, error: IntegrityError) -> None:
        """What nobody can read any more is among what the consumer was told to have."""
        world = self._world
        tensor = next(t for t, entry in enumerate(world.manifest.tensors) if entry.name == error.tensor)
        told = _contents(world.brain._goals[max(len(world.published), world.brain.generation - 1) - 1])
        assert any(t == tensor and error.fragment in content for (t, _), content in told.items()), "gave up for nothing"

    def _is_told(self, publication: Publish, segment: Segment) -> None:
        ledger = QualityLedger(self._world.manifest.tensors)
        for (tensor, _), content in segment.items():
            for index in content:
                ledger.add(tensor, index)
        assert publication.quality.ratio <= ledger.quality.ratio + 1e-12, "quality: overstated"
        assert publication.quality.complete == ledger.quality.complete, "quality: complete is not"
        told = [p.quality.ratio for p in self._world.published if p.generation == publication.generation]
        assert publication.quality.ratio >= max(told, default=0.0), "quality: less than the consumer was told"

    def _is_whole(self, generation: int, nodes: set[str]) -> None:
        world = self._world
        wanted = self._wanted(generation)
        stateful = {t for t, _ in wanted if world.manifest.tensors[t].codec == "spectral"}
        for node in nodes:
            segment = world.segments[node].get(generation, {})
            assert segment == wanted, f"whole: generation {generation} on {node}"
            assert stateful <= world.sealed.get((node, generation), set()), f"whole: {node} is not sealed"

    def at_the_end(self) -> None:
        """The end state is that of a run without faults, whatever happened; and it came."""
        world = self._world
        if world.faults.rotten and isinstance(world.gave_up, IntegrityError) and world.gave_up.fragment is not None:
            self._is_published(world.gave_up)
            return
        assert world.gave_up is None, f"progress: gave up: {world.gave_up}"
        assert world.published[-1].final, "progress: ended before the last generation"
        assert len(world.published) == len(self._goals), "progress: a generation is missing"
        if not world.devices:  # which may have died since: what they held was checked when it was published
            self._is_whole(len(self._goals), {HOME})


def _contents(goal: Goal) -> Segment:
    """Of each slot the layers below those wanted, and these."""
    return {slot: frozenset(f.index for f in unit.fragments) for slot, unit in goal.whole.items()}
