"""The brain of a warm-up: events in, commands out. No Ray, no I/O, no clock, no randomness.

A generation goes through five phases. What is left to do is always derived from what the nodes hold (`todo.py`), so a
loss at any moment only means that the derivation finds more to do:

    SURVEY    a node that gets its first worker says what its segments hold: nothing, or what others left there
    INGEST    every slot with new fragments is done by some worker, once, all its layers by that one
    COMBINE   every node gets what it lacks: unchanged slots from its last generation, others from its peers; devices
              exchange all of them in one sum, unless that failed once in this generation
    SEAL      every node turns accumulated state into tensors where a codec needs that
    PUBLISH   the generation is whole on every node; the next starts when the consumer has taken it

Whoever redoes a slot overwrites it wholly, so a lost worker costs only its unfinished tasks, and a lost node only
the slots that no other node holds. Workers pull: each has at most two tasks, and gets the next on an answer.

A brain that follows a dead one first musters the workers that are left: it plans nothing until each has joined, and
has thereby ended what the dead one asked of it, or is lost. Surveys then tell what need not be done again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from holoray.actors.goals import count_with, cut, goals
from holoray.actors.losses import Losses
from holoray.actors.messages import (
    Abort,
    Assign,
    Command,
    Event,
    GiveUp,
    Group,
    Kind,
    NodeLost,
    Publish,
    Pulse,
    Restart,
    Retire,
    Survey,
    Taken,
    TaskDone,
    TaskFailed,
    Tick,
    WorkerJoined,
    WorkerLost,
)
from holoray.actors.placement import Placement, Shards
from holoray.actors.roster import ANYWHERE, Node, Policy, Task, Worker, slots_of
from holoray.actors.todo import Todo, held_anywhere
from holoray.actors.waiting import Waiting
from holoray.errors import HolorayError, IntegrityError, SourceError, WorkerLostError
from holoray.manifest import Manifest
from holoray.pipelines.curve import Key
from holoray.pipelines.ledger import QualityLedger
from holoray.pipelines.plan import Unit


class Brain:
    """Warms a manifest up through target qualities on workers that come and go.

    `home` is the node of the consumer: no generation is published before that node holds it. Without one, consumers
    are on all nodes, and `expected` of these must hold it. `expected` is also the number of workers that batches are
    cut for. `collective`: nodes are devices, which can combine all at once. `placement`: what is to be on each node;
    one with a shard goes with its worker. `in_place`: who begins to write a slot has it of the last generation no more.
    `losses`: what may be missing in the end. `reign` counts brains. After a dead one: `taken` is the generation that
    the consumer has in hand, `muster` the workers who may still be busy, each with its node, `fallen` the dead of each.
    """

    def __init__(
        self,
        manifest: Manifest,
        qualities: Sequence[float],
        *,
        home: str | None,
        expected: int,
        collective: bool = False,
        placement: Placement | None = None,
        in_place: bool = False,
        losses: Losses | None = None,
        reign: int = 1,
        policy: Policy | None = None,
        taken: int = 0,
        muster: Mapping[str, str] | None = None,
        fallen: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.policy = policy or Policy()
        self.home = home
        self._collective, self._in_place = collective, in_place
        self._broken: set[int] = set()
        """Groups of this generation that failed."""
        self.generation = taken + 1
        self.inherited_bytes = 0
        """Stored bytes of the first generation's new fragments that a dead brain had seen to."""
        self._manifest = manifest
        self._expected = max(expected, 1)
        self._shards: Shards | None = None
        if placement is not None and placement.is_sharded:
            self._shards = Shards.of(manifest, self._expected, placement, reign)
        self._losses = losses or Losses()
        self._goals = cut(manifest, goals(manifest, qualities, skip_lost=self._losses.skips), self._losses.lost)
        self._ledger = QualityLedger(manifest.tensors)
        for goal in self._goals[:taken]:
            self._count(goal.new)
        self.done = taken >= len(self._goals)
        """Nothing more will be said: everything is published and taken, or it gave up."""
        if not self.done:
            self._todo = self._make_todo()
        self._resumes = muster is not None
        self._muster = {name: Worker(node, ingests=False, heard=0.0) for name, node in (muster or {}).items()}
        self._fallen = {node: list(names) for node, names in (fallen or {}).items()}
        seen_to = [] if home is None else [home]
        self._unseen = {*seen_to, *(muster or {}).values(), *self._fallen} if self._resumes else set()
        self._began: float | None = None
        self._workers: dict[str, Worker] = {}
        self._nodes: dict[str, Node] = {}
        self._waiting = Waiting(self._nodes, self._workers)
        self._lost: set[str] = set()
        self._awaited: int | None = None
        self._epoch = 0
        self._restarts = 0
        self._lonely_since: float | None = None
        self._lonely_with_some = False
        """Since then there are devices, and it is a shard for which nobody comes."""
        self._now = self._ticked = 0.0
        self._said: list[Command] = []

    def handle(self, event: Event) -> list[Command]:
        """Take one event in; returns what is to be done now, in order."""
        self._now = max(self._now, event.now)
        self._said = []
        if not self.done:
            self._hear(event)
            self._advance()
        return self._said

    @property
    def tensors(self) -> int:
        """How many tensors are warmed up."""
        return len(self._manifest.tensors)

    # -- events -----------------------------------------------------------------------------------------------

    def _hear(self, event: Event) -> None:
        match event:
            case WorkerJoined(worker=worker, node=node, ingests=ingests):
                self._join(worker, node, ingests)
            case WorkerLost(worker=worker):
                self._lose(worker)
            case NodeLost(node=node):
                for worker in [w for w, state in (self._muster | self._workers).items() if state.node == node]:
                    self._lose(worker)
                self._forget(node)
                self._unseen.discard(node)
            case Pulse(worker=worker):
                self._heard(worker)
            case TaskDone(worker=worker, epoch=epoch, survey=survey, missed=missed):
                task = self._land(worker, epoch)
                if task is not None:
                    left = self._miss(task, worker, missed) if missed else task
                    self._note(left, self._nodes[self._workers[worker].node], survey)
            case TaskFailed(worker=worker, epoch=epoch, error=error):
                task = self._land(worker, epoch)
                if task is not None:
                    self._retry(task, worker, error)
            case Taken(generation=generation):
                if generation == self._awaited:
                    self._turn_to_next()
            case Tick():
                self._look_at_deadlines()

    def _join(self, worker: str, node: str, ingests: bool) -> None:
        if worker in self._workers or worker in self._lost:
            return
        self._muster.pop(worker, None)
        state = self._nodes.setdefault(node, Node())
        if not self._crew(node):
            state.known, state.alone_since = False, None
            state.queue.append(Task(Kind.SURVEY, node))
        self._workers[worker] = Worker(node, ingests, self._now)

    def _heard(self, worker: str) -> None:
        state = self._workers.get(worker) or self._muster.get(worker)
        if state is not None:
            state.heard = self._now

    def _land(self, worker: str, epoch: int) -> Task | None:
        """The task that this answer is about, or None for a stale one."""
        self._heard(worker)
        state = self._workers.get(worker)
        if state is None or epoch not in state.flying:
            return None
        return state.flying.pop(epoch)[0]

    def _note(self, task: Task, node: Node, survey: Survey | None) -> None:
        if task.kind is Kind.SURVEY:
            found = survey or Survey()
            self._todo.learn(node, found)
            if self._shards is not None:
                self._shards.claim(task.node, found.shard)
            self._unseen.discard(task.node)
            self._waiting.skip(node.have)
            self._waiting.drop_vain()
            return
        self._restarts = 0
        node.have.update(task.slots, slots_of(task.units))
        if task.kind is Kind.SEAL:
            node.sealed.update(task.tensors)
            node.closed = True

    def _retry(self, task: Task, worker: str, error: Exception) -> None:
        """Queue a task again, at the front; or give up: after some tries, or at once where trying is vain."""
        if task.group is not None:
            self._break_up(task.group, error)
            if worker in self._workers:  # some buckets may have arrived before
                self._nodes[task.node].queue.append(Task(Kind.SURVEY, task.node))
            return
        transient = isinstance(error, SourceError | IntegrityError | WorkerLostError)
        if not transient or task.attempts + 1 >= self.policy.max_attempts:
            self._give_up(error)
            return
        self._requeue(replace(task, attempts=task.attempts + 1, failed_on=worker))

    def _requeue(self, again: Task) -> None:
        if again.node == ANYWHERE:  # a survey may have found its slots while they were under way
            again = again.without(held_anywhere(self._nodes.values()))
        if again.kind is not Kind.INGEST:
            self._waiting.put_first(again)
            return
        nodes = self._nodes.values() if again.node == ANYWHERE else [self._nodes[again.node]]
        for part in self._todo.again(again, nodes):
            self._waiting.put_first(part)

    def _miss(self, task: Task, worker: str, missed: Collection[Key]) -> Task:
        """What is done of a task whose worker can have some fragments from nowhere.

        Another worker, whose sources may be others, tries once as well; then all go on without them.
        """
        holes = {(t, self._manifest.tensors[t].fragments[index].slot) for t, index in missed}
        if task.node == ANYWHERE and not task.missed and self._has_ingesting(but=worker):
            again = tuple(unit for unit in task.units if (unit.tensor, unit.slot) in holes)
            self._requeue(replace(task, units=again, failed_on=worker, missed=True))
            return task.without(holes)
        try:
            self._goals = self._losses.cut(self._manifest, self._goals, missed, self.generation - 1)
        except HolorayError as error:
            self._give_up(error)
        self._todo = self._make_todo()
        return task

    def _break_up(self, group: Group, error: Exception) -> None:
        """The rest of a group would wait in vain; slots travel one by one for the rest of this generation."""
        if not isinstance(error, HolorayError):
            self._give_up(error)
        if group.number in self._broken:
            return
        self._broken.add(group.number)
        for name, worker in self._workers.items():
            if any(task.group is not None for task, _ in worker.flying.values()):
                self._say(Abort(name, group.number))

    def _turn_to_next(self) -> None:
        self._awaited = None
        self._broken.clear()
        if self.generation > 1:
            for worker in self._workers:
                self._say(Retire(worker, self.generation - 1))
        if self.generation == len(self._goals):
            self.done = True
            return
        self.generation += 1
        self._todo = self._make_todo()

    def _make_todo(self) -> Todo:
        number = self.generation - 1
        last = self._goals[number - 1] if number else None
        return Todo(self._manifest, self._goals[number], last, self.policy, self._expected)

    # -- losses -----------------------------------------------------------------------------------------------

    def _lose(self, worker: str) -> None:
        if worker in self._lost:
            return
        self._lost.add(worker)
        state = self._workers.pop(worker, None) or self._muster.pop(worker, None)
        if state is not None:
            self._fallen.setdefault(state.node, []).append(worker)
            for task, _ in reversed(list(state.flying.values())):
                self._retry(task, worker, WorkerLostError(f"a worker died {task.attempts + 1} times over one task"))
            if state.node in self._nodes and not self._crew(state.node):
                self._leave_alone(state.node)
        self._restarts += 1
        if self._restarts <= self.policy.max_restarts:
            self._say(Restart(worker))
        elif not self._has_ingesting():
            self._give_up(_no_workers(f"all workers died, {self._restarts} in a row"))

    def _leave_alone(self, name: str) -> None:
        """What the last worker leaves behind is still there, for some time; the next one surveys it."""
        if self._shards is not None:  # on a device nothing outlives it
            self._forget(name)
            return
        node = self._nodes[name]
        node.known, node.alone_since = False, self._now
        node.queue.clear()

    def _forget(self, node: str) -> None:
        """What a node held is gone."""
        if self._nodes.pop(node, None) is not None:
            self._waiting.drop_vain()
        if self._shards is not None:
            self._shards.vacate(node)

    def _look_at_deadlines(self) -> None:
        listened = self._now - self._ticked <= max(self.policy.silence_s / 2, 1.0)
        self._ticked = self._now
        if self._began is None:
            self._began = self._now
        for worker, state in list((self._muster | self._workers).items()):
            if not listened:  # who slept has not heard anybody
                state.heard = self._now
            begun = [since for _, since in state.flying.values()] or [self._now]
            if worker in self._muster:
                begun = [self._began]
            overdue = self._now - min(begun) > self.policy.task_timeout_s
            for task, since in list(state.flying.values()):
                if task.group is not None and self._now - since > self.policy.combine_timeout_s:
                    self._break_up(task.group, WorkerLostError("a group of devices did not combine in time"))
            if overdue or self._now - state.heard > self.policy.silence_s:
                self._lose(worker)
        for name, node in list(self._nodes.items()):
            alone = node.alone_since is not None and self._now - node.alone_since > self.policy.return_s
            if alone and name != self.home:  # which has the consumer, who guards it
                self._forget(name)
        if self._now - self._began > self.policy.return_s:
            peopled = {state.node for state in (self._muster | self._workers).values()}
            self._unseen &= {self.home or "", *peopled}
        self._look_for_help()

    def _look_for_help(self) -> None:
        manned = {state.node for state in self._workers.values()}
        if self._muster or (self._has_ingesting() and self._are_enough(manned)):
            self._lonely_since = None
        elif self._lonely_since is None or self._lonely_with_some != (self._shards is not None and bool(manned)):
            self._lonely_since = self._now
            self._lonely_with_some = self._shards is not None and bool(manned)
        elif self._now - self._lonely_since > self.policy.patience_s and not self._spread(manned):
            self._give_up(_no_workers(f"no worker could be had for {self.policy.patience_s:.0f} s"))

    def _spread(self, manned: Collection[str]) -> bool:
        """Let those that are left hold what a device was to hold that does not come; False if that is no way out."""
        if self._shards is None or not (self._unseen or self._shards.spread(manned)):
            return False
        self._lonely_since = None
        return True

    # -- what comes next --------------------------------------------------------------------------------------

    def _advance(self) -> None:
        while not self.done and self._awaited is None and not self._muster:
            self._dispatch()
            busy = len(self._waiting) > 0 or any(worker.flying for worker in self._workers.values())
            if (busy and self._shards is None) or not self._plan():
                return

    def _plan(self) -> bool:
        """Find what is left to do for this generation; returns False if only waiting helps."""
        if self._unseen:
            return False
        if self._resumes:
            self._resumes = False
            self.inherited_bytes = self._todo.new_bytes(held_anywhere(self._nodes.values()))
        if self._shards is not None:
            return self._plan_shards(self._shards)
        for task in self._todo.ingest(self._nodes.values()):
            self._waiting.put(task)
        if self._waiting:
            return True
        manned = {name: node for name, node in self._nodes.items() if self._crew(name)}
        if not self._are_enough(manned):
            return False
        together = self._collective and not self._broken and len(manned) > 1
        if self._plan_on(manned, (self._todo.combine(name, manned, together=together) for name in manned)):
            return True
        if together and self._plan_group(manned):
            return True
        if any(self._todo.lacking(node) for node in manned.values()):
            return False  # a node without a worker has it, and may come back
        if self._plan_on(manned, (self._todo.seal(name, node) for name, node in manned.items())):
            return True
        self._publish(manned)
        return True

    def _plan_shards(self, shards: Shards) -> bool:
        """Each idle node by itself; the generation is whole when all is held, and nobody has anything left to do."""
        busy = {worker.node for worker in self._workers.values() if worker.flying}
        idle = {name: node for name, node in self._nodes.items() if name not in busy and not node.queue}
        for name, node in idle.items():
            shards.seat(name)
            node.queue.extend(self._todo.alone(name, node, shards.of_node(name)))
        if any(node.queue for node in idle.values()):
            return True
        if len(idle) < len(self._nodes) or not shards.are_all_held:
            return False
        self._publish(self._nodes)
        return True

    def _plan_on(self, nodes: Mapping[str, Node], plans: Iterator[Iterator[Task]]) -> bool:
        for node, tasks in zip(nodes.values(), plans, strict=True):
            node.queue.extend(tasks)
        return any(node.queue for node in nodes.values())

    def _plan_group(self, nodes: Mapping[str, Node]) -> bool:
        """Ask all nodes, none of which is busy, to combine."""
        self._epoch += 1
        for task in self._todo.group(nodes, self._epoch):
            nodes[task.node].queue.append(task)
        return any(node.queue for node in nodes.values())

    def _publish(self, manned: Mapping[str, Node]) -> None:
        self._count(self._todo.goal.new)
        final = self.generation == len(self._goals)
        self._say(Publish(self.generation, self._ledger.quality, final, self._losses.lost))
        self._awaited = self.generation
        for name, node in self._nodes.items():
            node.base = node.have if name in manned else set()
            node.have, node.sealed, node.closed = set(), set(), False
            node.known = name in manned

    # -- giving work out --------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """One task a worker and round, the least busy first, so that a short queue is shared."""
        for depth in range(self.policy.in_flight):
            for name, worker in list(self._workers.items()):
                if len(worker.flying) <= depth and not self.done:
                    self._assign_next(name, worker)

    def _assign_next(self, name: str, worker: Worker) -> None:
        task = self._waiting.take(name)
        if task is None:
            return
        if self._in_place and task.kind is not Kind.CARRY:
            self._nodes[worker.node].base.difference_update(task.slots, slots_of(task.units))
        self._epoch += 1
        worker.flying[self._epoch] = (task, self._now)
        self._say(
            Assign(
                task.kind,
                name,
                self._epoch,
                self.generation,
                units=task.units,
                slots=task.slots,
                counts=tuple(count_with(self._todo.goal.whole[slot]) for slot in task.slots),
                tensors=task.tensors,
                source=self._busy_least(task.source) if task.kind is Kind.TRANSFER else "",
                fence=tuple(self._fallen.get(worker.node, ())),
                group=task.group,
                rank=task.rank,
                shard=task.shard,
            )
        )

    # -- small words ------------------------------------------------------------------------------------------

    def _crew(self, node: str) -> list[str]:
        return [name for name, worker in self._workers.items() if worker.node == node]

    def _are_enough(self, manned: Collection[str]) -> bool:
        """Whether these nodes, if they hold a generation, are those that must."""
        if self._shards is not None:
            return self._shards.are_enough(manned)
        return len(manned) >= self._expected if self.home is None else self.home in manned

    def _busy_least(self, node: str) -> str:
        return min(self._crew(node), key=lambda name: len(self._workers[name].flying))

    def _has_ingesting(self, but: str = "") -> bool:
        return any(worker.ingests for name, worker in self._workers.items() if name != but)

    def _count(self, units: Sequence[Unit]) -> None:
        for unit in units:
            for fragment in unit.fragments:
                self._ledger.add(unit.tensor, fragment.index)

    def _say(self, command: Command) -> None:
        if not self.done:
            self._said.append(command)

    def _give_up(self, error: Exception) -> None:
        self._say(GiveUp(error))
        self.done = True


def _no_workers(message: str) -> WorkerLostError:
    return WorkerLostError(message, hint="look for out-of-memory kills, and whether the cluster has free CPUs")
