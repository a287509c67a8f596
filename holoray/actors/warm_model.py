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
from dataclasses import replace
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError

from holoray.actors import locks, remote, watchdog
from holoray.actors.accelerator import Accelerator
from holoray.actors.coordinator import Generation, Legacy, News
from holoray.actors.crew import Crew
from holoray.actors.device_worker import check_codecs
from holoray.actors.goals import check_qualities, goals
from holoray.actors.locks import Names
from holoray.actors.losses import check_least
from holoray.actors.placement import REPLICATE, Placement
from holoray.actors.published import OnDevices, OnNode, Published, SharedWeights
from holoray.actors.roster import Policy
from holoray.actors.worker import JobSpec, Member
from holoray.errors import DeadlineError, DeviceError, HolorayError, QualityError, UsageError, WorkerLostError
from holoray.formats.safetensors import SafetensorsWriter
from holoray.kernels import registry
from holoray.pipelines.fault_policy import FaultPolicy
from holoray.pipelines.open_sources import Place, is_in_process, open_places
from holoray.pipelines.sealed_store import SealedStore
from holoray.tensor import Array

_POLL_S: Final = 1.0
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
    accelerator: Accelerator | None = None,
    placement: Placement | str = REPLICATE,
) -> WarmModel:
    """Start warming a store up through target qualities; returns at once.

    `more_uris`: copies of the store, read together by every worker; `fault_policy`: how they are asked. With its
    `skip_corrupted`, fragments of which none of them has an honest copy are left out: a generation then has the quality
    of what is there, and in the end all is as `load` with this policy gives it.
    `workers`: processes of one CPU each (default: all CPUs, also those of nodes that join later). `address`: a Ray
    cluster to join (`auto` or host:port); by default the Ray that is already initialised here, else a private local
    one. `expect` pins the root and checks sha256. `metrics_port`: serve `/metrics` there (0: any free port).
    `accelerator`: weights go to GPUs; a worker is then a GPU (default: all that the cluster has), and no generation is
    published before all have it. `placement`: `replicate` puts all tensors on each GPU; `shard` each tensor on one of
    them, shared out by bytes, or as a `Placement` says.
    `on_generation` is called with each generation from a thread of its own; the next but one waits for it.

    Raises SourceError if there is no store, IntegrityError if it is not the expected one, QualityError for a target
    that cannot be reached, UsageError for one without meaning, DeviceError where the cluster has too few GPUs.
    """
    started = time.monotonic()
    places = (uri, *more_uris)
    placement = Placement(placement) if isinstance(placement, str) else placement
    if placement.is_sharded and accelerator is None:
        raise UsageError(
            "shards are for devices: CPU workers of a node share its memory",
            hint="give an accelerator (--device cuda), or leave the placement out",
        )
    if any(is_in_process(place) for place in places):
        raise UsageError("a store in this process's memory cannot be shared with workers")
    sealed = open_places(places, expect, fault_policy)
    if workers is not None and workers < 1:
        raise UsageError("a warm-up needs at least one worker")
    if metrics_port is not None and not 0 <= metrics_port <= _MAX_PORT:
        raise UsageError(f"there is no port {metrics_port}", hint=f"0 to {_MAX_PORT}; 0 takes any free port")
    targets = check_qualities(qualities)
    skips = sealed.policy.skip_corrupted
    found = goals(sealed.manifest, targets, skip_lost=skips)
    check_least(sealed.manifest, found, sealed.policy.min_quality if skips else 0.0)
    if accelerator is not None:
        check_codecs(sealed.manifest)
    cpus = workers or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(1) as pool:
        compiled = pool.submit(registry.warm_accumulators)  # or every worker would compile the kernels for itself
        session = remote.connect(address, cpus, gpus=accelerator is not None)
    try:
        compiled.result()
        count = cpus if session.private_dir else workers
        if accelerator is not None:
            count = check_gpus(workers)
            placement.pinned(sealed.manifest, count)
            cores = accelerator.cores or max(1, remote.cluster_cpus() // remote.cluster_gpus())
            accelerator = replace(accelerator, cores=cores)
            policy = policy or Policy(batch_bytes=cores * Policy().batch_bytes)  # which all threads of a worker share
        return WarmModel(
            sealed,
            targets,
            session,
            count,
            started,
            metrics_port,
            on_generation,
            policy or Policy(),
            accelerator,
            placement,
        )
    except BaseException:
        session.close()
        raise


def check_gpus(workers: int | None) -> int:
    """How many GPUs are to be used; DeviceError unless the cluster has them."""
    gpus = remote.cluster_gpus()
    if gpus < (workers or 1):
        raise DeviceError(
            f"Ray knows of {gpus} GPUs here, and {workers or 1} are needed",
            hint="see `holoray doctor`; a cluster started by hand may need `ray start --num-gpus`",
        )
    return workers or gpus


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
        workers: int | None,
        started: float,
        metrics_port: int | None,
        on_generation: OnGeneration | None,
        policy: Policy,
        accelerator: Accelerator | None = None,
        placement: Placement = Placement(),  # noqa: B008 - frozen
    ) -> None:
        self.manifest = sealed.manifest
        self.root = sealed.root
        self._sealed, self._targets, self._session = sealed, targets, session
        self._workers, self._started, self._metrics_port = workers, started, metrics_port
        self._on_generation, self._policy = on_generation, policy
        self._accelerator, self._placement = accelerator, placement
        self._home = remote.this_node()
        self._changed = threading.Condition()
        self._published: list[Generation] = []
        self._handed = 0  # generations of which `on_generation` has returned
        self._followed: Any = None  # the coordinator that is listened to
        self._error: Exception | None = None
        self._over = False
        self._closing = threading.Event()
        self._names = Names(locks.new_job(), self._home)
        self._weights: Published = OnNode(self.manifest, self._names)
        if accelerator is not None:
            self._weights = OnDevices(self.manifest, self._living_members)
        locks.sweep()
        lock = locks.join_job(self._names, locks.DRIVER)
        self._cleanup = weakref.finalize(self, _clean_up, self._names.job, lock, session)
        try:
            watchdog.watch_driver(self._names)
            self._crew = self._make_crew()
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

        Of weights on devices they are copies on the host; `on_device` gives those themselves. BF16 comes as
        `ml_dtypes.bfloat16`. Raises QualityError while there is no generation, and UsageError while weights are
        refined in place, which they never are within `on_generation`.
        """
        return dict(self._tensors())

    def on_device(self) -> list[SharedWeights]:
        """Where the newest generation lies on each device; `open_weights` opens it in a process on that device.

        Raises QualityError and UsageError as `state_dict` does.
        """
        self._check_published()
        if not isinstance(self._weights, OnDevices):
            raise UsageError("these weights are in shared memory", hint="state_dict() gives them without a copy")
        with self._session.use():
            return self._weights.handles()

    def _tensors(self) -> Iterator[tuple[str, Array]]:
        self._check_published()
        with self._changed:
            tensors = self._weights.tensors()
        if isinstance(self._weights, OnNode):
            yield from tensors
            return
        with self._session.use():
            yield from tensors

    def _check_published(self) -> None:
        if not self._published:
            self._raise_error()
            raise QualityError("no generation is published yet", hint="wait() for a quality first")

    def wait(self, quality: float = 1.0, timeout_s: float | None = None) -> Generation:
        """Block until a generation of at least this quality; 1 means every byte. Where corrupt fragments are skipped,
        the last generation will do, whatever it lacks.

        Returns once `on_generation` has returned from it (except to `on_generation` itself). Raises DeadlineError in
        time, QualityError if the last generation falls short, and whatever ended the warm-up.
        """
        inside = self._watcher is threading.current_thread()

        def reached() -> Generation | None:
            counted = self._published if inside else self._published[: self._handed]
            skips = self._sealed.policy.skip_corrupted
            enough = (
                g for g in counted if g.complete or (quality < 1.0 and g.quality >= quality) or (skips and g.final)
            )
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
        self._check_published()
        with SafetensorsWriter(path, [t.spec for t in self.manifest.tensors], self.manifest.metadata) as writer:
            for name, array in self._tensors():
                writer.write(name, array)

    def crew(self) -> list[dict[str, Any]]:
        """The workers that have joined: name, node, process id."""
        members = self._living_members()
        return [{"worker": member.name, "node": member.node, "pid": member.pid} for member in members]

    def _living_members(self) -> list[Member]:
        return [] if self._closing.is_set() or not self._session.alive() else self._crew.members()

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
            self._crew.close()
            locks.await_end(self._names.job)
            self._cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- following the coordinator ------------------------------------------------------------------------

    def _make_crew(self) -> Crew:
        encoded = ray.put(np.frombuffer(self.manifest.encoded, np.uint8))
        sealed = self._sealed
        spec = JobSpec(
            self._names.job,
            sealed.store,
            sealed.root,
            sealed.strict,
            self.manifest.lost,
            self._accelerator,
            self._placement,
            sealed.policy,
        )
        home = self._home if self._accelerator is None else None

        def wanted() -> int:
            return self._workers or remote.cluster_cpus()

        def start_worker(name: str, *, node: str, required: bool) -> Any:
            # A private Ray is shared by all warm-ups of a process, and a receiver must not wait for a free CPU.
            cpus = 0 if required or self._session.private_dir or self._accelerator else 1
            return remote.start_worker(spec, name, encoded, node=node, required=required, cpus=cpus)

        def end_worker(member: Member) -> None:
            remote.end_process(member.node, Names(spec.job, member.node).lock(member.name), member.pid)

        def start_coordinator(reign: int, members: list[Member], fallen: dict[str, list[str]]) -> Any:
            with self._changed:  # the next one must know of all that was heard from the last
                self._followed = None
                last, told = self._in_hand(), self._published[-1] if self._published else None
            legacy = Legacy(
                reign,
                tuple(members),
                fallen,
                *((last.generation, last.bytes_read) if last else (0, 0)),
                announced=told.generation if told else 0,
                lost=told.lost if told else frozenset(),
            )
            coordinator = remote.start_coordinator(
                spec,
                encoded,
                self._targets,
                home=home,
                expected=wanted(),
                living_nodes=remote.living_nodes,
                started=self._started,
                policy=self._policy,
                metrics_port=self._metrics_port,
                legacy=legacy,
            )
            coordinator.run.remote()
            self._followed = coordinator
            return coordinator

        return Crew(
            self._session,
            start_worker,
            end_worker,
            start_coordinator,
            home=home,
            workers=wanted,
            policy=self._policy,
        )

    def _in_hand(self) -> Generation | None:
        """What a coordinator may build on: memory of a device may be used until `on_generation` has returned."""
        taken = len(self._published) if self._accelerator is None else self._handed
        return self._published[taken - 1] if taken else None

    def _ask_quietly(self, method: str) -> Any:
        """What the coordinator answers, None if there is none (another may be on its way)."""
        with contextlib.suppress(RayError, WorkerLostError), self._session.use():
            return None if self._closing.is_set() else ray.get(getattr(self._crew.coordinator, method).remote())
        return None

    def _watch(self) -> None:
        """Take generations over as they come, until the last one, an error, or `close`."""
        try:
            while not self._closing.is_set() and not (self._published and self._published[-1].final):
                coordinator = self._crew.coordinator
                try:
                    with self._session.use():
                        self._follow(coordinator)
                except RayActorError:
                    self._crew.await_successor(coordinator)
        except Exception as error:
            self._error = error
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def _follow(self, coordinator: Any) -> None:
        """Take over what is new, if there is something within a second."""
        news: News = ray.get(coordinator.news.remote(self.generation, _POLL_S))
        for generation in news.generations:
            self._take(generation, coordinator)
        if news.error is not None:
            raise news.error

    def _take(self, generation: Generation, coordinator: Any) -> None:
        with self._changed:
            if coordinator is not self._followed:
                return
            self._weights.take(generation.generation)
            self._published.append(generation)
        if self._accelerator is None:  # else memory is freed that a consumer may still have mapped
            coordinator.taken.remote(generation.generation)  # if it is dead, `news` tells the next one
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


def _of_callback(error: BaseException, generation: int) -> HolorayError:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return HolorayError(
        f"on_generation failed at generation {generation}: {error!r}",
        hint=f"it was raised at {where.filename}:{where.lineno}, in {where.name}",
    )


def _clean_up(job: str, lock: int, session: remote.Session) -> None:
    session.close()
    locks.remove_job(job)
    os.close(lock)
