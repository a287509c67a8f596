"""A world without Ray for the brain: workers that take time, die, hang and leave garbage behind, sources that fail and
lie, nodes that come and go, and coordinators that are killed and followed by others. With `devices`, each worker is a
node of its own, which goes with it, and devices combine (`meetings.py`), or, with `shards`, hold a part of the tensors.
With `in_place` a slot of the last generation is gone as soon as its place is written to.

One seed is one schedule. Segments are modelled as {slot: fragments in it}; whatever is being written is `GARBAGE`
until it is done, and a killed worker goes on writing garbage until somebody fences it.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from invariants import HOME, Invariants
from meetings import Meetings
from sim_memory import SimMemory
from sim_sources import SimSources

from holoray.actors.losses import Losses
from holoray.actors.messages import (
    Abort,
    Assign,
    Command,
    Event,
    GiveUp,
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
from holoray.actors.placement import REPLICATE, SHARD, Placement
from holoray.actors.roster import Policy
from holoray.actors.state import Brain
from holoray.errors import IntegrityError, SourceError, WorkerLostError
from holoray.manifest import Manifest
from holoray.pipelines.curve import Key

PATIENT = Policy(
    max_attempts=200,
    max_restarts=200,
    patience_s=1e9,
    task_timeout_s=60.0,
    combine_timeout_s=20.0,
    batch_bytes=1 << 12,
)
MAX_EVENTS = 20_000


@dataclass(frozen=True)
class Faults:
    """How unkind a schedule is: numbers of incidents in its first seconds, and shares of answers."""

    kills: int = 0
    node_losses: int = 0
    joins: int = 0
    coordinator_kills: int = 0
    failures: float = 0.0
    lies: float = 0.0
    duplicates: float = 0.0
    hangs: float = 0.0
    start_failures: float = 0.0
    no_returns: float = 0.0
    """Of workers that are lost, those for whom no other comes."""
    corrupt: float = 0.0
    """Of fragments that may be skipped, those that are bad in every source."""
    rotten: float = 0.0
    """Of those, for each worker, what is bad in all of its own sources."""


@dataclass
class SimWorker:
    """An actor: runs what it is asked one after the other, and obeys the latest coordinator it has heard of."""

    node: str
    ingests: bool
    queue: list[tuple[int, Assign]] = field(default_factory=list)
    busy: Assign | None = None
    alive: bool = True
    stopped: float | None = None
    """Since when it does not even answer its heartbeat."""
    reign: int = 0
    summons: list[int] = field(default_factory=list)


class Simulation:
    """Runs one schedule to its end, checking the invariants after every event; `log` is what happened."""

    def __init__(
        self,
        seed: int,
        manifest: Manifest,
        qualities: tuple[float, ...],
        *,
        nodes: int = 1,
        workers: int = 2,
        receiver: bool = False,
        devices: bool = False,
        shards: bool = False,
        in_place: bool = False,
        faults: Faults = Faults(),
        policy: Policy = PATIENT,
    ) -> None:
        self.rng = random.Random(seed)
        self.manifest, self.qualities, self.faults, self.policy = manifest, qualities, faults, policy
        self.expected = workers
        self.devices, self.shards, self.in_place = devices, shards, in_place
        self.handed = 0
        """Generations from which the consumer has returned."""
        self.home = None if devices else HOME
        self.sources = SimSources(manifest, self.rng, faults.corrupt, faults.rotten)
        self.meetings = Meetings(self)
        self.now = 0.0
        self.reign = self.crowned = 0
        self.enthroned = 0.0
        """When the coordinator of now began."""
        self.log: list[str] = []
        self.published: list[Publish] = []
        """What the consumer has in hand, or has returned from."""
        self.gave_up: Exception | None = None
        self.memory = SimMemory(self)
        self.segments, self.sealed, self.told = self.memory.segments, self.memory.sealed, self.memory.told
        self.segments.update({f"n{i}": {} for i in range(0 if devices else nodes)})
        self.workers: dict[str, SimWorker] = {}
        self.staff: dict[str, str] = {}
        """Node of each worker that the driver has heard of, and not dismissed."""
        self.fallen: dict[str, list[str]] = {}
        self.zombies: dict[str, Assign] = {}
        self.awaited: dict[str, dict[int, Assign]] = {}
        self.brain = self._make_brain()
        self.invariants = Invariants(self)
        self.ingested_bytes = 0
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = itertools.count()
        first = 0 if not receiver else 1
        for i in range(workers):
            self._start(f"n{(i + first) % nodes}")
        if receiver:
            self._start(HOME, ingests=False)
        for _ in range(self.rng.choice([0, 0, 1, 2]) if shards else 0):
            self._start("")
        self._at(1.0, self._tick)
        incidents = (
            (faults.kills, self._kill_somebody),
            (faults.node_losses, self._lose_a_node),
            (faults.joins, self._add_a_node),
            (faults.coordinator_kills, self._kill_coordinator),
        )
        for number, incident in incidents:
            for _ in range(number):
                self._at(self.rng.uniform(0, 12), incident)

    def run(self) -> Simulation:
        """To the end; raises AssertionError where an invariant breaks or nothing happens any more."""
        for _ in range(MAX_EVENTS):
            if self.gave_up or (self.published and self.published[-1].final):
                self.invariants.at_the_end()
                return self
            self.now, _, act = heapq.heappop(self._agenda)
            act()
        raise AssertionError("progress: the schedule does not end")

    @property
    def returned(self) -> int:
        """What a coordinator may build on: memory of a device may be used until the consumer returns."""
        return self.handed if self.devices else len(self.published)

    def digest(self) -> str:
        """Of everything that happened."""
        return hashlib.sha256("\n".join(self.log).encode()).hexdigest()

    # -- the world ---------------------------------------------------------------------------------------

    def _at(self, delay: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (self.now + delay, next(self._ids), act))

    def _tick(self) -> None:
        for name, worker in list(self.workers.items()):
            if worker.alive and worker.stopped is None and name in self.staff:
                self._feed(Pulse(self.now, name))
        self._feed(Taken(self.now, self.returned))
        self._feed(Tick(self.now))
        self._at(1.0, self._tick)

    def _start(self, node: str, ingests: bool = True) -> None:
        name = f"w{next(self._ids)}"
        if self.devices:
            node = f"d{name}"
            self.segments[node] = {}
        worker = self.workers[name] = SimWorker(node, ingests)
        fails = self.rng.random() < self.faults.start_failures

        def appear() -> None:
            if fails or not worker.alive or node not in self.segments:
                worker.alive = False
                self._feed(WorkerLost(self.now, name))
                if self.reign < 0:  # the driver replaces by itself whom no coordinator can dismiss
                    self._replace(name)
            else:
                self.staff[name] = node
                self._summon(name)

        self._at(self.rng.uniform(0.1, 3.0), appear)

    def _kill_somebody(self) -> None:
        living = [name for name, worker in self.workers.items() if worker.alive]
        if living:
            self._kill(self.rng.choice(living))

    def _kill(self, name: str) -> None:
        worker = self.workers[name]
        if not worker.alive:
            return
        worker.alive = False
        self.log.append(f"{self.now:.3f} kill {name}")
        if worker.busy is not None:
            self.zombies[name] = worker.busy
            self._at(self.rng.uniform(0, 8), lambda: self._last_breath(name))
        if self.devices:
            self.segments.pop(worker.node, None)
        self._at(self.rng.uniform(0, 4), lambda: self._mourn(name))

    def _mourn(self, name: str) -> None:
        """What the coordinator makes of a dead worker: a device goes with its worker."""
        if self.devices:
            self._feed(NodeLost(self.now, self.workers[name].node))
        self._feed(WorkerLost(self.now, name))

    def _last_breath(self, name: str) -> None:
        """A killed process that was not quite dead writes once more."""
        task = self.zombies.pop(name, None)
        node = self.workers[name].node
        if task is not None and node in self.segments:
            self.memory.write_garbage(node, task)

    def _lose_a_node(self) -> None:
        nodes = [node for node in self.segments if node != HOME]
        if not nodes or self.devices:
            return
        node = self.rng.choice(nodes)
        self.log.append(f"{self.now:.3f} lose {node}")
        for name, worker in self.workers.items():
            if worker.node == node:
                self._kill(name)
                self.zombies.pop(name, None)
        del self.segments[node]
        self._at(self.rng.uniform(0, 6), lambda: self._feed(NodeLost(self.now, node)))

    def _add_a_node(self) -> None:
        if self.devices:
            self._start("")
            return
        node = f"n{next(self._ids)}"
        self.log.append(f"{self.now:.3f} add {node}")
        self.segments[node] = {}
        for _ in range(self.rng.randint(1, 2)):
            self._start(node)

    # -- coordinators --------------------------------------------------------------------------------------

    def _make_brain(self, **inheritance: Any) -> Brain:
        return Brain(
            self.manifest,
            self.qualities,
            home=self.home,
            expected=self.expected,
            collective=self.devices and not self.shards,
            placement=Placement(SHARD if self.shards else REPLICATE),
            reign=self.reign,
            in_place=self.in_place,
            losses=Losses(
                skips=self.sources.skips,
                lost=self.published[-1].lost if self.published else (),
                announced=len(self.published),
            ),
            policy=self.policy,
            **inheritance,
        )

    def _kill_coordinator(self) -> None:
        """What was under way goes on; nobody hears of it until the next coordinator asks."""
        if self.reign < 0:
            return
        self.log.append(f"{self.now:.3f} kill the coordinator")
        reign, self.reign = self.reign + 1, -1
        self._at(self.rng.uniform(0.5, 4.0), lambda: self._enthrone(reign))

    def _enthrone(self, reign: int) -> None:
        self.reign, self.crowned, self.enthroned = reign, reign, self.now
        self.awaited.clear()
        self.brain = self._make_brain(
            taken=self.returned,
            muster=dict(self.staff),
            fallen={} if self.devices else {node: list(names) for node, names in self.fallen.items()},
        )
        self.log.append(f"{self.now:.3f} coordinator {reign} after generation {len(self.published)}")
        for name in list(self.staff):
            self._summon(name)

    def _summon(self, name: str) -> None:
        """Ask a worker to obey the coordinator of this reign; a dead one is noticed by that."""
        reign, worker = self.reign, self.workers[name]
        if reign < 0:
            return

        def arrive() -> None:
            if not worker.alive:
                self._feed(WorkerLost(self.now, name))
            else:
                worker.summons.append(reign)
                self._begin(name)

        self._at(self.rng.expovariate(5.0), arrive)

    def _obey_summons(self, name: str) -> None:
        worker = self.workers[name]
        reign = max(worker.summons, default=-1)
        worker.summons.clear()
        if reign > worker.reign or reign == self.reign:
            worker.reign = max(worker.reign, reign)
            joined = WorkerJoined(self.now, name, worker.node, worker.ingests)
            self._at(self.rng.expovariate(10.0), lambda: self._feed(joined, reign))

    # -- what workers do -------------------------------------------------------------------------------

    def _begin(self, name: str) -> None:
        worker = self.workers[name]
        if not worker.alive or worker.busy is not None:
            return
        self._obey_summons(name)
        if not worker.queue:
            return
        reign, task = worker.queue.pop(0)
        if reign < worker.reign:  # refused: a dead coordinator asked for it
            self._begin(name)
            return
        worker.busy = task
        for dead in task.fence:
            self.zombies.pop(dead, None)
        self.memory.write_garbage(worker.node, task)
        if self.rng.random() < self.faults.hangs:
            worker.stopped = self.now if self.rng.random() < 0.5 else None  # then its heart beats on
            if self.shards:
                self._at(self.rng.uniform(5, 30), lambda: self._go_on(name, task, reign))
            return
        if task.kind is Kind.COMBINE:
            self.meetings.begin(name, task, reign)
            return
        self._at(self.rng.expovariate(4.0), lambda: self._end(name, task, reign))

    def _go_on(self, name: str, task: Assign, reign: int) -> None:
        """A worker that was stopped for some time, and given up by somebody who could not say so any more."""
        worker = self.workers[name]
        if worker.alive and worker.busy is task:
            worker.stopped = None
            self._end(name, task, reign)

    def _end(self, name: str, task: Assign, reign: int) -> None:
        worker = self.workers[name]
        if not worker.alive:
            return
        if task.shard is not None:
            self.memory.settle(worker.node, task.shard, task.generation)
        error = self._misfortune(task)
        if error is not None:
            self.answer_failed(name, task, reign, error)
        elif task.kind is Kind.SURVEY:
            self.answer_done(name, task, reign, self.memory.survey(worker.node, task.generation))
        else:
            self.answer_done(name, task, reign, missed=self.memory.apply(name, task))

    def answer_done(
        self,
        name: str,
        task: Assign,
        reign: int,
        survey: Survey | None = None,
        missed: frozenset[Key] = frozenset(),
    ) -> None:
        self._send(name, TaskDone(self.now, name, task.epoch, survey, missed), reign)

    def answer_failed(self, name: str, task: Assign, reign: int, error: Exception) -> None:
        self._send(name, TaskFailed(self.now, name, task.epoch, error), reign)

    def _send(self, name: str, answer: TaskDone | TaskFailed, reign: int) -> None:
        """The worker is free again; its answer arrives some time later, and perhaps once more."""
        self.workers[name].busy = None
        delay = self.rng.expovariate(10.0)
        self._at(delay, lambda: self._answer(answer, reign))
        if self.rng.random() < self.faults.duplicates:
            self._at(delay + self.rng.uniform(0, 5), lambda: self._answer(answer, reign))
        self._begin(name)

    def _misfortune(self, task: Assign) -> Exception | None:
        fate = self.rng.random()
        if fate < self.faults.failures:
            return SourceError("a read failed")
        if fate < self.faults.failures + self.faults.lies and task.kind in (Kind.INGEST, Kind.TRANSFER):
            return IntegrityError("a source lied")
        if task.kind is Kind.TRANSFER and not self.workers[task.source].alive:
            return WorkerLostError("the other side died")
        return None

    # -- between the world and the brain -------------------------------------------------------------------

    def _answer(self, event: Event, reign: int) -> None:
        assert isinstance(event, TaskDone | TaskFailed)
        if reign == self.reign:
            self.awaited.get(event.worker, {}).pop(event.epoch, None)
        self._feed(event, reign)

    def _feed(self, event: Event, reign: int | None = None) -> None:
        """The coordinator hears an event, if it is the one that is meant and lives."""
        if self.reign < 0 or (reign is not None and reign != self.reign):
            return
        if isinstance(event, WorkerLost):
            self._void(event.worker)
        if isinstance(event, NodeLost):
            for name, worker in self.workers.items():
                if worker.node == event.node:
                    self._void(name)
        commands = self.brain.handle(event)
        if commands or not isinstance(event, Pulse | Taken | Tick):
            self.log.append(f"{self.now:.3f} {event} -> {commands}")
        self.invariants.after(event, commands)
        for command in commands:
            self._obey(command)
        self.invariants.always()

    def _void(self, name: str) -> None:
        for task in self.awaited.pop(name, {}).values():
            self.invariants.excuse(task)

    def _obey(self, command: Command) -> None:
        reign = self.reign
        match command:
            case Assign(worker=name):
                self.invariants.of_assignment(command)
                self.awaited.setdefault(name, {})[command.epoch] = command
                self.workers[name].queue.append((reign, command))
                self._begin(name)
            case Abort(worker=name, group=number):
                key = self.reign, number
                self._at(self.rng.expovariate(5.0), lambda: self.meetings.abort(name, key))
            case Publish():
                self.invariants.of_publication(command)
                self._at(self.rng.uniform(0, 1), lambda: self._take(command, reign))
            case Retire(worker=name, generation=generation):
                assert generation < self.returned, "in hand: the consumer still looks at what is retired"
                self.segments.get(self.workers[name].node, {}).pop(generation, None)
            case Restart(worker=name):
                self._void(name)
                if self.shards:
                    self._at(self.rng.uniform(0, 3), lambda: self._dismiss(name, reign))
                    if self.faults.coordinator_kills and self.rng.random() < 0.3:
                        self._at(self.rng.uniform(0, 3), self._kill_coordinator)
                else:
                    self._replace(name)
            case GiveUp(error=error):
                self.gave_up = error

    def _take(self, publication: Publish, reign: int) -> None:
        """The consumer gets to know of a generation, and says so, some time later."""
        if reign != self.crowned:  # another one was told already what the consumer has
            return
        if publication.generation == len(self.published) + 1:
            self.published.append(publication)
        elif self.devices:  # which another coordinator found to be whole: a tick will tell it when to go on
            return
        generation = publication.generation
        self._at(self.rng.uniform(0, 4 if self.devices else 1), lambda: self._hand_over(generation))

    def _hand_over(self, generation: int) -> None:
        self.handed = generation
        self._feed(Taken(self.now, generation))

    def _dismiss(self, name: str, reign: int) -> None:
        """The driver hears whom to replace, unless the coordinator died before: then the next one musters it."""
        if reign == self.reign or name not in self.staff:
            self._replace(name)

    def _replace(self, name: str) -> None:
        """What the driver does with a worker that is given up."""
        self.staff.pop(name, None)
        self._kill(name)
        old = self.workers[name]
        self.fallen.setdefault(old.node, []).append(name)
        if self.devices:
            if self.rng.random() >= self.faults.no_returns or not any(w.alive for w in self.workers.values()):
                self._start("")
            return
        stays = old.node == HOME or self.rng.random() < 0.7
        node = old.node if stays else self.rng.choice(sorted(self.segments))
        self._start(node if node in self.segments else HOME, ingests=old.ingests)
