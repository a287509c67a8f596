"""A world without Ray for the brain: workers that take time, die, lie about nothing, and leave garbage behind.

One seed is one schedule. Segments are modelled as {slot: fragments in it}; whatever is being written is `GARBAGE`
until it is done, and a killed worker goes on writing garbage until somebody fences it.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

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
from holoray.actors.roster import Policy
from holoray.actors.state import Brain
from holoray.errors import SourceError, WorkerLostError
from holoray.fragment import NO_PREREQUISITE, FragmentEntry, TensorEntry
from holoray.manifest import Manifest
from holoray.pipelines.ledger import QualityLedger
from holoray.pipelines.plan import with_streaming_order
from holoray.tensor import TensorSpec

GARBAGE = frozenset({-1})
HOME = "n0"
PATIENT = Policy(max_attempts=200, max_restarts=200, patience_s=1e9, task_timeout_s=60.0, batch_bytes=1 << 12)

Segment = dict[Slot, frozenset[int]]


@dataclass(frozen=True)
class Faults:
    """How unkind a schedule is."""

    kills: int = 0
    node_losses: int = 0
    failures: float = 0.0
    duplicates: float = 0.0
    hangs: float = 0.0
    start_failures: float = 0.0


def make_manifest(seed: int) -> Manifest:
    """Tensors of all three kinds, with random sizes and gains."""
    rng = random.Random(seed)
    tensors = tuple(_tensor(rng, t, ("raw", "planes", "spectral")[t % 3]) for t in range(rng.randint(1, 7)))
    return Manifest(with_streaming_order(tensors), (), {}, {})


def _tensor(rng: random.Random, number: int, codec: str) -> TensorEntry:
    slots, layers = rng.randint(1, 5), 6 if codec == "planes" else 1
    fragments = [
        FragmentEntry(
            index=layer * slots + slot,
            layer=layer,
            slot=slot,
            requires=(layer - 1) * slots + slot if layer else NO_PREREQUISITE,
            compression="none",
            stored_bytes=rng.randint(1, 4000),
            raw_bytes=1,
            gain=rng.uniform(0.5, 1.0) * 4.0**-layer,
            xxh3_64=0,
            sha256=b"",
        )
        for layer in range(layers)
        for slot in range(slots)
    ]
    config: dict[str, object] = {}
    if codec == "planes":
        config = {"threshold": 120, "top": 1, "tail_cut": -6}
    if codec == "spectral":
        own = {"fragments": slots, "seed": 0, "tile": 0, "exponent": 0, "shifts": ""}
        config = own | {"essential": 1, "coefficients": "float32"}
    essential_gain = rng.uniform(0.0, 2.0) if codec == "spectral" else 0.0
    spec = TensorSpec(f"t{number}", "F32", (slots << 10,))
    return TensorEntry(spec, codec, config, 0.0, codec == "raw", b"", tuple(fragments), essential_gain)


@dataclass
class SimWorker:
    """An actor: runs what it is asked one after the other."""

    node: str
    queue: list[Assign] = field(default_factory=list)
    busy: Assign | None = None
    alive: bool = True


class Simulation:
    """Runs one schedule to its end, checking invariants after every event; `log` is what happened."""

    def __init__(
        self,
        seed: int,
        manifest: Manifest,
        qualities: tuple[float, ...],
        *,
        nodes: int = 1,
        workers: int = 2,
        receiver: bool = False,
        faults: Faults = Faults(),
        policy: Policy = PATIENT,
    ) -> None:
        self.rng = random.Random(seed)
        self.manifest, self.faults, self.policy = manifest, faults, policy
        self.brain = Brain(manifest, qualities, home=HOME, expected=workers, policy=policy)
        self.now = 0.0
        self.log: list[str] = []
        self.published: list[Publish] = []
        self.gave_up: Exception | None = None
        self.segments: dict[str, dict[int, Segment]] = {f"n{i}": {} for i in range(nodes)}
        self.sealed: dict[tuple[str, int], set[int]] = {}
        self.workers: dict[str, SimWorker] = {}
        self.zombies: dict[str, Assign] = {}
        self.awaited: dict[str, dict[int, Assign]] = {}
        self.receivers: set[str] = set()
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = itertools.count()
        first = 0 if not receiver else 1
        for i in range(workers):
            self._start(f"n{(i + first) % nodes}")
        if receiver:
            self._start(HOME, ingests=False)
        self._at(1.0, self._tick)
        for _ in range(faults.kills):
            self._at(self.rng.uniform(0, 12), self._kill_somebody)
        for _ in range(faults.node_losses):
            self._at(self.rng.uniform(0, 12), self._lose_a_node)

    def run(self) -> Simulation:
        """To the end; raises AssertionError where an invariant breaks or nothing happens any more."""
        for _ in range(20_000):
            if self.brain.done:
                return self
            self.now, _, act = heapq.heappop(self._agenda)
            act()
        raise AssertionError("no progress")

    # -- the world ---------------------------------------------------------------------------------------

    def _at(self, delay: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (self.now + delay, next(self._ids), act))

    def _tick(self) -> None:
        self._feed(Tick(self.now))
        self._at(1.0, self._tick)

    def _start(self, node: str, ingests: bool = True) -> None:
        name = f"w{next(self._ids)}"
        worker = SimWorker(node)
        self.workers[name] = worker
        fails = self.rng.random() < self.faults.start_failures

        def join() -> None:
            if fails or not worker.alive or node not in self.segments:
                worker.alive = False
                self._feed(WorkerLost(self.now, name))
            else:
                self._feed(WorkerJoined(self.now, name, node, ingests))

        self.receivers.update([name] if not ingests else [])
        self._at(self.rng.uniform(0.1, 3.0), join)

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
        self._at(self.rng.uniform(0, 4), lambda: self._feed(WorkerLost(self.now, name)))

    def _last_breath(self, name: str) -> None:
        """A killed process that was not quite dead writes once more."""
        task = self.zombies.pop(name, None)
        node = self.workers[name].node
        if task is not None and node in self.segments:
            self._write_garbage(node, task)

    def _lose_a_node(self) -> None:
        nodes = [node for node in self.segments if node != HOME]
        if not nodes:
            return
        node = self.rng.choice(nodes)
        self.log.append(f"{self.now:.3f} lose {node}")
        for name, worker in self.workers.items():
            if worker.node == node:
                self._kill(name)
                self.zombies.pop(name, None)
        del self.segments[node]
        self._at(self.rng.uniform(0, 6), lambda: self._feed(NodeLost(self.now, node)))
        if self.rng.random() < 0.5:
            self._at(self.rng.uniform(0, 6), self._add_a_node)

    def _add_a_node(self) -> None:
        self.segments[f"n{next(self._ids)}"] = {}

    # -- what workers do -------------------------------------------------------------------------------

    def _begin(self, name: str) -> None:
        worker = self.workers[name]
        if not worker.alive or worker.busy is not None or not worker.queue:
            return
        task = worker.busy = worker.queue.pop(0)
        for dead in task.fence:
            self.zombies.pop(dead, None)
        self._write_garbage(worker.node, task)
        hangs = self.rng.random() < self.faults.hangs
        self._at(1e6 if hangs else self.rng.expovariate(4.0), lambda: self._end(name, task))

    def _write_garbage(self, node: str, task: Assign) -> None:
        segment = self.segments[node].setdefault(task.generation, {})
        for slot in slots_of(task):
            segment[slot] = GARBAGE
        self.sealed.setdefault((node, task.generation), set()).difference_update(task.tensors)

    def _end(self, name: str, task: Assign) -> None:
        worker = self.workers[name]
        if not worker.alive:
            return
        worker.busy = None
        error: Exception | None = None
        if self.rng.random() < self.faults.failures:
            error = SourceError("a read failed")
        elif task.kind is Kind.TRANSFER and not self.workers[task.source].alive:
            error = WorkerLostError("the other side died")
        else:
            self._apply(worker.node, task)
        answer: Event = (
            TaskDone(self.now, name, task.epoch) if error is None else TaskFailed(self.now, name, task.epoch, error)
        )
        delay = self.rng.expovariate(10.0)
        self._at(delay, lambda: self._answer(answer))
        if self.rng.random() < self.faults.duplicates:
            self._at(delay + self.rng.uniform(0, 5), lambda: self._answer(answer))
        self._begin(name)

    def _apply(self, node: str, task: Assign) -> None:
        segment = self.segments[node][task.generation]
        last = self.segments[node].get(task.generation - 1, {})
        for unit in task.units:
            slot, layers = (unit.tensor, unit.slot), unit.fragments[0].layer
            below = frozenset(f.index for f in self._chain(slot)[:layers])
            if layers:
                assert last.get(slot) == below, f"refined {last.get(slot)} with layer {layers}"
            segment[slot] = below | {f.index for f in unit.fragments}
        for slot in task.slots:
            if task.kind is Kind.CARRY:
                segment[slot] = last[slot]
            else:
                segment[slot] = self.segments[self.workers[task.source].node][task.generation][slot]
        self.sealed.setdefault((node, task.generation), set()).update(task.tensors)

    def _chain(self, slot: Slot) -> list[FragmentEntry]:
        fragments = self.manifest.tensors[slot[0]].fragments
        return sorted((f for f in fragments if f.slot == slot[1]), key=lambda f: f.layer)

    # -- between the world and the brain -------------------------------------------------------------------

    def _answer(self, event: Event) -> None:
        assert isinstance(event, TaskDone | TaskFailed)
        self.awaited.get(event.worker, {}).pop(event.epoch, None)
        self._feed(event)

    def _feed(self, event: Event) -> None:
        if isinstance(event, WorkerLost):
            self.awaited.pop(event.worker, None)
        if isinstance(event, NodeLost):
            for name, worker in self.workers.items():
                if worker.node == event.node:
                    self.awaited.pop(name, None)
        commands = self.brain.handle(event)
        self.log.append(f"{self.now:.3f} {event} -> {commands}")
        for command in commands:
            self._obey(command)
        self.check()

    def _obey(self, command: Command) -> None:
        match command:
            case Assign(worker=name):
                self._check_assignment(command)
                self.awaited.setdefault(name, {})[command.epoch] = command
                self.workers[name].queue.append(command)
                self._begin(name)
            case Publish():
                self._check_publication(command)
                self.published.append(command)
                generation = command.generation
                self._at(self.rng.uniform(0, 1), lambda: self._feed(Taken(self.now, generation)))
            case Retire(worker=name, generation=generation):
                self.segments.get(self.workers[name].node, {}).pop(generation, None)
            case Restart(worker=name):
                self.awaited.pop(name, None)
                self._kill(name)
                old = self.workers[name]
                receiver = name in self.receivers
                stays = old.node == HOME or self.rng.random() < 0.7
                node = old.node if stays else self.rng.choice(sorted(self.segments))
                self._start(node if node in self.segments else HOME, ingests=not receiver)
            case GiveUp(error=error):
                self.gave_up = error

    # -- invariants -------------------------------------------------------------------------------------------

    def check(self) -> None:
        """What must hold after every event."""
        for name, tasks in self.awaited.items():
            assert len(tasks) <= self.policy.in_flight, f"{name} has {len(tasks)} tasks"
        numbers = [p.generation for p in self.published]
        assert numbers == list(range(1, len(numbers) + 1))
        ratios = [p.quality.ratio for p in self.published]
        assert ratios == sorted(ratios)

    def _check_assignment(self, task: Assign) -> None:
        assert task.generation == len(self.published) + 1
        slots = set(slots_of(task))
        for tasks in self.awaited.values():
            for other in tasks.values():
                node = self.workers[other.worker].node
                if task.kind is Kind.INGEST or node == self.workers[task.worker].node:
                    assert not slots & set(slots_of(other)), "one slot, two workers"
        for name, node_state in self.brain._nodes.items():
            if task.kind is Kind.INGEST or name == self.workers[task.worker].node:
                assert not slots & node_state.have, "a slot done again"

    def _check_publication(self, publication: Publish) -> None:
        nodes = {self.workers[w].node for w in self.brain._workers} | {HOME}
        ledger = QualityLedger(self.manifest.tensors)
        home = self.segments[HOME].get(publication.generation, {})
        for (tensor, _), content in home.items():
            assert content != GARBAGE
            for index in content:
                ledger.add(tensor, index)
        assert publication.quality.ratio <= ledger.quality.ratio + 1e-12
        assert publication.quality.complete == ledger.quality.complete
        for node in nodes & set(self.segments):
            assert self.segments[node].get(publication.generation, {}) == home, f"{node} differs from {HOME}"
            stateful = {t for t, _ in home if self.manifest.tensors[t].codec == "spectral"}
            assert stateful <= self.sealed.get((node, publication.generation), set())
        if publication.final:
            assert publication.quality.complete or publication.quality.ratio > 0


def slots_of(task: Assign) -> tuple[Slot, ...]:
    """The slots that a task writes."""
    return task.slots + tuple((u.tensor, u.slot) for u in task.units)
