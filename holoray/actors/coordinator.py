"""The coordinator: asks the brain, and carries its commands to workers. Owns no data."""

from __future__ import annotations

import errno
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

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
    Taken,
    TaskDone,
    TaskFailed,
    Tick,
    WorkerJoined,
    WorkerLost,
)
from holoray.actors.roster import Policy
from holoray.actors.state import Brain
from holoray.actors.worker import JobSpec, Member, Report
from holoray.errors import UsageError, WorkerLostError
from holoray.metrics import JobMetrics, MetricsServer
from holoray.pipelines.curve import Key
from holoray.pipelines.meter import record
from holoray.version import __version__

_TICK_S: Final = 0.5
_WAIT_S: Final = 0.05
_PORT_S: Final = 1.0
_LEVELS: Final = (0.95, 0.99, 0.999, 0.9999, 1.0)


@dataclass(frozen=True, slots=True)
class Generation:
    """One published generation. `bytes_read`: of the store so far, manifest included; `seconds`: since the start.

    `lost`: fragments that it and all later ones lack, since no source has an honest copy.
    """

    generation: int
    quality: float
    bytes_read: int
    seconds: float
    relative_error: float
    snr_db: float
    complete: bool
    final: bool
    lost: frozenset[Key] = frozenset()

    def asdict(self) -> dict[str, Any]:
        """As users see it: how many fragments are `lost`, and not which."""
        return asdict(self) | {"lost": len(self.lost)}


@dataclass(frozen=True, slots=True)
class News:
    """Generations that were not known yet, and whether the warm-up is over; `error` is why it could not go on."""

    generations: list[Generation]
    over: bool = False
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Legacy:
    """What a coordinator takes over: its number, who is there, who died where, what the consumer has in hand.

    `announced`: the newest generation that the consumer has heard of, which lacks what is `lost`.
    """

    reign: int = 1
    members: tuple[Member, ...] = ()
    fallen: Mapping[str, Sequence[str]] = field(default_factory=dict)
    taken: int = 0
    bytes_read: int = 0
    announced: int = 0
    lost: frozenset[Key] = frozenset()


@dataclass(frozen=True, slots=True)
class Dismissal:
    """A worker that is to be replaced; `silent`: its process may live still."""

    worker: str
    silent: bool


@dataclass(frozen=True, slots=True)
class _Call:
    """An answer that is awaited from `worker`: `then` takes it; without one, `tasks` have failed."""

    worker: str
    then: Callable[[Any], None]
    tasks: tuple[Assign, ...] = ()
    beat: bool = False


class Coordinator:
    """Runs one warm-up; `run` blocks until it is over, the other methods may be called meanwhile."""

    def __init__(
        self,
        spec: JobSpec,
        encoded: npt.NDArray[np.uint8],
        qualities: Sequence[float],
        *,
        home: str | None,
        expected: int,
        living_nodes: Callable[[], set[str]],
        started: float,
        policy: Policy,
        metrics_port: int | None = None,
        legacy: Legacy = Legacy(),
    ) -> None:
        self._living_nodes = living_nodes
        self._started = started
        self._reign = legacy.reign
        self._members: dict[str, Member] = {}
        self._deserted = set(legacy.fallen)
        """Nodes on which a worker died: whether they live is asked until they have one again."""
        self._calls: dict[Any, _Call] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._dismissed: list[Dismissal] = []
        self._dead: set[str] = set()
        """Workers that Ray says are dead."""
        self._gathering: list[Assign] = []
        """Members of a group that is being asked to combine."""
        self._published: list[Generation] = []
        self._news = threading.Condition()
        self._over = False
        self._error: Exception | None = None
        self._start_error: Exception | None = None
        self._ticked = 0.0
        self._levels = list(_LEVELS)
        self.metrics = JobMetrics()
        self.metrics.set("holoray_quality_target_ratio", max(qualities))
        backend = "cpu" if spec.accelerator is None else "cuda"
        self.metrics.set("holoray_build_info", 1, version=__version__, backend=backend)
        if legacy.reign > 1:
            self.metrics.inc("holoray_actor_restarts_total", legacy.reign - 1, role="coordinator")
        self._server: MetricsServer | None = None
        try:
            self._brain = Brain(
                spec.manifest(encoded),
                qualities,
                home=home,
                expected=expected,
                collective=spec.accelerator is not None and not spec.placement.is_sharded,
                placement=spec.placement,
                in_place=spec.accelerator is not None and spec.accelerator.in_place,
                losses=Losses(
                    skips=spec.fault_policy.skip_corrupted,
                    min_quality=spec.fault_policy.min_quality,
                    lost=legacy.lost,
                    announced=legacy.announced,
                ),
                reign=legacy.reign,
                policy=policy,
                taken=legacy.taken,
                muster={m.name: m.node for m in legacy.members} if legacy.reign > 1 else None,
                fallen=legacy.fallen,
            )
            self._bytes_read = legacy.bytes_read or encoded.nbytes
            self.metrics.set("holoray_tensors", self._brain.tensors)
            if metrics_port is not None:
                self._server = _serve(self.metrics, metrics_port)
        except Exception as error:  # `news` tells it: raised here, it would lose its type
            self._error = error
        for member in legacy.members:
            self.introduce(member)

    # -- what the driver calls ---------------------------------------------------------------------------

    def run(self) -> None:
        """Warm up to the end, or until it cannot go on."""
        try:
            while self._error is None and not self._brain.done:
                self._step()
        except Exception as error:
            self._error = error
        outcome = "failed" if self._error else "ok"
        self.metrics.inc("holoray_loads_total", outcome=outcome)
        self.metrics.observe("holoray_load_duration_seconds", time.monotonic() - self._started, outcome=outcome)
        with self._news:
            self._over = True
            self._news.notify_all()

    def news(self, after: int, timeout_s: float) -> News:
        """Generations above `after`, which the consumer has in hand, as soon as there are any; or the end."""
        self.taken(after)
        with self._news:
            self._news.wait_for(lambda: self._over or self._is_news(after), timeout_s)
            found = [g for g in self._published if g.generation > after]
            return News(found, self._over, self._error)

    def _is_news(self, after: int) -> bool:
        return bool(self._published) and self._published[-1].generation > after

    def taken(self, generation: int) -> None:
        """The consumer has this generation in hand: the one before may go, the next may start."""
        self._inbox.put(lambda: self._feed(Taken(time.monotonic(), generation)))

    def introduce(self, member: Member) -> None:
        """A worker is there: it is told to obey this coordinator, and joins when it does."""
        self._inbox.put(lambda: self._enlist(member))

    def failed(self, worker: str, error: Exception) -> None:
        """A worker did not come up."""

        def hear() -> None:
            self._start_error = error
            self._feed(WorkerLost(time.monotonic(), worker))

        self._inbox.put(hear)

    def dismissals(self, timeout_s: float) -> list[Dismissal]:
        """Workers that the driver is to replace, as soon as there are any; each is named once."""
        with self._news:
            self._news.wait_for(lambda: bool(self._dismissed), timeout_s)
            dismissed, self._dismissed = self._dismissed, []
            return dismissed

    def metrics_url(self) -> str | None:
        return None if self._server is None else self._server.url

    # -- the loop ---------------------------------------------------------------------------------------------

    def _step(self) -> None:
        if self._calls:
            ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=_WAIT_S, fetch_local=False)
        else:
            ready = []
            time.sleep(_WAIT_S)
        for reference in ready:
            self._answer(reference)
        while not self._inbox.empty():
            self._inbox.get()()
        if time.monotonic() - self._ticked > _TICK_S:
            self._tick()

    def _tick(self) -> None:
        self._ticked = time.monotonic()
        beating = {call.worker for call in self._calls.values() if call.beat}
        for name, member in self._members.items():
            if name not in beating:
                self._calls[member.handle.beat.remote()] = _Call(name, partial(self._pulse, name), beat=True)
        self._mourn_nodes()
        self._feed(Tick(time.monotonic()))
        self._count_workers()
        pending = sum(_fragments(task) for call in self._calls.values() for task in call.tasks)
        self.metrics.set("holoray_fragments_pending", pending)

    def _pulse(self, worker: str, _: None) -> None:
        self._feed(Pulse(time.monotonic(), worker))

    def _answer(self, reference: Any) -> None:
        call = self._calls.pop(reference, None)
        if call is None:
            return
        try:
            result = ray.get(reference)
        except RayActorError:
            self._lost(call.worker)
            self._fail(call, WorkerLostError(f"worker {call.worker} died"))
        except RayTaskError as error:
            self._fail(call, error.cause if isinstance(error.cause, Exception) else error)
        except RayError as error:  # an argument or a result was lost with its node
            self._fail(call, WorkerLostError(f"a message between workers was lost: {type(error).__name__}"))
        else:
            call.then(result)

    def _fail(self, call: _Call, error: Exception) -> None:
        """Tell the brain, after what is being done now: it may be about to lose this worker."""
        for task in call.tasks:
            failure = TaskFailed(time.monotonic(), task.worker, task.epoch, error)
            self._inbox.put(partial(self._feed, failure))
            if isinstance(error, WorkerLostError) and task.units:
                self.metrics.inc("holoray_fragments_total", _fragments(task), outcome="redone")

    def _feed(self, event: Event) -> None:
        for command in self._brain.handle(event):
            self._obey(command)

    def _obey(self, command: Command) -> None:
        match command:
            case Assign(kind=Kind.TRANSFER):
                self._transfer(command)
            case Assign(kind=Kind.COMBINE):
                self._gather(command)
            case Assign():
                self._ask(command)
            case Abort(worker=worker, group=group):
                self._members[worker].handle.abort.remote(self._reign, group)
            case Publish():
                self._publish(command)
            case Retire(worker=worker, generation=generation):
                self._members[worker].handle.retire.remote(self._reign, generation)
            case Restart(worker=worker):
                self._dismiss(worker)
            case GiveUp(error=error):
                self._error = error
                if isinstance(error, WorkerLostError) and self._start_error is not None:
                    self._error = self._start_error

    # -- tasks -------------------------------------------------------------------------------------------------

    def _ask(self, task: Assign, *arguments: Any, **options: Any) -> None:
        def done(report: Report) -> None:
            record(self.metrics, report.tally)
            self.metrics.inc("holoray_combine_bytes_total", report.combined_bytes)
            self._bytes_read += sum(report.tally.received_bytes.values())
            now = time.monotonic()
            if report.error is None:
                self.metrics.set("holoray_last_progress_timestamp_seconds", time.time())
                self._feed(TaskDone(now, task.worker, task.epoch, report.survey, report.missed))
            else:
                self._feed(TaskFailed(now, task.worker, task.epoch, report.error))

        reference = self._members[task.worker].handle.do.remote(self._reign, task, *arguments, **options)
        self._calls[reference] = _Call(task.worker, done, (task,))

    def _gather(self, task: Assign) -> None:
        """The brain asks the members of a group one after the other; the first makes the ticket that all join with."""
        assert task.group is not None
        self._gathering = [t for t in self._gathering if t.group == task.group] + [task]
        if len(self._gathering) < task.group.size:
            return
        members, self._gathering = self._gathering, []
        first = members[0]

        def pass_on(ticket: bytes) -> None:
            for member in members:
                if member.worker in self._members:
                    self._ask(member, ticket=ticket)

        reference = self._members[first.worker].handle.ticket.remote(self._reign)
        self._calls[reference] = _Call(first.worker, pass_on, tuple(members))

    def _transfer(self, task: Assign) -> None:
        """The source's result is owned by us, so it outlives the source; its bytes go straight to the worker."""
        export = self._members[task.source].handle.export.options(num_returns=3)
        digest, nbytes, contents = export.remote(self._reign, task.generation, task.slots)

        def pass_on(size: int) -> None:
            if task.worker in self._members:
                self.metrics.inc("holoray_combine_bytes_total", size)
                self._ask(task, digest, contents)

        self._calls[nbytes] = _Call(task.source, pass_on, (task,))

    def _publish(self, command: Publish) -> None:
        quality = command.quality
        generation = Generation(
            command.generation,
            quality.ratio,
            self._bytes_read + self._brain.inherited_bytes,
            time.monotonic() - self._started,
            quality.relative_error,
            quality.snr_db,
            quality.complete,
            command.final,
            command.lost,
        )
        self.metrics.set("holoray_quality_ratio", generation.quality)
        self.metrics.set("holoray_generation", generation.generation)
        for level in [level for level in self._levels if quality.reaches(level)]:
            self._levels.remove(level)
            self.metrics.observe("holoray_time_to_quality_seconds", generation.seconds, quality=f"{level:g}")
        with self._news:
            self._published.append(generation)
            self._news.notify_all()

    # -- workers ------------------------------------------------------------------------------------------------

    def _enlist(self, member: Member) -> None:
        def joined(_: None) -> None:
            self._feed(WorkerJoined(time.monotonic(), member.name, member.node, member.ingests))

        self._members[member.name] = member
        self._deserted.discard(member.node)
        self._calls[member.handle.enlist.remote(self._reign)] = _Call(member.name, joined)
        self._count_workers()

    def _lost(self, name: str) -> None:
        member = self._members.get(name)
        if member is None:
            return
        self._dead.add(name)
        self._drop_calls(name)
        self._deserted.add(member.node)
        self._mourn_nodes()
        self._feed(WorkerLost(time.monotonic(), name))

    def _mourn_nodes(self) -> None:
        """A node often dies some time after its workers, or before Ray notices: what it held is not waited for."""
        if not self._deserted:
            return
        for node in self._deserted - self._living_nodes():
            self._deserted.discard(node)
            self._feed(NodeLost(time.monotonic(), node))

    def _dismiss(self, name: str) -> None:
        """Have the driver start another worker in its place."""
        member = self._members.pop(name, None)
        if member is not None:
            self._deserted.add(member.node)
        self._drop_calls(name)
        self._count_workers()
        self.metrics.inc("holoray_actor_restarts_total", role="worker")
        with self._news:
            self._dismissed.append(Dismissal(name, silent=name not in self._dead))
            self._news.notify_all()

    def _drop_calls(self, name: str) -> None:
        for reference in [ref for ref, call in self._calls.items() if call.worker == name]:
            self._fail(self._calls.pop(reference), WorkerLostError(f"worker {name} died"))

    def _count_workers(self) -> None:
        self.metrics.set("holoray_actors", len(self._members), role="worker")


def _fragments(task: Assign) -> int:
    return sum(len(unit.fragments) for unit in task.units)


def _serve(metrics: JobMetrics, port: int) -> MetricsServer:
    """Serve `/metrics`; a coordinator that died a moment ago may not have let go of the port yet."""
    deadline = time.monotonic() + _PORT_S
    while True:
        try:
            return MetricsServer(metrics, port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and time.monotonic() < deadline:
                time.sleep(_WAIT_S)
                continue
            raise UsageError(
                f"metrics cannot be served on port {port}: {error.strerror}",
                hint="choose another port; 0 is any free one",
            ) from None
