"""What the driver's crew does by itself, beside a coordinator that never asks for anything."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import ray
from ray import cloudpickle
from warming import is_alive, until

from holoray.actors import remote
from holoray.actors.coordinator import Dismissal
from holoray.actors.crew import Crew
from holoray.actors.roster import Policy
from holoray.actors.worker import Hello, Member

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]
PATIENCE_S = 60.0

cloudpickle.register_pickle_by_value(sys.modules[__name__])


class IdleWorker:
    def hello(self) -> Hello:
        return Hello(remote.this_node(), os.getpid())

    def beat(self) -> None: ...


class QuietCoordinator:
    """Lives and answers; has somebody replaced when it is told to."""

    def __init__(self) -> None:
        self._named: list[Dismissal] = []

    def pid(self) -> int:
        return os.getpid()

    def name(self, dismissal: Dismissal) -> None:
        self._named.append(dismissal)

    def introduce(self, member: Member) -> None: ...

    def dismissals(self, timeout_s: float) -> list[Dismissal]:
        time.sleep(timeout_s)
        named, self._named = self._named, []
        return named


@dataclass
class Ground:
    crew: Crew
    first: list[Member]
    """The first two workers."""
    ended: list[str]
    """Whose processes were ended by force, beside what Ray does."""

    def await_workers(self, *names: str) -> None:
        until(lambda: {member.name for member in self.crew.members()} == set(names), PATIENCE_S)


@pytest.fixture(scope="module")
def session() -> Iterator[remote.Session]:
    session = remote.connect(None, 2)
    yield session
    session.close()


@pytest.fixture
def ground(session: remote.Session) -> Iterator[Ground]:
    ended: list[str] = []
    crew = Crew(
        session,
        lambda name, *, node, required: ray.remote(IdleWorker).options(num_cpus=0).remote(),
        lambda member: ended.append(member.name),
        lambda reign, members, fallen: ray.remote(QuietCoordinator).options(num_cpus=0, max_concurrency=4).remote(),
        home=None,
        workers=lambda: 2,
        policy=Policy(),
    )
    try:
        yield Ground(crew, until(lambda: len(crew.members()) == 2 and crew.members(), PATIENCE_S), ended)
    finally:
        crew.close()


def test_who_died_with_the_coordinator_is_replaced_before_the_next_one_asks(ground: Ground) -> None:
    victim, survivor = ground.first
    coordinator = ground.crew.coordinator
    os.kill(victim.pid, signal.SIGKILL)
    until(lambda: not is_alive(victim.pid), PATIENCE_S)
    assert ground.crew.members() == ground.first  # it is the coordinator's business to notice
    os.kill(ray.get(coordinator.pid.remote()), signal.SIGKILL)
    ground.crew.await_successor(coordinator)
    ground.await_workers(survivor.name, "w2")


@pytest.mark.fault("worker-killed")
def test_only_who_is_silent_is_ended_by_force(ground: Ground) -> None:
    ray.get(ground.crew.coordinator.name.remote(Dismissal("w0", silent=False)))
    ground.await_workers("w1", "w2")
    assert ground.ended == []
    ray.get(ground.crew.coordinator.name.remote(Dismissal("w1", silent=True)))
    ground.await_workers("w2", "w3")
    assert ground.ended == ["w1"]
