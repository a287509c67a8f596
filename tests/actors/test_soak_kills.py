"""Fifty real kills by seed, on three nodes: bit-identical weights each time, and how much later they came.

pytest -m soak tests/actors/test_soak_kills.py -k 'kill[17]' -s       replays one
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import ray
from clusters import add_nodes, make_cluster
from ray.cluster_utils import Cluster
from warming import QUALITIES, SLOW_S, SlowStore, assert_exact, kill_coordinator, until

from holoray.actors import remote
from holoray.actors.roster import Policy
from holoray.actors.warm_model import WarmModel, warm_up
from holoray.pipelines.sealed_store import SealedStore
from holoray.tensor import Array

pytestmark = [pytest.mark.soak, pytest.mark.ray, pytest.mark.timeout(400)]
KILLS = 50
PATIENCE_S = 200.0


@dataclass
class Ground:
    """Where the kills happen, how long a warm-up takes there without one, and Ray for an actor of ours."""

    cluster: Cluster
    quiet_s: float = 0.0
    restart_s: float = 0.0
    unseen_s: dict[str, float] = field(default_factory=dict)
    """What passes before anybody can know: a stopped process is only silent, and Ray looks for dead nodes by turns."""
    late_s: list[float] = field(default_factory=list)


def timed(model: WarmModel) -> float:
    until(lambda: len({w["node"] for w in model.crew()}) >= 3, PATIENCE_S)
    began = time.monotonic()
    model.wait(timeout_s=PATIENCE_S)
    return time.monotonic() - began


@pytest.fixture(scope="module")
def ground(store: Path) -> Iterator[Ground]:
    with make_cluster() as cluster:
        add_nodes(cluster, 2)
        session = remote.connect(cluster.address, 1)
        ground = Ground(cluster)
        quiet, restarts = [], []
        for _ in range(3):
            with warm_up(SlowStore(store, SLOW_S), workers=2, qualities=QUALITIES) as model:
                quiet.append(timed(model))
                began = time.monotonic()
                handle = model._crew._start_worker("w99", node=remote.this_node(), required=True)
                ray.get(handle.hello.remote())
                restarts.append(time.monotonic() - began)
                ray.kill(handle)
        with session.use():
            ground.unseen_s = {"stopped worker": Policy().silence_s, "node": time_of_death(cluster)}
        ground.quiet_s, ground.restart_s = statistics.median(quiet), statistics.median(restarts)
        yield ground
        session.close()
    late = sorted(ground.late_s)
    if late:
        print(
            f"\n{len(late)} kills; without one {ground.quiet_s:.1f} s, a new worker {ground.restart_s:.1f} s, "
            f"silence {ground.unseen_s['stopped worker']:.1f} s, Ray sees a dead node after "
            f"{ground.unseen_s['node']:.1f} s; beyond these: median {statistics.median(late):.1f} s, "
            f"90 % {late[int(0.9 * (len(late) - 1))]:.1f} s, worst {late[-1]:.1f} s"
        )


def time_of_death(cluster: Cluster) -> float:
    """Seconds from a node's end until Ray says so."""
    node = add_nodes(cluster, 1)[0]
    living = remote.living_nodes()
    began = time.monotonic()
    cluster.remove_node(node, allow_graceful=False)
    until(lambda: len(remote.living_nodes()) < len(living), PATIENCE_S)
    return time.monotonic() - began


@pytest.mark.parametrize("seed", range(KILLS))
def test_kill(seed: int, ground: Ground, store: Path, sealed: SealedStore, checkpoint: dict[str, Array]) -> None:
    rng = random.Random(seed)
    what = rng.choice(["worker", "peer", "stopped worker", "coordinator", "both", "node"])
    extra = add_nodes(ground.cluster, 1)[0] if what == "node" else None
    with warm_up(SlowStore(store, SLOW_S), workers=3 if extra else 2, qualities=QUALITIES) as model:
        until(lambda: len({w["node"] for w in model.crew()}) >= (4 if extra else 3), PATIENCE_S)
        began = time.monotonic()
        time.sleep(rng.uniform(0.0, ground.quiet_s))
        crew = model.crew()
        home = model._home
        workers = [w["pid"] for w in crew if w["node"] != home]
        if what in ("worker", "both"):
            os.kill(rng.choice(workers), signal.SIGKILL)
        if what == "peer":  # who takes over for the consumer's node what the others ingest
            os.kill(next(w["pid"] for w in crew if w["node"] == home), signal.SIGKILL)
        if what == "stopped worker":
            os.kill(rng.choice(workers), signal.SIGSTOP)
        if what in ("coordinator", "both"):
            kill_coordinator(model)
        if extra is not None:
            ground.cluster.remove_node(extra, allow_graceful=False)
        model.wait(timeout_s=PATIENCE_S)
        took = time.monotonic() - began
        assert_exact(model, sealed, checkpoint)
        assert [g["generation"] for g in model.generations] == [1, 2, 3]
    late = took - ground.quiet_s - ground.restart_s - ground.unseen_s.get(what, 0.0)
    ground.late_s.append(late)
    print(f"seed {seed}: {what} killed: {took:.1f} s, {late:+.1f} s beyond what nobody can hasten")
