"""Ray's own multi-node test cluster, on one host."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import ray
from ray._common.utils import get_default_ray_temp_dir
from ray.cluster_utils import Cluster

_OPTIONS: Final = {"object_store_memory": 80 << 20, "include_dashboard": False}


@contextmanager
def make_cluster() -> Iterator[Cluster]:
    """A head without CPUs, for the driver; tests add nodes. The temporary directory must be short (unix sockets)."""
    directory = tempfile.mkdtemp(prefix="hr-", dir="/tmp")
    Path(get_default_ray_temp_dir()).mkdir(exist_ok=True)  # Cluster writes its address there, and expects it to exist
    cluster = Cluster()
    cluster.add_node(num_cpus=0, temp_dir=directory, **_OPTIONS)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(directory, ignore_errors=True)


def add_nodes(cluster: Cluster, count: int) -> list[Any]:
    """Nodes of one CPU each."""
    nodes = [cluster.add_node(num_cpus=1, **_OPTIONS) for _ in range(count)]
    cluster.wait_for_nodes()
    return nodes
