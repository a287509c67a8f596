"""What the coordinator tells its brain of the nodes, without Ray."""

from __future__ import annotations

import time
from unittest import mock

import numpy as np

from holoray.actors.coordinator import Coordinator
from holoray.actors.messages import Command, Event, NodeLost, WorkerLost
from holoray.actors.roster import Policy
from holoray.actors.worker import JobSpec, Member
from holoray.pipelines.sealed_store import SealedStore


class Listener:
    """In the place of the brain."""

    def __init__(self) -> None:
        self.heard: list[Event] = []

    def handle(self, event: Event) -> list[Command]:
        self.heard.append(event)
        return []


def test_a_node_that_dies_after_its_worker_is_not_waited_for(sealed: SealedStore) -> None:
    living = {"here", "there"}
    spec = JobSpec("job", sealed.store, sealed.root, strict=True)
    encoded = np.frombuffer(sealed.manifest.encoded, np.uint8)
    coordinator = Coordinator(
        spec,
        encoded,
        [1.0],
        home="here",
        expected=2,
        living_nodes=lambda: set(living),
        started=time.monotonic(),
        policy=Policy(),
    )
    listener = Listener()
    coordinator._brain = listener  # type: ignore[assignment]
    for name, node in (("w0", "here"), ("w1", "there")):
        coordinator._enlist(Member(name, mock.Mock(), node, 1, ingests=True))

    coordinator._lost("w1")
    assert [type(event) for event in listener.heard] == [WorkerLost]
    coordinator._tick()
    assert not any(isinstance(event, NodeLost) for event in listener.heard)
    living.discard("there")
    coordinator._tick()
    coordinator._tick()
    assert [event.node for event in listener.heard if isinstance(event, NodeLost)] == ["there"]
