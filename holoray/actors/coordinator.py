"""The coordinator: asks the brain, and carries its commands to workers. Owns no data."""

from __future__ import annotations

import errno
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

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
    Taken,
    TaskDone,
    TaskFailed,
    Tick,
    WorkerJoined,
    WorkerLost,
)
from holoray.actors.roster import Policy
from holoray.actors.state import Brain
from holoray.actors.worker import Hello, JobSpec, Report, open_expected
from holoray.errors import UsageError, WorkerLostError
from holoray.metrics import JobMetrics, MetricsServer
from holoray.pipelines.meter import record
from holoray.version import __version__

_TICK_S: Final = 0.5
_WAIT_S: Final = 0.05
_HOME_S: Final = 5.0
_PORT_S: Final = 1.0
_LEVELS: Final = (0.95, 0.99, 0.999, 0.9999, 1.0)


@dataclass(frozen=True, slots=True)
class Generation:
    """One published generation. `bytes_read`: of the store so far, manifest included; `seconds`: since the start."""

    generation: int
    quality: float
    bytes_read: int
    seconds: float
    relative_error: float
    snr_db: float
    complete: bool
    final: bool

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


class StartWorker(Protocol):
    """How the coordinator gets a worker: `remote.start_worker`."""

    def __call__(self, spec: JobSpec, name: str, *, node: str, required: bool, cpus: float) -> Any: ...


@dataclass(slots=True)
class _Seat:
    """A worker's place: who sits there now, and where it must or may be."""

    name: str
    handle: Any
    receiver: bool
    wanted_node: str = ""
    node: str = ""
    pid: int = 0


@dataclass(frozen=True, slots=True)
class _Call:
    """An answer that is awaited from `worker`: `then` takes it; without one, `task` has failed."""

    worker: str
    then: Callable[[Any], None]
    task: Assign | None = None


class Coordinator:
    """Runs one warm-up; `run` blocks until it is over, the other methods may be called meanwhile."""

    def __init__(
        self,
        spec: JobSpec,
        qualities: Sequence[float],
        *,
        home: str,
        workers: int,
        start_worker: StartWorker,
        living_nodes: Callable[[], set[str]],
        started: float,
        first_generation: int = 1,
        policy: Policy | None = None,
        metrics_port: int | None = None,
        worker_cpus: float = 1,
    ) -> None:
        self._spec, self._home, self._workers, self._worker_cpus = spec, home, workers, worker_cpus
        self._start_worker, self._living_nodes = start_worker, living_nodes
        self._started, self._began = started, time.monotonic()
        self._seats: dict[str, _Seat] = {}
        self._calls: dict[Any, _Call] = {}
        self._inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._names = 0
        self._bytes_read = 0
        self._published: list[Generation] = []
        self._news = threading.Condition()
        self._error: Exception | None = None
        self._start_error: Exception | None = None
        self._stopping = False
        self._ticked = 0.0
        self._levels = list(_LEVELS)
        self.metrics = JobMetrics()
        self.metrics.set("holoray_quality_target_ratio", max(qualities))
        self.metrics.set("holoray_build_info", 1, version=__version__, backend="cpu")
        self._count_crew()
        self._server: MetricsServer | None = None
        try:
            manifest = open_expected(spec).manifest
            self._brain = Brain(
                manifest, qualities, home=home, expected=workers, policy=policy, first_generation=first_generation
            )
            self._bytes_read = len(manifest.encoded)
            self.metrics.set("holoray_tensors", len(manifest.tensors))
            if metrics_port is not None:
                self._server = _serve(self.metrics, metrics_port)
        except Exception as error:  # `run` returns it: raised here, it would lose its type
            self._error = error

    # -- what the driver calls ---------------------------------------------------------------------------

    def run(self) -> Exception | None:
        """Warm up; returns None at the end, or why it could not go on."""
        try:
            if self._error is None:
                for _ in range(self._workers):
                    self._seat()
            while self._error is None and not self._brain.done and not self._stopping:
                self._step()
        except Exception as error:
            self._error = error
        outcome = "failed" if self._error else "ok"
        self.metrics.inc("holoray_loads_total", outcome=outcome)
        self.metrics.observe("holoray_load_duration_seconds", time.monotonic() - self._started, outcome=outcome)
        return self._error

    def news(self, after: int, timeout_s: float) -> list[Generation]:
        """Generations above `after`, as soon as there are any."""
        with self._news:
            self._news.wait_for(lambda: bool(self._published) and self._published[-1].generation > after, timeout_s)
            return [g for g in self._published if g.generation > after]

    def taken(self, generation: int) -> None:
        """The consumer has this generation in hand."""
        self._inbox.put(Taken(time.monotonic(), generation))

    def crew(self) -> list[dict[str, Any]]:
        """The workers that have joined: name, node, pid."""
        return [
            {"worker": seat.name, "node": seat.node, "pid": seat.pid} for seat in list(self._seats.values()) if seat.pid
        ]

    def stop(self) -> None:
        """Remove the job's segments from every node, then end the workers."""
        self._stopping = True
        seats = list(self._seats.values())
        removals = [seat.handle.remove_job.remote() for seat in seats if seat.pid and seat.node != self._home]
        if removals:
            ray.wait(removals, num_returns=len(removals), timeout=5)
        for seat in seats:
            ray.kill(seat.handle, no_restart=True)
        if self._server is not None:
            self._server.close()

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
            self._feed(self._inbox.get())
        if time.monotonic() - self._ticked > _TICK_S:
            self._tick()

    def _tick(self) -> None:
        self._ticked = time.monotonic()
        self._guard_home()
        self._feed(Tick(time.monotonic()))
        pending = sum(_fragments(call.task) for call in self._calls.values())
        self.metrics.set("holoray_fragments_pending", pending)

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
        if call.task is None:
            return
        self._inbox.put(TaskFailed(time.monotonic(), call.task.worker, call.task.epoch, error))
        if isinstance(error, WorkerLostError) and call.task.units:
            self.metrics.inc("holoray_fragments_total", _fragments(call.task), outcome="redone")

    def _feed(self, event: Event) -> None:
        for command in self._brain.handle(event):
            self._obey(command)

    def _obey(self, command: Command) -> None:
        match command:
            case Assign(kind=Kind.TRANSFER):
                self._transfer(command)
            case Assign():
                self._ask(command)
            case Publish():
                self._publish(command)
            case Retire(worker=worker, generation=generation):
                self._seats[worker].handle.retire.remote(generation)
            case Restart(worker=worker):
                self._replace(worker)
            case GiveUp(error=error):
                self._error = error
                if isinstance(error, WorkerLostError) and self._start_error is not None:
                    self._error = self._start_error

    # -- tasks -------------------------------------------------------------------------------------------------

    def _ask(self, task: Assign, *arguments: Any) -> None:
        def done(report: Report) -> None:
            record(self.metrics, report.tally)
            self._bytes_read += sum(report.tally.received_bytes.values())
            now = time.monotonic()
            if report.error is None:
                self.metrics.set("holoray_last_progress_timestamp_seconds", time.time())
                self._feed(TaskDone(now, task.worker, task.epoch))
            else:
                self._feed(TaskFailed(now, task.worker, task.epoch, report.error))

        reference = self._seats[task.worker].handle.do.remote(task, *arguments)
        self._calls[reference] = _Call(task.worker, done, task)

    def _transfer(self, task: Assign) -> None:
        """The source's result is owned by us, so it outlives the source; its bytes go straight to the worker."""
        export = self._seats[task.source].handle.export.options(num_returns=3)
        digest, nbytes, contents = export.remote(task.generation, task.slots)

        def pass_on(size: int) -> None:
            if task.worker in self._seats:
                self.metrics.inc("holoray_combine_bytes_total", size)
                self._ask(task, digest, contents)

        self._calls[nbytes] = _Call(task.source, pass_on, task)

    def _publish(self, command: Publish) -> None:
        quality = command.quality
        generation = Generation(
            command.generation,
            quality.ratio,
            self._bytes_read,
            time.monotonic() - self._started,
            quality.relative_error,
            quality.snr_db,
            quality.complete,
            command.final,
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

    def _seat(self, node: str = "", *, receiver: bool = False) -> None:
        name = f"w{self._names}"
        self._names += 1
        handle = self._start_worker(
            self._spec, name, node=node, required=receiver, cpus=0 if receiver else self._worker_cpus
        )
        self._seats[name] = _Seat(name, handle, receiver, wanted_node=node)
        self._calls[handle.hello.remote()] = _Call(name, lambda hello: self._welcome(name, hello))

    def _welcome(self, name: str, hello: Hello) -> None:
        seat = self._seats[name]
        seat.node, seat.pid = hello.node, hello.pid
        self._count_crew()
        if hello.error is not None:
            self._start_error = hello.error
            self._lost(name)
        else:
            self._feed(WorkerJoined(time.monotonic(), name, hello.node, not seat.receiver))

    def _lost(self, name: str) -> None:
        seat = self._seats.get(name)
        if seat is None:
            return
        self._drop_calls(name)
        if seat.node and seat.node not in self._living_nodes():
            self._feed(NodeLost(time.monotonic(), seat.node))
        self._feed(WorkerLost(time.monotonic(), name))

    def _replace(self, name: str) -> None:
        """Start another worker, on the same node where that still lives (what it holds is then not lost)."""
        seat = self._seats.pop(name, None)
        self._drop_calls(name)
        if seat is None:
            return
        ray.kill(seat.handle, no_restart=True)
        self._count_crew()
        self.metrics.inc("holoray_actor_restarts_total", role="worker")
        node = seat.node or seat.wanted_node
        if not seat.receiver:
            self._seat(node if node in self._living_nodes() else "")

    def _count_crew(self) -> None:
        self.metrics.set("holoray_actors", len(self.crew()), role="worker")

    def _drop_calls(self, name: str) -> None:
        for reference in [ref for ref, call in self._calls.items() if call.worker == name]:
            self._fail(self._calls.pop(reference), WorkerLostError(f"worker {name} died"))

    def _guard_home(self) -> None:
        """The consumer's node needs somebody who fills its segment: a receiver, if no worker is there."""
        here = any(self._home in (seat.node, seat.wanted_node) for seat in self._seats.values())
        starting = any(not seat.node for seat in self._seats.values())
        if not here and (not starting or time.monotonic() - self._began > _HOME_S):
            self._seat(self._home, receiver=True)


def _fragments(task: Assign | None) -> int:
    return 0 if task is None else sum(len(unit.fragments) for unit in task.units)


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
