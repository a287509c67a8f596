"""Warming a model up from Python: `warm_up` starts it, a `WarmModel` hands out what there is so far."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Final, Self

import ray
from ray.exceptions import RayActorError, RayError

from holoray.actors import remote, shared_memory
from holoray.actors.coordinator import Generation
from holoray.actors.goals import check_qualities, goals
from holoray.actors.roster import Policy
from holoray.actors.segment import attach_weights
from holoray.actors.shared_memory import Names
from holoray.actors.worker import JobSpec
from holoray.checkpoint import save_checkpoint
from holoray.errors import DeadlineError, HolorayError, QualityError, UsageError, WorkerLostError
from holoray.kernels import registry
from holoray.pipelines.fault_policy import FaultPolicy
from holoray.pipelines.open_sources import Place, open_places
from holoray.pipelines.sealed_store import SealedStore
from holoray.tensor import Array

_POLL_S: Final = 1.0
_MAX_COORDINATORS: Final = 3
_MAX_PORT: Final = 65535

OnGeneration = Callable[["WarmModel", Generation], None]


def warm_up(
    uri: Place,
    *more_uris: Place,
    workers: int | None = None,
    qualities: Sequence[float] = (1.0,),
    address: str | None = None,
    expect: str | None = None,
    metrics_port: int | None = None,
    on_generation: OnGeneration | None = None,
    policy: Policy | None = None,
    fault_policy: FaultPolicy | None = None,
) -> WarmModel:
    """Start warming a store up through target qualities; returns at once.

    `more_uris`: copies of the store, read together by every worker; `fault_policy`: how they are asked.
    `workers`: processes of one CPU each (default: all CPUs). `address`: a Ray cluster to join (`auto` or host:port);
    by default the Ray that is already initialised here, else a private local one. `expect` pins the root and checks
    sha256. `metrics_port`: serve `/metrics` there (0: any free port). `on_generation` is called with each generation
    from a thread of its own; the next but one waits for it.

    Raises SourceError if there is no store, IntegrityError if it is not the expected one, QualityError for a target
    that cannot be reached, UsageError for one without meaning.
    """
    started = time.monotonic()
    if fault_policy is not None and fault_policy.skip_corrupted:
        raise UsageError(
            "a warm-up publishes no generation with holes in it", hint="use load to go on without corrupt fragments"
        )
    sealed = open_places((uri, *more_uris), expect, fault_policy)
    if sealed.store.in_process:
        raise UsageError("a store in this process's memory cannot be shared with workers")
    if workers is not None and workers < 1:
        raise UsageError("a warm-up needs at least one worker")
    if metrics_port is not None and not 0 <= metrics_port <= _MAX_PORT:
        raise UsageError(f"there is no port {metrics_port}", hint=f"0 to {_MAX_PORT}; 0 takes any free port")
    targets = check_qualities(qualities)
    goals(sealed.manifest, targets)
    cpus = workers or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(1) as pool:
        compiled = pool.submit(registry.warm_accumulators)  # or every worker would compile the kernels for itself
        session = remote.connect(address, cpus)
    try:
        compiled.result()
        count = workers or (cpus if session.private_dir else remote.cluster_cpus())
        return WarmModel(sealed, targets, session, count, started, metrics_port, on_generation, policy)
    except BaseException:
        session.close()
        raise


class WarmModel:
    """A model that gets better: `state_dict()` is always the newest whole generation.

    Close it (or use it as a context manager) to end the workers and to free shared memory; arrays handed out stay
    valid for as long as they are referenced.
    """

    def __init__(
        self,
        sealed: SealedStore,
        targets: tuple[float, ...],
        session: remote.Session,
        workers: int,
        started: float,
        metrics_port: int | None,
        on_generation: OnGeneration | None,
        policy: Policy | None,
    ) -> None:
        self.manifest = sealed.manifest
        self.root = sealed.root
        self._sealed, self._targets, self._session = sealed, targets, session
        self._workers, self._started, self._metrics_port = workers, started, metrics_port
        self._on_generation, self._policy = on_generation, policy
        self._home = remote.this_node()
        self._changed = threading.Condition()
        self._published: list[Generation] = []
        self._handed = 0  # generations of which `on_generation` has returned
        self._weights: dict[str, Array] = {}
        self._error: Exception | None = None
        self._over = False
        self._closing = threading.Event()
        self._jobs: list[str] = []
        self._locks: list[int] = []
        shared_memory.sweep()
        self._cleanup = weakref.finalize(self, _clean_up, self._jobs, self._locks, session)
        try:
            self._start_coordinator()
        except BaseException:
            self._cleanup()
            raise
        self._watcher = threading.Thread(target=self._watch, name="holoray-watch", daemon=True)
        self._watcher.start()

    # -- what users call ---------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """Number of the newest generation; 0 while there is none."""
        return self._published[-1].generation if self._published else 0

    @property
    def quality(self) -> float:
        """Quality of the newest generation; 0 while there is none."""
        return self._published[-1].quality if self._published else 0.0

    @property
    def generations(self) -> list[dict[str, Any]]:
        """Every generation so far: its number, quality, bytes read by then, seconds since the start."""
        return [g.asdict() for g in self._published]

    def state_dict(self) -> dict[str, Array]:
        """The tensors of the newest generation by name: read-only views of shared memory, not copies.

        BF16 comes as `ml_dtypes.bfloat16`. Raises QualityError while there is no generation.
        """
        with self._changed:
            if not self._published:
                self._raise_error()
                raise QualityError("no generation is published yet", hint="wait() for a quality first")
            return dict(self._weights)

    def wait(self, quality: float = 1.0, timeout_s: float | None = None) -> Generation:
        """Block until a generation of at least this quality; 1 means every byte.

        Returns once `on_generation` has returned from it (except to `on_generation` itself). Raises DeadlineError in
        time, QualityError if the last generation falls short, and whatever ended the warm-up.
        """
        inside = self._watcher is threading.current_thread()

        def reached() -> Generation | None:
            counted = self._published if inside else self._published[: self._handed]
            enough = (g for g in counted if g.complete or (quality < 1.0 and g.quality >= quality))
            return next(enough, None)

        with self._changed:
            if inside and reached() is None:
                raise UsageError(
                    f"on_generation cannot wait for quality {quality}: the next generation waits for it to return",
                    hint="wait() outside of it",
                )
            if not self._changed.wait_for(lambda: reached() or self._over, timeout_s):
                raise DeadlineError(
                    f"quality {quality} was not reached within {timeout_s} s; it is at {self.quality!r}",
                    hint="wait longer (the warm-up goes on), or for less",
                )
            found = reached()
            if found is None:
                self._raise_error()
                raise QualityError(
                    f"the warm-up ended at quality {self.quality!r}, below {quality}",
                    hint="add the quality to the targets of warm_up",
                )
            return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the newest generation as a safetensors file."""
        save_checkpoint(path, self.state_dict(), self.manifest.metadata)

    def crew(self) -> list[dict[str, Any]]:
        """The workers that have joined: name, node, process id."""
        found: list[dict[str, Any]] | None = self._ask_quietly("crew")
        return found or []

    @property
    def metrics_url(self) -> str | None:
        """Where `/metrics` is served, if it is."""
        url: str | None = self._ask_quietly("metrics_url")
        return url

    def close(self) -> None:
        """End the workers, free the shared memory, and stop Ray if it was started here."""
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        if self._watcher is not threading.current_thread():
            self._watcher.join()
        if self._cleanup.alive:
            self._stop_coordinator()
            for job in self._jobs:
                shared_memory.await_end(job, "driver")
            self._cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- following the coordinator ------------------------------------------------------------------------

    def _start_coordinator(self) -> None:
        """A fresh job: whatever an earlier coordinator's workers may still write goes to names nobody reads."""
        job = shared_memory.new_job()
        self._jobs.append(job)
        self._names = Names(job, self._home)
        self._locks.append(shared_memory.hold_lock(self._names.lock("driver")))
        reached = self._published[-1].quality if self._published else 0.0
        self._coordinator = remote.start_coordinator(
            JobSpec(job, self._sealed.store, self._sealed.root, self._sealed.strict),
            [q for q in self._targets if q > reached] or [self._targets[-1]],
            home=self._home,
            workers=self._workers,
            start_worker=remote.start_worker,
            living_nodes=remote.living_nodes,
            started=self._started,
            first_generation=self.generation + 1,
            policy=self._policy,
            metrics_port=self._metrics_port,
            worker_cpus=0 if self._session.private_dir else 1,  # a private Ray is shared by all warm-ups of a process
        )
        self._run = self._coordinator.run.remote()

    def _stop_coordinator(self) -> None:
        with contextlib.suppress(RayError, WorkerLostError):
            self._ask("stop", timeout_s=10)
        if self._session.alive():
            ray.kill(self._coordinator)

    def _ask(self, method: str, *arguments: Any, timeout_s: float | None = None) -> Any:
        """What the coordinator answers."""
        with self._ray():
            return ray.get(getattr(self._coordinator, method).remote(*arguments), timeout=timeout_s)

    def _ask_quietly(self, method: str) -> Any:
        """What the coordinator answers, None if there is none (another may be on its way)."""
        with contextlib.suppress(RayError, WorkerLostError):
            return None if self._closing.is_set() else self._ask(method)
        return None

    @contextlib.contextmanager
    def _ray(self) -> Iterator[None]:
        """All use of Ray: WorkerLostError if it was shut down before (any call would start another) or meanwhile."""
        if not self._session.alive():
            raise _ray_is_gone()
        try:
            yield
        except SystemExit:  # that is how Ray leaves a call when it is shut down
            raise _ray_is_gone() from None
        except Exception:
            if not self._session.alive():
                raise _ray_is_gone() from None
            raise

    def _watch(self) -> None:
        try:
            for _ in range(_MAX_COORDINATORS):
                try:
                    self._follow()
                    break
                except RayActorError as error:
                    if self._closing.is_set():
                        break
                    cause = error
                    with self._ray():
                        self._start_coordinator()
            else:
                raise WorkerLostError(f"the coordinator died again and again: {cause}")
        except Exception as error:
            self._error = error
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def _follow(self) -> None:
        """Take generations over as they come, until the last one, an error, or `close`."""
        while not self._closing.is_set():
            news: list[Generation] = self._ask("news", self.generation, _POLL_S)
            for generation in news:
                self._take(generation)
                if generation.final:
                    return
            with self._ray():
                ended, _ = ray.wait([self._run], timeout=0)
                error = ray.get(self._run) if ended and not news else None
            if error is not None:
                raise error

    def _take(self, generation: Generation) -> None:
        weights = attach_weights(self.manifest, self._names, generation.generation)
        with self._changed:
            self._weights = weights
            self._published.append(generation)
        with contextlib.suppress(RayActorError):  # the next coordinator need not know
            self._ask("taken", generation.generation)
        if self._on_generation is not None:
            try:
                self._on_generation(self, generation)
            except HolorayError:
                raise
            except BaseException as error:
                raise _of_callback(error, generation.generation) from error
        with self._changed:
            self._handed = len(self._published)
            self._changed.notify_all()

    def _raise_error(self) -> None:
        if isinstance(self._error, HolorayError):
            raise self._error
        if self._error is not None:
            raise HolorayError(f"the warm-up failed: {self._error!r}") from self._error


def _ray_is_gone() -> WorkerLostError:
    return WorkerLostError(
        "Ray was shut down under the warm-up", hint="close() the model before ray.shutdown(), and warm up again"
    )


def _of_callback(error: BaseException, generation: int) -> HolorayError:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return HolorayError(
        f"on_generation failed at generation {generation}: {error!r}",
        hint=f"it was raised at {where.filename}:{where.lineno}, in {where.name}",
    )


def _clean_up(jobs: list[str], locks: list[int], session: remote.Session) -> None:
    session.close()
    for job in jobs:
        shared_memory.remove_job(job)
    while locks:
        os.close(locks.pop())
