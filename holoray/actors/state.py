"""The brain of a warm-up: events in, commands out. No Ray, no I/O, no clock, no randomness.

A generation goes through four phases. What is left to do is always derived from what the nodes hold, so a loss
at any moment only means that the derivation finds more to do:

    INGEST    every slot with new fragments is done by some worker, once, all its layers by that one
    COMBINE   every node gets what it lacks: unchanged slots from its last generation, others from its peers
    SEAL      every node turns accumulated state into tensors where a codec needs that
    PUBLISH   the generation is whole on every node; the next starts when the consumer has taken it

Whoever redoes a slot overwrites it wholly, so a lost worker costs only its unfinished tasks, and a lost node only
the slots that no other node holds. Workers pull: each has at most two tasks, and gets the next on an answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

from holoray.actors.goals import Goal, goals, needs_sealing
from holoray.actors.messages import (
    Assign,
    Command,
    Event,
    GiveUp,
    Kind,
    NodeLost,
    Publish,
    Restart,
    Retire,
    Slot,
    Taken,
    TaskDone,
    TaskFailed,
    Tick,
    WorkerJoined,
    WorkerLost,
)
from holoray.actors.roster import ANYWHERE, Node, Policy, Task, Worker, cut
from holoray.errors import IntegrityError, SourceError, WorkerLostError
from holoray.manifest import Manifest
from holoray.pipelines.ledger import QualityLedger
from holoray.pipelines.plan import Unit, batches


class Brain:
    """Warms a manifest up through target qualities on workers that come and go.

    `home` is the node of the consumer: no generation is published before that node holds it. `expected` is the
    number of workers that batches are cut for.
    """

    def __init__(
        self,
        manifest: Manifest,
        qualities: Sequence[float],
        *,
        home: str,
        expected: int,
        policy: Policy | None = None,
        first_generation: int = 1,
    ) -> None:
        self.policy = policy or Policy()
        self.home = home
        self.expected = max(expected, 1)
        self.generation = first_generation
        self.done = False
        """Nothing more will be said: everything is published and taken, or it gave up."""
        self._first = first_generation
        self._manifest = manifest
        self._goals = deque(goals(manifest, qualities))
        self._goal: Goal | None = None
        self._changed: dict[Slot, Unit] = {}
        self._ledger = QualityLedger(manifest.tensors)
        self._stateful: list[int] = []
        self._slot_bytes = [_slot_bytes(manifest, t) for t in range(len(manifest.tensors))]
        self._workers: dict[str, Worker] = {}
        self._nodes: dict[str, Node] = {}
        self._queue: deque[Task] = deque()
        self._lost: set[str] = set()
        self._fallen: dict[str, list[str]] = {}
        self._awaited: int | None = None
        self._epoch = 0
        self._restarts = 0
        self._lonely_since: float | None = None
        self._now = 0.0
        self._said: list[Command] = []

    def handle(self, event: Event) -> list[Command]:
        """Take one event in; returns what is to be done now, in order."""
        self._now = max(self._now, event.now)
        self._said = []
        if not self.done:
            self._hear(event)
            self._advance()
        return self._said

    # -- events -----------------------------------------------------------------------------------------------

    def _hear(self, event: Event) -> None:
        match event:
            case WorkerJoined(worker=worker, node=node, ingests=ingests):
                if worker not in self._workers and worker not in self._lost:
                    self._workers[worker] = Worker(node, ingests)
                    self._nodes.setdefault(node, Node())
            case WorkerLost(worker=worker):
                self._lose(worker)
            case NodeLost(node=node):
                for worker in [w for w, state in self._workers.items() if state.node == node]:
                    self._lose(worker)
                self._nodes.pop(node, None)
            case TaskDone(worker=worker, epoch=epoch):
                task = self._land(worker, epoch)
                if task is not None:
                    self._restarts = 0
                    self._note(task, self._nodes[self._workers[worker].node])
            case TaskFailed(worker=worker, epoch=epoch, error=error):
                task = self._land(worker, epoch)
                if task is not None:
                    self._retry(task, worker, error)
            case Taken(generation=generation):
                if generation == self._awaited:
                    self._retire(generation - 1)
            case Tick():
                self._look_at_deadlines()

    def _land(self, worker: str, epoch: int) -> Task | None:
        """The task that this answer is about, or None for a stale one."""
        state = self._workers.get(worker)
        if state is None or epoch not in state.flying:
            return None
        return state.flying.pop(epoch)[0]

    def _note(self, task: Task, node: Node) -> None:
        node.have.update(task.slots)
        if task.kind is Kind.SEAL:
            node.sealed.update(task.tensors)
            node.closed = True

    def _lose(self, worker: str) -> None:
        if worker in self._lost:
            return
        self._lost.add(worker)
        state = self._workers.pop(worker, None)
        if state is not None:
            self._fallen.setdefault(state.node, []).append(worker)
            if state.node != self.home and not self._crew(state.node):
                # Who cleans up after dead jobs may remove what no process of ours guards; home has the consumer.
                del self._nodes[state.node]
            for task, _ in reversed(list(state.flying.values())):
                self._retry(task, worker, WorkerLostError(f"a worker died {task.attempts + 1} times over one task"))
        self._restarts += 1
        if self._restarts <= self.policy.max_restarts:
            self._say(Restart(worker))
        elif not self._has_ingesting():
            self._give_up(_no_workers(f"all workers died, {self._restarts} in a row"))

    def _retry(self, task: Task, worker: str, error: Exception) -> None:
        """Queue a task again, at the front; or give up: after some tries, or at once where trying is vain."""
        transient = isinstance(error, SourceError | IntegrityError | WorkerLostError)
        if not transient or task.attempts + 1 >= self.policy.max_attempts:
            self._give_up(error)
            return
        again = replace(task, attempts=task.attempts + 1, failed_on=worker)
        if task.kind is Kind.INGEST:
            self._queue.appendleft(again)
        elif task.node in self._nodes:
            self._nodes[task.node].queue.appendleft(again)

    def _retire(self, generation: int) -> None:
        self._awaited = None
        if generation >= self._first:
            for worker in self._workers:
                self._say(Retire(worker, generation))
        self.generation += 1
        self.done = not self._goals

    def _look_at_deadlines(self) -> None:
        for worker, state in list(self._workers.items()):
            if any(self._now - since > self.policy.task_timeout_s for _, since in state.flying.values()):
                self._lose(worker)
        if self._has_ingesting() and self._crew(self.home):
            self._lonely_since = None
        elif self._lonely_since is None:
            self._lonely_since = self._now
        elif self._now - self._lonely_since > self.policy.patience_s:
            self._give_up(_no_workers(f"no worker could be had for {self.policy.patience_s:.0f} s"))

    # -- what comes next --------------------------------------------------------------------------------------

    def _advance(self) -> None:
        while not self.done:
            self._dispatch()
            if self._awaited is not None or self._is_busy() or not self._plan():
                return

    def _is_busy(self) -> bool:
        queued = len(self._queue) + sum(len(node.queue) for node in self._nodes.values())
        return queued > 0 or any(worker.flying for worker in self._workers.values())

    def _plan(self) -> bool:
        """Find what is left to do for this generation; returns False if only waiting helps."""
        if self._goal is None:
            self._goal = self._goals.popleft()
            self._changed = {(u.tensor, u.slot): u for u in self._goal.new}
            self._stateful = sorted({t for t, _ in self._goal.whole if needs_sealing(self._manifest.codecs[t])})
        self._queue.extend(self._ingest_tasks())
        if self._queue:
            return True
        if not self._crew(self.home):
            return False
        for tasks in (self._combine_tasks, self._seal_tasks):
            for name, node in self._nodes.items():
                node.queue.extend(tasks(name, node))
            if any(node.queue for node in self._nodes.values()):
                return True
        self._publish()
        return True

    def _ingest_tasks(self) -> Iterator[Task]:
        """Slots that no node has: those with new fragments; all, where no node has the last generation."""
        assert self._goal is not None
        based = any(node.base for node in self._nodes.values())
        held = set().union(*(node.have for node in self._nodes.values()))
        wanted = self._goal.new if based else self._goal.whole.values()
        missing = [unit for unit in wanted if (unit.tensor, unit.slot) not in held]
        share = sum(u.stored_bytes for u in missing) // (self.expected * self.policy.batches_per_worker)
        for batch in batches(missing, min(share, self.policy.batch_bytes)):
            yield Task(Kind.INGEST, ANYWHERE, tuple((u.tensor, u.slot) for u in batch))

    def _combine_tasks(self, name: str, node: Node) -> Iterator[Task]:
        """What one node lacks, by where it is to be had; what nobody has yet is being carried somewhere."""
        assert self._goal is not None
        groups: dict[str, list[Slot]] = {}
        for slot in self._goal.whole:
            if slot in node.have:
                continue
            if node.base and slot not in self._changed:
                groups.setdefault(name, []).append(slot)
                continue
            peer = next((peer for peer, other in self._nodes.items() if slot in other.have), None)
            if peer is not None:
                groups.setdefault(peer, []).append(slot)
        for source, slots in groups.items():
            kind = Kind.CARRY if source == name else Kind.TRANSFER
            for group in cut(slots, [self._slot_bytes[t] for t, _ in slots], self.policy.copy_bytes):
                yield Task(kind, name, slots=tuple(group), source=source)

    def _seal_tasks(self, name: str, node: Node) -> Iterator[Task]:
        todo = [t for t in self._stateful if t not in node.sealed]
        for group in cut(todo, [self._manifest.tensors[t].spec.nbytes for t in todo], self.policy.copy_bytes):
            yield Task(Kind.SEAL, name, tensors=tuple(group))
        if not todo and not node.closed:
            yield Task(Kind.SEAL, name)

    def _publish(self) -> None:
        assert self._goal is not None
        for unit in self._goal.new:
            for fragment in unit.fragments:
                self._ledger.add(unit.tensor, fragment.index)
        self._say(Publish(self.generation, self._ledger.quality, final=not self._goals))
        self._awaited, self._goal = self.generation, None
        for name in self._nodes:
            self._nodes[name] = Node(base=True)

    # -- giving work out --------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """One task a worker and round, the least busy first, so that a short queue is shared."""
        for depth in range(self.policy.in_flight):
            for name, worker in list(self._workers.items()):
                if len(worker.flying) <= depth and not self.done:
                    self._assign_next(name, worker)

    def _assign_next(self, name: str, worker: Worker) -> None:
        node = self._nodes[worker.node]
        task = self._next_task(name, worker)
        if task is None:
            return
        self._epoch += 1
        worker.flying[self._epoch] = (task, self._now)
        self._say(
            Assign(
                task.kind,
                name,
                self._epoch,
                self.generation,
                units=self._units(task, node) if task.kind is Kind.INGEST else (),
                slots=task.slots if task.kind in (Kind.CARRY, Kind.TRANSFER) else (),
                tensors=task.tensors,
                source=self._busy_least(task.source) if task.kind is Kind.TRANSFER else "",
                fence=tuple(self._fallen.get(worker.node, ())),
            )
        )

    def _next_task(self, name: str, worker: Worker) -> Task | None:
        for queue in (self._nodes[worker.node].queue, self._queue if worker.ingests else deque()):
            while queue and not self._should_pass(queue[0], name):
                task = queue.popleft()
                if task.kind is not Kind.TRANSFER or self._crew(task.source):
                    return task
                # Its source is gone: the next plan finds these slots again, wherever they are then.
        return None

    def _should_pass(self, task: Task, worker: str) -> bool:
        """Whether to leave a task that failed here to somebody else who could do it."""
        others = (w for w, s in self._workers.items() if w != worker)
        if task.node == ANYWHERE:
            return task.failed_on == worker and any(self._workers[w].ingests for w in others)
        return task.failed_on == worker and any(self._workers[w].node == task.node for w in others)

    def _units(self, task: Task, node: Node) -> tuple[Unit, ...]:
        """All layers wanted so far on a node that does not hold the last generation, else the new ones."""
        assert self._goal is not None
        if not node.base:
            return tuple(self._goal.whole[slot] for slot in task.slots)
        return tuple(self._changed.get(slot) or self._goal.whole[slot] for slot in task.slots)

    # -- small words ------------------------------------------------------------------------------------------

    def _crew(self, node: str) -> list[str]:
        return [name for name, worker in self._workers.items() if worker.node == node]

    def _busy_least(self, node: str) -> str:
        return min(self._crew(node), key=lambda name: len(self._workers[name].flying))

    def _has_ingesting(self) -> bool:
        return any(worker.ingests for worker in self._workers.values())

    def _say(self, command: Command) -> None:
        if not self.done:
            self._said.append(command)

    def _give_up(self, error: Exception) -> None:
        self._say(GiveUp(error))
        self.done = True


def _slot_bytes(manifest: Manifest, tensor: int) -> int:
    entry = manifest.tensors[tensor]
    return entry.spec.nbytes // max(1, len({f.slot for f in entry.fragments}))


def _no_workers(message: str) -> WorkerLostError:
    return WorkerLostError(message, hint="look for out-of-memory kills, and whether the cluster has free CPUs")
