"""The brain under simulated schedules, and its bounds one by one."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache

import pytest
from simulator import PATIENT, Faults, Simulation, make_manifest

from holoray.actors.goals import check_qualities, goals
from holoray.actors.messages import (
    Assign,
    GiveUp,
    Kind,
    Publish,
    Restart,
    Taken,
    TaskDone,
    TaskFailed,
    Tick,
    WorkerJoined,
    WorkerLost,
)
from holoray.actors.roster import Policy
from holoray.actors.state import Brain
from holoray.errors import HolorayError, IntegrityError, SourceError, UsageError, WorkerLostError
from holoray.manifest import Manifest

SCHEDULES = 1_500
manifest_of = cache(make_manifest)


def schedule(seed: int) -> Simulation:
    """Everything about a schedule, from its seed."""
    rng = random.Random(seed)
    faults = Faults(
        kills=rng.randint(0, 6),
        node_losses=rng.randint(0, 2),
        failures=rng.choice([0.0, 0.1]),
        duplicates=rng.choice([0.0, 0.3]),
        hangs=rng.choice([0.0, 0.0, 0.03]),
        start_failures=rng.choice([0.0, 0.2]),
    )
    return Simulation(
        seed,
        manifest_of(rng.randrange(20)),
        rng.choice([(1.0,), (0.5, 1.0), (0.5, 0.9, 0.99, 1.0), (0.3, 0.9)]),
        nodes=rng.randint(1, 3),
        workers=rng.randint(1, 5),
        receiver=rng.random() < 0.3,
        faults=faults,
    )


@pytest.mark.fault("worker-killed", "node-lost", "stale-answer")
@pytest.mark.parametrize("part", range(10))
def test_every_schedule_ends_whole(part: int) -> None:
    for seed in range(part, SCHEDULES, 10):
        try:
            simulation = schedule(seed).run()
            assert simulation.gave_up is None
            assert simulation.published[-1].final
        except AssertionError as error:
            raise AssertionError(f"schedule({seed}): {error}") from error


def test_same_seed_same_schedule() -> None:
    for seed in range(0, 200, 7):
        assert schedule(seed).run().log == schedule(seed).run().log


def test_equal_workers_get_equal_shares() -> None:
    machine = brain(workers=4, manifest=manifest_of(6))
    todo = join(machine, "a", "b", "c", "d")
    share = Counter[str]()
    while todo:
        assigned = todo.pop(0)
        if assigned.kind is Kind.INGEST:
            share[assigned.worker] += sum(unit.stored_bytes for unit in assigned.units)
        commands = machine.handle(TaskDone(1.0, assigned.worker, assigned.epoch))
        todo += [c for c in commands if isinstance(c, Assign)]
    assert len(share) == 4
    assert min(share.values()) >= 0.5 * max(share.values())


def brain(policy: Policy = Policy(), workers: int = 2, manifest: Manifest | None = None) -> Brain:  # noqa: B008 - frozen
    return Brain(manifest or manifest_of(2), (1.0,), home="n0", expected=workers, policy=policy)


def join(machine: Brain, *workers: str) -> list[Assign]:
    commands = [c for w in workers for c in machine.handle(WorkerJoined(0.0, w, "n0"))]
    return [c for c in commands if isinstance(c, Assign)]


def test_workers_pull_two_tasks_at_a_time() -> None:
    machine = brain()
    first = join(machine, "a", "b")
    assert [c.worker for c in first] == ["a", "a", "b", "b"]
    (following,) = machine.handle(TaskDone(1.0, "a", first[0].epoch))
    assert isinstance(following, Assign)
    assert following.worker == "a"


@pytest.mark.fault("stale-answer")
def test_stale_and_repeated_answers_are_ignored() -> None:
    machine = brain()
    first = join(machine, "a")
    machine.handle(TaskDone(1.0, "a", first[0].epoch))
    assert machine.handle(TaskDone(1.0, "a", first[0].epoch)) == []
    machine.handle(WorkerLost(2.0, "a"))
    assert machine.handle(TaskDone(3.0, "a", first[1].epoch)) == []
    assert machine.handle(WorkerLost(3.0, "a")) == []
    redone = join(machine, "c")
    assert redone[0].units == first[1].units
    assert redone[0].fence == ("a",)


@pytest.mark.fault("worker-killed")
def test_lost_work_goes_to_the_living() -> None:
    machine = brain()
    first = join(machine, "a", "b")
    commands = machine.handle(WorkerLost(1.0, "a"))
    assert commands == [Restart("a")]
    again = machine.handle(TaskDone(2.0, "b", first[2].epoch))[0]
    assert isinstance(again, Assign)
    assert again.units in (first[0].units, first[1].units)


@pytest.mark.parametrize("error", [SourceError("gone"), IntegrityError("flipped")])
def test_what_keeps_failing_ends_with_its_own_error(error: HolorayError) -> None:
    machine = brain(Policy(max_attempts=3))
    assigned = join(machine, "a")[0]
    for _ in range(2):
        commands = machine.handle(TaskFailed(1.0, "a", assigned.epoch, error))
        assigned = next(c for c in commands if isinstance(c, Assign))
    assert machine.handle(TaskFailed(1.0, "a", assigned.epoch, error)) == [GiveUp(error)]
    assert machine.done
    assert machine.handle(Tick(9.0)) == []


def test_what_cannot_be_cured_ends_at_once() -> None:
    error = ValueError("a bug")
    machine = brain()
    assert machine.handle(TaskFailed(1.0, "a", join(machine, "a")[0].epoch, error)) == [GiveUp(error)]


def test_a_failed_task_is_tried_by_somebody_else() -> None:
    machine = brain()
    first = join(machine, "a", "b")
    commands = machine.handle(TaskFailed(1.0, "a", first[0].epoch, SourceError("gone")))
    assert all(isinstance(c, Assign) and c.units != first[0].units for c in commands)
    again = machine.handle(TaskDone(1.0, "b", first[2].epoch))[0]
    assert isinstance(again, Assign)
    assert again.units == first[0].units


@pytest.mark.fault("no-workers")
def test_restarts_are_bounded() -> None:
    machine = brain(Policy(max_restarts=3))
    for i in range(3):
        assert machine.handle(WorkerLost(float(i), f"w{i}")) == [Restart(f"w{i}")]
    (end,) = machine.handle(WorkerLost(4.0, "w4"))
    assert isinstance(end, GiveUp)
    assert isinstance(end.error, WorkerLostError)


@pytest.mark.fault("worker-killed")
def test_a_task_that_kills_its_workers_ends_the_warm_up() -> None:
    machine = brain(Policy(max_attempts=2))
    join(machine, "a")
    machine.handle(WorkerLost(1.0, "a"))
    join(machine, "b")
    (end,) = machine.handle(WorkerLost(2.0, "b"))
    assert isinstance(end, GiveUp)
    assert isinstance(end.error, WorkerLostError)


@pytest.mark.fault("no-workers")
def test_no_workers_for_too_long() -> None:
    machine = brain(Policy(patience_s=5.0))
    assert machine.handle(Tick(1.0)) == []
    assert machine.handle(Tick(5.0)) == []
    (end,) = machine.handle(Tick(6.5))
    assert isinstance(end, GiveUp)
    assert isinstance(end.error, WorkerLostError)


@pytest.mark.fault("stale-answer")
def test_the_dead_do_not_join_again() -> None:
    """A report of a join that was overtaken by the one of its death."""
    machine = brain()
    machine.handle(WorkerLost(1.0, "a"))
    assert join(machine, "a") == []
    assert join(machine, "b") != []


@pytest.mark.fault("stale-answer")
def test_a_worker_that_joins_twice_keeps_its_tasks() -> None:
    machine = brain()
    first = join(machine, "a")
    assert join(machine, "a") == []
    assert machine.handle(TaskDone(1.0, "a", first[0].epoch)) != []


@pytest.mark.fault("stale-answer")
def test_only_the_awaited_generation_is_taken() -> None:
    machine = Brain(manifest_of(2), (0.5, 1.0), home="n0", expected=1, policy=PATIENT)
    todo = list(join(machine, "a"))
    assert machine.handle(Taken(1.0, 1)) == []
    assert machine.generation == 1
    while todo:
        todo += [c for c in machine.handle(TaskDone(1.0, "a", todo.pop(0).epoch)) if isinstance(c, Assign)]
    assert machine.handle(Taken(2.0, 7)) == []
    assert machine.handle(Taken(2.0, 1)) != []
    before = machine.generation
    machine.handle(Taken(3.0, 1))
    assert machine.generation == before


@pytest.mark.fault("no-workers")
def test_work_done_forgives_earlier_restarts() -> None:
    machine = brain(Policy(max_restarts=2))
    assigned = join(machine, "a")
    for i in range(2):
        assert machine.handle(WorkerLost(1.0, f"w{i}")) == [Restart(f"w{i}")]
    machine.handle(TaskDone(2.0, "a", assigned[0].epoch))
    for i in range(2, 4):
        assert machine.handle(WorkerLost(3.0, f"w{i}")) == [Restart(f"w{i}")]
    assert not machine.done


@pytest.mark.fault("no-workers")
def test_patience_starts_again_with_a_worker() -> None:
    machine = brain(Policy(patience_s=5.0, task_timeout_s=1e9))
    machine.handle(Tick(1.0))
    join(machine, "a")
    assert machine.handle(Tick(4.0)) == []
    assert machine.handle(WorkerLost(4.5, "a")) == [Restart("a")]
    assert machine.handle(Tick(7.0)) == []
    assert machine.handle(Tick(11.9)) == []
    (end,) = machine.handle(Tick(12.1))
    assert isinstance(end, GiveUp)


@pytest.mark.fault("stale-answer")
def test_a_clock_that_jumps_back_changes_nothing() -> None:
    """Events of several processes may come with times out of order."""
    machine = brain(Policy(task_timeout_s=5.0))
    machine.handle(Tick(10.0))
    machine.handle(WorkerJoined(2.0, "a", "n0"))  # its tasks were given at 10, not at 2
    assert machine.handle(Tick(14.0)) == []
    assert machine.handle(Tick(16.0)) == [Restart("a")]


@pytest.mark.fault("worker-killed")
def test_a_silent_worker_is_replaced() -> None:
    machine = brain(Policy(task_timeout_s=5.0))
    join(machine, "a")
    assert machine.handle(Tick(4.0)) == []
    assert machine.handle(Tick(6.0)) == [Restart("a")]


def test_the_next_generation_waits_for_the_consumer() -> None:
    machine = Brain(manifest_of(2), (0.5, 1.0), home="n0", expected=1, policy=PATIENT)
    todo, published = list(join(machine, "a")), []
    while todo:
        for command in machine.handle(TaskDone(1.0, "a", todo.pop(0).epoch)):
            if isinstance(command, Assign):
                todo.append(command)
            else:
                published.append(command)
    assert [type(c) for c in published] == [Publish]
    assert machine.handle(Tick(2.0)) == []
    started = machine.handle(Taken(3.0, 1))
    assert started
    assert all(isinstance(c, Assign) and c.generation == 2 and c.kind is Kind.INGEST for c in started)


def test_goals_are_cumulative_and_without_repeats() -> None:
    manifest = manifest_of(3)
    found = goals(manifest, (1.0, 0.5, 0.500001, 1.0))
    assert found[-1].quality == 1.0
    assert sum(len(u.fragments) for goal in found for u in goal.new) == manifest.fragment_count
    assert sum(len(u.fragments) for u in found[-1].whole.values()) == manifest.fragment_count
    assert all(goal.new for goal in found)


@pytest.mark.parametrize("qualities", [(), (0.0,), (1.5,), (-1.0, 1.0)])
def test_impossible_targets_are_refused(qualities: tuple[float, ...]) -> None:
    with pytest.raises(UsageError):
        check_qualities(qualities)
