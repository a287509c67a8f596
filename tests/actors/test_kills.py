"""Processes of a warm-up are killed with SIGKILL or stopped for ever, and the weights come out the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from warming import (
    QUALITIES,
    SLOW_S,
    MeteredStore,
    SlowStore,
    assert_exact,
    is_alive,
    kill_coordinator,
    until,
)

from holoray.actors import remote
from holoray.actors.locks import DIRECTORY
from holoray.actors.roster import Policy
from holoray.actors.warm_model import warm_up
from holoray.pipelines.sealed_store import SealedStore
from holoray.tensor import Array

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
PATIENCE_S = 120.0
"""For a machine that has much else to do; what is measured is printed, and decides nothing."""


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    session = remote.connect(None, 4)
    yield
    session.close()


def store_bytes(sealed: SealedStore) -> int:
    return sum(t.stored_bytes for t in sealed.manifest.tensors) + len(sealed.manifest.encoded)


@pytest.mark.fault("worker-killed")
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_killed_worker_changes_nothing(
    share: float, store: Path, sealed: SealedStore, checkpoint: dict[str, Array], tmp_path: Path
) -> None:
    origin = MeteredStore(store, SLOW_S, tmp_path / "log")
    with warm_up(origin, workers=2, qualities=QUALITIES) as model:
        victim = until(lambda: len(model.crew()) == 2 and model.crew(), PATIENCE_S)[0]
        until(lambda: origin.bytes_asked() >= share * store_bytes(sealed), PATIENCE_S)
        os.kill(victim["pid"], signal.SIGKILL)
        model.wait(timeout_s=PATIENCE_S)
        assert_exact(model, sealed, checkpoint)
        assert [g["generation"] for g in model.generations] == [1, 2, 3]
        assert victim["worker"] not in {w["worker"] for w in until(model.crew)}
        crew = model.crew()
    assert ray.is_initialized()
    until(lambda: not any(is_alive(w["pid"]) for w in crew), PATIENCE_S)


@pytest.mark.fault("worker-killed")
@pytest.mark.usefixtures("local_ray")
def test_a_stopped_worker_is_replaced(store: Path, sealed: SealedStore, checkpoint: dict[str, Array]) -> None:
    """Nothing but its silence tells: a stopped process keeps its connections, and its task has no deadline to miss."""
    policy = Policy(silence_s=2.0, task_timeout_s=1e6)
    with warm_up(SlowStore(store, SLOW_S), workers=2, qualities=QUALITIES, policy=policy) as model:
        victim = until(lambda: len(model.crew()) == 2 and model.crew(), PATIENCE_S)[0]
        os.kill(victim["pid"], signal.SIGSTOP)
        model.wait(timeout_s=PATIENCE_S)
        assert_exact(model, sealed, checkpoint)


@pytest.mark.fault("coordinator-killed")
@pytest.mark.usefixtures("local_ray")
def test_a_killed_coordinator_costs_nothing_that_was_read(
    store: Path, sealed: SealedStore, checkpoint: dict[str, Array], tmp_path: Path
) -> None:
    origin, whole = MeteredStore(store, SLOW_S, tmp_path / "log"), store_bytes(sealed)
    with warm_up(origin, workers=2, qualities=(1.0,)) as model:
        until(lambda: origin.bytes_asked() >= 0.5 * whole, PATIENCE_S)
        applied = origin.bytes_asked()
        crew = model.crew()
        kill_coordinator(model)
        model.wait(timeout_s=PATIENCE_S)
        assert_exact(model, sealed, checkpoint)
        assert all(worker in model.crew() for worker in crew), "a worker did not survive the coordinator"
        assert [g["generation"] for g in model.generations] == [1]
        again = origin.bytes_asked("fragments-") - sum(t.stored_bytes for t in sealed.manifest.tensors)
        print(f"{again} bytes were read again, of {applied} when the coordinator was killed")
        assert 0 <= again < 0.05 * applied
        assert model.generations[-1]["bytes_read"] == whole


@pytest.mark.fault("coordinator-killed")
@pytest.mark.usefixtures("local_ray")
def test_a_stopped_coordinator_is_replaced_between_generations(
    store: Path, sealed: SealedStore, checkpoint: dict[str, Array]
) -> None:
    policy = Policy(silence_s=2.0)
    with warm_up(SlowStore(store, SLOW_S), workers=1, qualities=QUALITIES, policy=policy) as model:
        model.wait(0.9, timeout_s=PATIENCE_S)
        first = model._crew.coordinator
        pid = ray.get(first.__ray_call__.remote(lambda _: os.getpid()), timeout=PATIENCE_S)
        os.kill(pid, signal.SIGSTOP)
        model.wait(timeout_s=PATIENCE_S)
        assert model._crew.coordinator is not first
        assert_exact(model, sealed, checkpoint)
        assert [g["generation"] for g in model.generations] == [1, 2, 3]


DRIVER = """
import sys, time
sys.path[:0] = {path!r}
from warming import SlowStore
from holoray.actors.warm_model import warm_up
model = warm_up(SlowStore({store!r}, 0.5), workers=2)
while len(model.crew()) < 2:
    time.sleep(0.05)
print(model._names.job, model._session.private_dir, *(w["pid"] for w in model.crew()), flush=True)
time.sleep(600)
"""


@pytest.mark.fault("orphans")
def test_a_killed_driver_leaves_nothing(store: Path) -> None:
    """No process, no shared memory, no directory: also of a private Ray."""
    code = DRIVER.format(path=[str(Path(__file__).parent)], store=str(store))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        job, private_dir, *pids = driver.stdout.readline().split()
        until(lambda: list(DIRECTORY.glob(f"holoray-{job}-*-g1")), PATIENCE_S)
        driver.kill()
    began = time.monotonic()

    def left() -> list[object]:
        files: list[object] = [*DIRECTORY.glob(f"holoray-{job}-*")]
        return files + [pid for pid in pids if is_alive(int(pid))] + [p for p in [private_dir] if Path(p).exists()]

    until(lambda: not left(), PATIENCE_S)
    print(f"everything was gone {time.monotonic() - began:.1f} s after the driver was killed")
    time.sleep(1.0)
    assert not left(), "something came back"
