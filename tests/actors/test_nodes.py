"""Warm-ups on Ray's own multi-node test cluster."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray._common.utils import get_default_ray_temp_dir
from ray.cluster_utils import Cluster
from warming import QUALITIES, SLOW_S, SlowStore, assert_exact, until

from holoray.actors.warm_model import WarmModel, warm_up
from holoray.pipelines.sealed_store import SealedStore
from holoray.tensor import Array

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head with the driver; tests add nodes. The temporary directory must be short (unix sockets)."""
    directory = tempfile.mkdtemp(prefix="hr-", dir="/tmp")
    options = {"object_store_memory": 80 << 20, "include_dashboard": False}
    Path(get_default_ray_temp_dir()).mkdir(exist_ok=True)  # Cluster writes its address there, and expects it to exist
    cluster = Cluster()
    cluster.add_node(num_cpus=0, temp_dir=directory, **options)
    cluster.options = options
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(directory, ignore_errors=True)


def nodes_of(model: WarmModel) -> set[str]:
    return {worker["node"] for worker in model.crew()}


@pytest.mark.parametrize("loses_a_node", [False, True])
def test_two_nodes_and_a_receiver(
    loses_a_node: bool, cluster: Cluster, store: Path, sealed: SealedStore, checkpoint: dict[str, Array]
) -> None:
    nodes = [cluster.add_node(num_cpus=1, **cluster.options) for _ in range(2)]
    cluster.wait_for_nodes()
    with warm_up(SlowStore(store, SLOW_S), workers=2, qualities=QUALITIES, address=cluster.address) as model:
        until(lambda: len(nodes_of(model)) == 3)  # the driver's node has a receiver
        if loses_a_node:
            time.sleep(0.3)
            assert model.quality < 1.0, "lost too late to matter"
            cluster.remove_node(nodes[0], allow_graceful=False)
        model.wait(timeout_s=90)
        assert_exact(model, sealed, checkpoint)
        assert [g["generation"] for g in model.generations] == [1, 2, 3]
