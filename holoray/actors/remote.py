"""The one place where plain classes become Ray actors, and where a Ray is found or started."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from holoray.actors import locks, watchdog
from holoray.actors.coordinator import Coordinator
from holoray.actors.device_worker import DeviceWorker
from holoray.actors.worker import JobSpec, Worker
from holoray.errors import SourceError, UsageError, WorkerLostError

# A private Ray only carries messages and, with several nodes, slots: weights never go through its object store.
_OBJECT_STORE_BYTES: Final = 80 << 20
_ANSWER_S: Final = 5.0
_QUIET: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_worker_niceness": "0",  # 15 by default: workers of a private Ray are the work itself
}


class _Worker(Worker):
    def __init__(self, spec: JobSpec, name: str, encoded: npt.NDArray[np.uint8]) -> None:
        super().__init__(spec, name, this_node(), encoded)

    @ray.method(concurrency_group="heart")  # type: ignore[untyped-decorator]
    def beat(self) -> None:
        super().beat()


class _DeviceWorker(DeviceWorker):
    def __init__(self, spec: JobSpec, name: str, encoded: npt.NDArray[np.uint8]) -> None:
        super().__init__(spec, name, this_node(), encoded)

    @ray.method(concurrency_group="heart")  # type: ignore[untyped-decorator]
    def beat(self) -> None:
        super().beat()

    @ray.method(concurrency_group="heart")  # type: ignore[untyped-decorator]
    def abort(self, reign: int, group: int) -> None:
        super().abort(reign, group)


def this_node() -> str:
    """Id of the Ray node that this process runs on."""
    return str(ray.get_runtime_context().get_node_id())


def living_nodes() -> set[str]:
    return {str(node["NodeID"]) for node in ray.nodes() if node["Alive"]}


def cluster_cpus() -> int:
    """CPUs of the cluster, at least 1."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def cluster_gpus() -> int:
    """Devices of the cluster, as Ray counts them."""
    return int(ray.cluster_resources().get("GPU", 0))


def start_worker(
    spec: JobSpec, name: str, encoded: Any, *, node: str = "", required: bool = False, cpus: float = 1
) -> Any:
    """An actor handle of a new worker: on `node`, if one is named (elsewhere only unless `required`), else spread.

    `encoded`: a reference to the manifest's bytes, as uint8. The worker lives no longer than this process. With an
    accelerator it has a GPU to itself.
    """
    where = NodeAffinitySchedulingStrategy(node, soft=not required) if node else "SPREAD"
    kind, gpus = (_Worker, 0) if spec.accelerator is None else (_DeviceWorker, 1)
    actor = ray.remote(concurrency_groups={"heart": 1})(kind)
    options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0}
    return actor.options(**options, scheduling_strategy=where).remote(spec, name, encoded)


def end_process(node: str, lock: Path, pid: int) -> None:
    """Kill a process of ours on a node, if it lives; returns at once. Ray gives one that is stopped another 5 s.

    Where the node is gone as well, nothing happens.
    """
    where = NodeAffinitySchedulingStrategy(node, soft=False)
    ray.remote(locks.end_holder).options(num_cpus=0, max_retries=0, scheduling_strategy=where).remote(lock, pid)


def start_coordinator(*arguments: Any, **options: Any) -> Any:
    """An actor handle of a new coordinator, on this node; it takes calls while it runs, and lives no longer than we."""
    where = NodeAffinitySchedulingStrategy(this_node(), soft=False)
    actor = ray.remote(Coordinator)
    return actor.options(num_cpus=0, max_restarts=0, max_concurrency=8, scheduling_strategy=where).remote(
        *arguments, **options
    )


@dataclass(slots=True)
class _Ours:
    """A Ray that we started or joined: it ends with the last session on it."""

    address: str
    directory: str = ""
    watch: int = -1
    """Descriptor that keeps the directory from being removed."""
    sessions: int = 0


_guard: Final = threading.RLock()  # a session may also be closed by a finalizer, in a thread that is connecting
_current: list[_Ours] = []  # at most one: a process has one Ray


class Session:
    """A connection to Ray; `close` undoes what `connect` did, and leaves alone what others still use."""

    def __init__(self, ours: _Ours | None = None) -> None:
        self._ours, self._open = ours, True
        self._address = ours.address if ours else _here()
        if ours:
            ours.sessions += 1

    @property
    def private_dir(self) -> str:
        """Where a private Ray lives; empty for any other."""
        return self._ours.directory if self._ours else ""

    def alive(self) -> bool:
        """Whether this process is still connected to that Ray. Ask first: most calls would start another one."""
        return _here() == self._address

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """All use of Ray: WorkerLostError if it was shut down before (any call would start another) or meanwhile."""
        if not self.alive():
            raise _ray_is_gone()
        try:
            yield
        except SystemExit:  # that is how Ray leaves a call when it is shut down
            raise _ray_is_gone() from None
        except Exception:
            if not self.alive():
                raise _ray_is_gone() from None
            raise

    def close(self) -> None:
        with _guard:
            ours, was_open, self._open = self._ours, self._open, False
            if ours is None or not was_open:
                return
            ours.sessions -= 1
            if ours.sessions:
                return
            if ours in _current:
                _current.remove(ours)
            if self.alive():
                ray.shutdown()
            if ours.directory:
                shutil.rmtree(ours.directory, ignore_errors=True)
                os.close(ours.watch)


def _ray_is_gone() -> WorkerLostError:
    return WorkerLostError(
        "Ray was shut down under the warm-up", hint="close() the model before ray.shutdown(), and warm up again"
    )


def _here() -> str:
    """Address of the Ray that this process is connected to, if it is."""
    return str(ray.get_runtime_context().gcs_address) if ray.is_initialized() else ""


def connect(address: str | None, cpus: int, *, gpus: bool = False) -> Session:
    """Use the Ray that this process has, join the cluster at `address`, or start a private local one.

    `gpus`: whether a private Ray is to look for GPUs.
    """
    with _guard:
        here = _here()
        if here:
            if address not in (None, "auto", "local", here):
                raise UsageError(
                    f"this process is already connected to the Ray at {here}, not {address}",
                    hint="leave the address out, or call ray.shutdown() first",
                )
            return Session(next((ours for ours in _current if ours.address == here), None))
        with _environment(_QUIET), _hushed(logging.getLogger("ray")):
            if address in (None, "local"):
                directory, watch = _start(cpus, gpus)
            else:
                directory, watch = _join(str(address)), -1
        _current[:] = [_Ours(_here(), directory, watch)]
        return Session(_current[0])


def _start(cpus: int, gpus: bool) -> tuple[str, int]:
    """Start a private Ray; returns its directory, and the descriptor that guards it."""
    # Ray puts unix sockets below this directory; their paths are limited to 107 bytes.
    directory = tempfile.mkdtemp(prefix="hr-", dir="/tmp")
    watch = watchdog.watch_directory(directory)
    try:
        _init(
            "a private Ray does not start",
            "look for what Ray printed; is there memory, and room in /tmp and /dev/shm?",
            address="local",
            num_cpus=cpus,
            num_gpus=None if gpus else 0,  # None: those that Ray finds
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            _temp_dir=directory,
        )
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(watch)
        raise
    return directory, watch


def _join(address: str) -> str:
    problem = f"no Ray cluster answers at {address}"
    hint = "start one (`ray start --head`), or leave the address out for a private local Ray"
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():  # Ray itself would try for minutes
        try:
            socket.create_connection((host.rpartition("//")[2].strip("[]"), int(port)), _ANSWER_S).close()
        except (OSError, OverflowError) as error:
            raise SourceError(f"{problem}: {error}", hint=hint, source=address) from None
    _init(problem, hint, address=address)
    return ""


def _init(problem: str, hint: str, **options: Any) -> None:
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **options)
    except (Exception, SystemExit) as error:  # Ray exits where it cannot connect
        ray.shutdown()
        raise SourceError(f"{problem}: {error}", hint=hint, source=options["address"]) from error


@contextlib.contextmanager
def _hushed(logger: logging.Logger) -> Iterator[None]:
    """Nothing below an error is logged inside."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for what is started inside; the caller's own settings win."""
    added = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
