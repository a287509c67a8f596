"""What must hold after every event of a simulated schedule, each under the name that its failure starts with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holoray.actors.goals import Goal, goals
from holoray.actors.messages import Assign, Command, Event, Kind, Publish, Slot
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
        self._wanted = [_contents(goal, simulation) for goal in self._goals]
        self._excused: set[Slot] = set()
        self._largest = max(unit.stored_bytes for goal in self._goals for unit in goal.whole.values())

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
        for name, node in world.brain._nodes.items():
            if name not in world.segments or not node.known or not self._has_heard(name):
                continue
            segment = world.segments[name].get(generation, {})
            for slot in node.have:
                assert segment.get(slot) == self._wanted[generation - 1][slot], f"belief: {slot} on {name} is not held"
            last = world.segments[name].get(generation - 1, {})
            for slot in node.base:
                wanted = self._wanted[generation - 2][slot]
                assert last.get(slot) == wanted, f"belief: {slot} of the last generation is not on {name}"

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
        known = {name for name, node in world.brain._nodes.items() if node.known and self._has_heard(name)}
        for name in known & set(world.segments):
            segment = world.segments[name].get(task.generation, {})
            for slot in filter(world.brain._nodes[name].takes, set(slots_of(task)) - self._excused):
                assert segment.get(slot, GARBAGE) == GARBAGE, f"nothing twice: {slot} is read, but {name} holds it"

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
        wanted = self._wanted[generation - 1]
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

    def _is_told(self, publication: Publish, segment: Segment) -> None:
        ledger = QualityLedger(self._world.manifest.tensors)
        for (tensor, _), content in segment.items():
            for index in content:
                ledger.add(tensor, index)
        assert publication.quality.ratio <= ledger.quality.ratio + 1e-12, "quality: overstated"
        assert publication.quality.complete == ledger.quality.complete, "quality: complete is not"

    def _is_whole(self, generation: int, nodes: set[str]) -> None:
        world = self._world
        wanted = self._wanted[generation - 1]
        stateful = {t for t, _ in wanted if world.manifest.tensors[t].codec == "spectral"}
        for node in nodes:
            segment = world.segments[node].get(generation, {})
            assert segment == wanted, f"whole: generation {generation} on {node}"
            assert stateful <= world.sealed.get((node, generation), set()), f"whole: {node} is not sealed"

    def at_the_end(self) -> None:
        """The end state is that of a run without faults, whatever happened; and it came."""
        world = self._world
        assert world.gave_up is None, f"progress: gave up: {world.gave_up}"
        assert world.published[-1].final, "progress: ended before the last generation"
        assert len(world.published) == len(self._goals), "progress: a generation is missing"
        if not world.devices:  # which may have died since: what they held was checked when it was published
            self._is_whole(len(self._goals), {HOME})


def _contents(goal: Goal, world: Simulation) -> Segment:
    """What the segment of a generation is to hold: of each slot the layers below those wanted, and these."""
    return {slot: frozenset(f.index for f in unit.fragments) for slot, unit in goal.whole.items()}
