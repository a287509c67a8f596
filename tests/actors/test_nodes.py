"""Warm-ups on Ray's own multi-node test cluster."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import add_nodes, make_cluster
from ray.cluster_utils import Cluster
from warming import QUALITIES, SLOW_S, MeteredStore, assert_exact, until

from holoray.actors.coordinator import Generation
from holoray.actors.locks import Names
from holoray.actors.segment import attach_weights
from holoray.actors.warm_model import WarmModel, warm_up
from holoray.pipelines.sealed_store import SealedStore
from holoray.tensor import Array

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
PATIENCE_S = 120.0


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with make_cluster() as cluster:
        yield cluster


def nodes_of(model: WarmModel) -> set[str]:
    return {worker["node"] for worker in model.crew()}


def origin_of(store: Path, tmp_path: Path) -> MeteredStore:
    return MeteredStore(store, SLOW_S, tmp_path / "log")


def store_bytes(sealed: SealedStore) -> int:
    return sum(t.stored_bytes for t in sealed.manifest.tensors) + len(sealed.manifest.encoded)


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)])
def test_the_origin_is_read_once_and_a_node_that_joins_gets_its_share(
    count: int, cluster: Cluster, store: Path, sealed: SealedStore, checkpoint: dict[str, Array], tmp_path: Path
) -> None:
    origin = origin_of(store, tmp_path)
    add_nodes(cluster, count - 1)
    joined = threading.Event()

    def wait(model: WarmModel, generation: Generation) -> None:
        """The last generation waits for this to return from the first."""
        joined.wait(PATIENCE_S)

    with warm_up(origin, qualities=QUALITIES, address=cluster.address, on_generation=wait) as model:
        until(lambda: model.generation, PATIENCE_S)
        add_nodes(cluster, 1)
        until(lambda: len(nodes_of(model)) == count + 1, PATIENCE_S)  # the driver's node has a receiver
        joined.set()
        model.wait(timeout_s=PATIENCE_S)
        assert_exact(model, sealed, checkpoint)
        assert [g["generation"] for g in model.generations] == [1, 2, 3]
        share = origin.bytes_asked() / store_bytes(sealed)
        for node in nodes_of(model):
            there = attach_weights(sealed.manifest, Names(model._names.job, node), 3)
            assert all(there[name].tobytes() == array.tobytes() for name, array in model.state_dict().items()), node
    print(f"{count} nodes and one that joined read {share:.4f} of the store from its origin")
    assert share <= 1.05


@pytest.mark.fault("node-lost")
def test_a_killed_node_costs_what_nobody_else_held(
    cluster: Cluster, store: Path, sealed: SealedStore, checkpoint: dict[str, Array], tmp_path: Path
) -> None:
    origin = origin_of(store, tmp_path)
    nodes = add_nodes(cluster, 2)
    with warm_up(origin, workers=2, qualities=QUALITIES, address=cluster.address) as model:
        until(lambda: len(nodes_of(model)) == 3, PATIENCE_S)
        model.wait(QUALITIES[0], timeout_s=PATIENCE_S)
        read = origin.bytes_asked()
        cluster.remove_node(nodes[0], allow_graceful=False)
        model.wait(timeout_s=PATIENCE_S)
        assert_exact(model, sealed, checkpoint)
        assert [g["generation"] for g in model.generations] == [1, 2, 3]
    again = origin.bytes_asked() - store_bytes(sealed)
    lost = store_bytes(sealed) - model.generations[0]["bytes_read"]
    print(f"{again} bytes were read again after a node was killed at {read}")
    assert again <= lost, "the generation that every node held was read again"
