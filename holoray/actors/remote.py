"""The one place where plain classes become Ray actors, and where a Ray is found or started."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from holoray.actors.coordinator import Coordinator
from holoray.actors.worker import JobSpec, Worker
from holoray.errors import SourceError, UsageError

# A private Ray only carries messages and, with several nodes, slots: weights never go through its object store.
_OBJECT_STORE_BYTES: Final = 80 << 20
_QUIET: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_worker_niceness": "0",  # 15 by default: workers of a private Ray are the work itself
}


class _Worker(Worker):
    def __init__(self, spec: JobSpec, name: str) -> None:
        super().__init__(spec, name, this_node())


def this_node() -> str:
    """Id of the Ray node that this process runs on."""
    return str(ray.get_runtime_context().get_node_id())


def living_nodes() -> set[str]:
    return {str(node["NodeID"]) for node in ray.nodes() if node["Alive"]}


def cluster_cpus() -> int:
    """CPUs of the cluster, at least 1."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def start_worker(spec: JobSpec, name: str, *, node: str = "", required: bool = False, cpus: float = 1) -> Any:
    """An actor handle of a new worker: on `node`, if one is named (elsewhere only unless `required`), else spread."""
    where = NodeAffinitySchedulingStrategy(node, soft=not required) if node else "SPREAD"
    actor = ray.remote(_Worker)
    return actor.options(num_cpus=cpus, max_restarts=0, max_task_retries=0, scheduling_strategy=where).remote(
        spec, name
    )


def start_coordinator(*arguments: Any, **options: Any) -> Any:
    """An actor handle of a new coordinator, on this node; it takes calls while it runs."""
    where = NodeAffinitySchedulingStrategy(this_node(), soft=False)
    actor = ray.remote(Coordinator)
    return actor.options(num_cpus=0, max_restarts=0, max_concurrency=8, scheduling_strategy=where).remote(
        *arguments, **options
    )


@dataclass(frozen=True, slots=True)
class Session:
    """A connection to Ray; `close` undoes what `connect` did, and leaves alone what was there before."""

    ours: bool
    private_dir: str = ""

    def close(self) -> None:
        if self.ours:
            ray.shutdown()
        if self.private_dir:
            shutil.rmtree(self.private_dir, ignore_errors=True)


def connect(address: str | None, cpus: int) -> Session:
    """Use the Ray that the caller has initialised, join the cluster at `address`, or start a private local one."""
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", "local", here):
            raise UsageError(
                f"this process is already connected to the Ray at {here}, not {address}",
                hint="leave the address out, or call ray.shutdown() first",
            )
        return Session(ours=False)
    with _environment(_QUIET), _hushed(logging.getLogger("ray")):
        if address not in (None, "local"):
            return _join(str(address))
        # Ray puts unix sockets below this directory; their paths are limited to 107 bytes.
        directory = tempfile.mkdtemp(prefix="hr-", dir="/tmp")
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                num_gpus=0,
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                _temp_dir=directory,
            )
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
    return Session(ours=True, private_dir=directory)


def _join(address: str) -> Session:
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except (ConnectionError, ValueError) as error:
        raise SourceError(
            f"no Ray cluster answers at {address}: {error}",
            hint="start one (`ray start --head`), or leave the address out for a private local Ray",
        ) from None
    return Session(ours=True)


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
