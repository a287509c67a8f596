"""What the driver's crew does by itself, beside a coordinator that never asks for anything."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import pytest
import ray
from ray import cloudpickle
from warming import is_alive, until

from holoray.actors import remote
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


class SilentCoordinator:
    """Lives, answers, and has nobody replaced."""

    def pid(self) -> int:
        return os.getpid()

    def introduce(self, member: Member) -> None: ...

    def dismissals(self, timeout_s: float) -> list[Any]:
        time.sleep(timeout_s)
        return []


def test_who_died_with_the_coordinator_is_replaced_before_the_next_one_asks() -> None:
    session = remote.connect(None, 2)
    crew = Crew(
        session,
        lambda name, *, node, required: ray.remote(IdleWorker).options(num_cpus=0).remote(),
        lambda member: None,
        lambda reign, members, fallen: ray.remote(SilentCoordinator).options(num_cpus=0, max_concurrency=4).remote(),
        home=None,
        workers=lambda: 2,
        policy=Policy(),
    )
    try:
        first = until(lambda: len(crew.members()) == 2 and crew.members(), PATIENCE_S)
        coordinator = crew.coordinator
        os.kill(first[0].pid, signal.SIGKILL)
        until(lambda: not is_alive(first[0].pid), PATIENCE_S)
        assert {member.name for member in crew.members()} == {"w0", "w1"}
        os.kill(ray.get(coordinator.pid.remote()), signal.SIGKILL)
        crew.await_successor(coordinator)
        until(lambda: {member.name for member in crew.members()} == {first[1].name, "w2"}, PATIENCE_S)
    finally:
        crew.close()
        session.close()
