"""Devices that hold a part of the tensors each, and such as refine in place: schedules, and decisions one by one."""

from __future__ import annotations

from typing import Any

import pytest
from schedules import manifest_of, run
from simulator import PATIENT
from test_state import PART, first_assignments

from holoray.actors.messages import (
    Assign,
    Command,
    GiveUp,
    Kind,
    Publish,
    Pulse,
    Restart,
    Shard,
    Survey,
    TaskDone,
    TaskFailed,
    Tick,
    WorkerJoined,
    WorkerLost,
)
from holoray.actors.placement import Placement
from holoray.actors.roster import Policy
from holoray.actors.state import Brain
from holoray.errors import CapacityError, WorkerLostError


@pytest.mark.fault("worker-killed", "node-lost", "stale-answer")
def test_every_schedule_of_shards_ends_whole() -> None:
    for seed in range(PART):
        run(seed, shards=True)


@pytest.mark.soak
@pytest.mark.parametrize("part", range(10))
def test_very_many_schedules_of_shards_end_whole(part: int) -> None:
    for seed in range(part * 20 * PART, (part + 1) * 20 * PART):
        run(seed, shards=True)


@pytest.mark.fault("worker-killed", "collective-lost", "coordinator-killed")
@pytest.mark.parametrize("shards", [False, True])
def test_every_schedule_in_place_ends_whole(shards: bool) -> None:
    for seed in range(PART // 2):
        run(seed, shards=shards, in_place=True)


@pytest.mark.soak
@pytest.mark.parametrize("part", range(10))
@pytest.mark.parametrize("shards", [False, True])
def test_very_many_schedules_in_place_end_whole(part: int, shards: bool) -> None:
    for seed in range(part * 10 * PART, (part + 1) * 10 * PART):
        run(seed, shards=shards, in_place=True)


def sharded(count: int, policy: Policy = PATIENT, **legacy: Any) -> Brain:
    return Brain(
        manifest_of(6), (1.0,), home=None, expected=count, placement=Placement("shard"), policy=policy, **legacy
    )


class Shelf:
    """Devices that do at once what they are asked, and remember what they were told to hold."""

    def __init__(self, machine: Brain) -> None:
        self.machine = machine
        self.told: dict[str, Shard] = {}
        self.ingested: dict[str, list[int]] = {}
        self.said: list[Command] = []

    def hear(self, commands: list[Command]) -> None:
        """Obey, and all that follows from it."""
        while commands:
            command, *commands = commands
            if not isinstance(command, Assign):
                self.said.append(command)
                continue
            if command.shard is not None:
                self.told[command.worker] = command.shard
            self.ingested.setdefault(command.worker, []).extend(unit.tensor for unit in command.units)
            survey = Survey(shard=self.told.get(command.worker)) if command.kind is Kind.SURVEY else None
            commands = commands + self.machine.handle(TaskDone(0.0, command.worker, command.epoch, survey))

    def join(self, *workers: str) -> None:
        for worker in workers:
            self.hear(self.machine.handle(WorkerJoined(0.0, worker, f"d{worker}")))

    def pass_time(self, until: float, *living: str) -> None:
        """Ticks of a second, in which the living give signs of life."""
        while self.machine._now < until:
            now = self.machine._now + 1.0
            for worker in living:
                self.machine.handle(Pulse(now, worker))
            self.hear(self.machine.handle(Tick(now)))

    def held(self, *workers: str) -> list[int]:
        """What these were told, a tensor as often as it was told."""
        return sorted(tensor for worker in workers for tensor in self.told[worker].tensors)


def test_each_device_ingests_its_own_and_nobody_combines() -> None:
    machine = sharded(3)
    shelf = Shelf(machine)
    names = ("a", "b", "c", "spare")
    shelf.hear([command for name in names for command in machine.handle(WorkerJoined(0.0, name, f"d{name}"))])
    tensors = list(range(len(manifest_of(6).tensors)))
    assert shelf.held("a", "b", "c") == tensors
    assert shelf.held("spare") == []
    assert [type(command) for command in shelf.said] == [Publish]
    assert all(set(shelf.ingested[name]) == shelf.told[name].tensors for name in names)


@pytest.mark.fault("worker-killed")
def test_who_replaces_a_device_takes_its_shard() -> None:
    machine = sharded(2)
    shelf = Shelf(machine)
    shelf.join("a")
    machine.handle(WorkerJoined(0.0, "b", "db"))
    shelf.hear(machine.handle(WorkerLost(1.0, "a")))
    assert Restart("a") in shelf.said
    shelf.join("c")
    assert shelf.told["c"].tensors == shelf.told["a"].tensors
    assert shelf.told["c"].number > shelf.told["a"].number
    assert set(shelf.ingested["c"]) == shelf.told["c"].tensors, "read again"


@pytest.mark.fault("worker-killed", "no-workers")
def test_a_shard_for_which_nobody_comes_is_spread() -> None:
    shelf = Shelf(sharded(3, Policy(patience_s=5.0, silence_s=1e9)))
    shelf.join("a", "b")
    before = set(shelf.held("a", "b"))
    shelf.pass_time(5.0, "a", "b")
    assert set(shelf.held("a", "b")) == before
    assert not any(isinstance(command, Publish) for command in shelf.said)
    shelf.pass_time(9.0, "a", "b")
    assert shelf.held("a", "b") == list(range(len(manifest_of(6).tensors)))
    assert [type(command) for command in shelf.said] == [Publish]


@pytest.mark.fault("no-workers")
def test_shards_without_any_device_end_the_warm_up() -> None:
    shelf = Shelf(sharded(2, Policy(patience_s=5.0, silence_s=1e9)))
    shelf.pass_time(9.0)
    (end,) = shelf.said
    assert isinstance(end, GiveUp)
    assert isinstance(end.error, WorkerLostError)


@pytest.mark.fault("coordinator-killed", "stale-answer")
@pytest.mark.parametrize("order", [("old", "new"), ("new", "old")])
def test_of_two_who_were_told_the_same_the_later_one_holds_it(order: tuple[str, ...]) -> None:
    """The dead coordinator had given up on one of them, and the driver never heard of that."""
    everything = frozenset(range(len(manifest_of(6).tensors)))
    machine = sharded(2, reign=2, muster={"old": "dold", "new": "dnew"})
    shelf = Shelf(machine)
    shelf.told = {"old": Shard((1, 1), everything), "new": Shard((1, 3), everything - {0})}
    asked = [c for name in order for c in machine.handle(WorkerJoined(0.0, name, f"d{name}"))]
    shelf.hear(asked)
    assert shelf.told["new"] == Shard((1, 3), everything - {0}), "which it need not be told again"
    assert shelf.told["old"].tensors == {0}
    assert shelf.held("old", "new") == sorted(everything)


@pytest.mark.fault("no-device-memory")
def test_a_shard_that_does_not_fit_ends_the_warm_up_with_that_error() -> None:
    machine = sharded(1)
    (survey,) = first_assignments(machine.handle(WorkerJoined(0.0, "a", "da")), Kind.SURVEY)
    (told,) = first_assignments(machine.handle(TaskDone(0.0, "a", survey.epoch, Survey())), Kind.SURVEY)
    asked = machine.handle(TaskDone(0.0, "a", told.epoch, Survey(shard=told.shard)))
    error = CapacityError("no room", hint="larger devices")
    task = first_assignments(asked, Kind.INGEST)[0]
    assert machine.handle(TaskFailed(1.0, "a", task.epoch, error)) == [GiveUp(error)]
