"""Groups of simulated devices that combine: either all arrive and get every slot, or somebody's part fails.

Who waits for a member that failed or died learns of it by itself, is told (an abort), or gives up after a while.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from invariants import GARBAGE, Segment

from holoray.actors.messages import Assign
from holoray.errors import SourceError, WorkerLostError

if TYPE_CHECKING:
    from simulator import Simulation

Key = tuple[int, int]
OWN_DEADLINE_S = 25.0


class Meetings:
    """By reign and number of the group; `combined` and `broken` count what members went through."""

    def __init__(self, world: Simulation) -> None:
        self._world = world
        self._present: dict[Key, dict[int, tuple[str, Assign]]] = {}
        self._left: set[Key] = set()
        self._sent: dict[Key, Segment] = {}
        """What the members of a group have begun to exchange."""
        self._aborted: set[tuple[str, Key]] = set()
        self.combined = self.broken = 0

    def begin(self, name: str, task: Assign, reign: int) -> None:
        """A member has what it was asked; members are slow in different ways."""
        world = self._world
        world._at(world.rng.expovariate(2.0), lambda: self._arrive(name, task, reign))
        world._at(OWN_DEADLINE_S, lambda: self._fail(name, task, reign))

    def abort(self, name: str, key: Key) -> None:
        self._aborted.add((name, key))
        task = self._world.workers[name].busy
        if task is not None and task.group is not None and task.group.number == key[1]:
            self._fail(name, task, key[0])

    def _arrive(self, name: str, task: Assign, reign: int) -> None:
        world, group = self._world, task.group
        assert group is not None
        if not self._is_at(name, task):
            return
        key = reign, group.number
        if (name, key) in self._aborted or world.rng.random() < world.faults.failures:
            self._fail(name, task, reign)
            return
        present = self._present.setdefault(key, {})
        assert task.rank not in present, "group: two members of one rank"
        present[task.rank] = name, task
        if len(present) == group.size and all(world.workers[other].alive for other, _ in present.values()):
            contents = self._sent[key] = self._contents(present)
            for other, own in present.values():
                world._at(world.rng.expovariate(0.7), partial(self._end, other, own, reign, contents))

    def _contents(self, present: dict[int, tuple[str, Assign]]) -> Segment:
        """Every slot as its one contributor has it."""
        (_, task), *_ = present.values()
        assert task.group is not None
        contents: Segment = {}
        for slot, owner in zip(task.group.slots, task.group.owners, strict=True):
            node = self._world.workers[present[owner][0]].node
            contents[slot] = self._world.segments[node].get(task.generation, {}).get(slot, GARBAGE)
            assert contents[slot] != GARBAGE, f"group: {slot} is contributed by {node}, which does not hold it"
        return contents

    def _end(self, name: str, task: Assign, reign: int, contents: Segment) -> None:
        """The last bucket, unless another member left before and this one had not got all."""
        world = self._world
        assert task.group is not None
        key = reign, task.group.number
        if not self._is_at(name, task):
            return
        others = [other for other, _ in self._present[key].values()]
        lost = key in self._left or not all(world.workers[other].alive for other in others)
        if lost and world.rng.random() < 0.5:
            if world.rng.random() < 0.5:  # it notices; else it waits to be told
                world._at(world.rng.uniform(0, 5), lambda: self._fail(name, task, reign))
            return
        world.memory.receive(world.workers[name].node, task, {slot: contents[slot] for slot in task.slots})
        self.combined += 1
        world.answer_done(name, task, reign)

    def _fail(self, name: str, task: Assign, reign: int) -> None:
        if not self._is_at(name, task):
            return
        assert task.group is not None
        key = reign, task.group.number
        self._left.add(key)
        self.broken += 1
        if key in self._sent:  # some buckets were complete
            arrived = {slot: self._sent[key][slot] for slot in task.slots if self._world.rng.random() < 0.5}
            self._world.memory.receive(self._world.workers[name].node, task, arrived)
        fate = self._world.rng.random()
        self._world.answer_failed(
            name, task, reign, WorkerLostError("a peer is gone") if fate < 0.5 else SourceError("?")
        )

    def _is_at(self, name: str, task: Assign) -> bool:
        worker = self._world.workers[name]
        return worker.alive and worker.stopped is None and worker.busy is task
