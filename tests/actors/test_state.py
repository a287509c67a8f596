"""The brain under simulated schedules, and its bounds one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

import pytest
from schedules import manifest_of, run, schedule
from simulator import PATIENT

from holoray.actors.goals import Goal, check_qualities, count_with, first_layer, goals, needs_sealing
from holoray.actors.messages import (
    Abort,
    Assign,
    Command,
    GiveUp,
    Holdings,
    Kind,
    NodeLost,
    Publish,
    Pulse,
    Restart,
    Slot,
    Survey,
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
from holoray.pipelines.plan import Unit

PART = 100


@pytest.mark.fault("worker-killed", "node-lost", "stale-answer")
@pytest.mark.parametrize("part", range(10))
def test_every_schedule_ends_whole(part: int) -> None:
    for seed in range(part * PART, (part + 1) * PART):
        run(seed)


@pytest.mark.soak
@pytest.mark.parametrize("part", range(10))
def test_very_many_schedules_end_whole(part: int) -> None:
    for seed in range(part * 100 * PART, (part + 1) * 100 * PART):
        run(seed)


def test_same_seed_same_schedule() -> None:
    for seed in range(0, 200, 7):
        assert schedule(seed).run().digest() == schedule(seed).run().digest()


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
    """What workers of a node are asked to do at first; the survey of the node, which is answered, left out."""
    assigned: list[Assign] = []
    for worker in workers:
        for command in machine.handle(WorkerJoined(0.0, worker, "n0")):
            if isinstance(command, Assign) and command.kind is Kind.SURVEY:
                answered = machine.handle(TaskDone(0.0, worker, command.epoch, Survey()))
                assigned += [c for c in answered if isinstance(c, Assign)]
            elif isinstance(command, Assign):
                assigned.append(command)
    return assigned


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


def test_it_gives_up_once_and_asks_for_nothing_more() -> None:
    machine = brain(Policy(max_attempts=1))
    assert len(join(machine, "a")) == 2
    (command,) = machine.handle(WorkerLost(1.0, "a"))
    assert isinstance(command, GiveUp)
    assert machine.handle(WorkerLost(1.0, "b")) == []


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
    machine.handle(Pulse(5.0, "a"))
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


# -- after a dead coordinator, and on several nodes ---------------------------------------------------------


SEALED = frozenset(range(9))


def first_assignments(commands: list[Command], kind: Kind) -> list[Assign]:
    return [c for c in commands if isinstance(c, Assign) and c.kind is kind]


def follow_up(**legacy: Any) -> Brain:
    return Brain(manifest_of(2), (0.5, 1.0), home="n0", expected=2, policy=PATIENT, **legacy)


def test_nothing_is_asked_before_every_worker_has_left_the_dead_coordinator() -> None:
    machine = follow_up(muster={"a": "n0", "b": "n1"})
    assert machine.handle(WorkerJoined(0.0, "a", "n0")) == []
    assert machine.handle(WorkerJoined(0.0, "c", "n0")) == []
    surveys = machine.handle(WorkerJoined(0.0, "b", "n1"))
    assert {(c.worker, c.kind) for c in surveys if isinstance(c, Assign)} == {("a", Kind.SURVEY), ("b", Kind.SURVEY)}


def test_a_worker_lost_at_the_muster_is_fenced() -> None:
    machine = follow_up(muster={"a": "n0", "b": "n0"}, fallen={"n0": ["z"]})
    machine.handle(WorkerJoined(0.0, "a", "n0"))
    commands = machine.handle(WorkerLost(1.0, "b"))
    assert Restart("b") in commands
    (survey,) = first_assignments(commands, Kind.SURVEY)
    assert survey.fence == ("z", "b")


def test_what_a_node_holds_is_not_read_again() -> None:
    goal = goals(manifest_of(2), (0.5, 1.0))[0]
    units = {(u.tensor, u.slot): u for u in goal.new}
    missing = next(iter(units))
    machine = follow_up(muster={"a": "n0"})
    (survey,) = first_assignments(machine.handle(WorkerJoined(0.0, "a", "n0")), Kind.SURVEY)
    found = Survey(making=whole(goal, but=[missing]))
    ingests = first_assignments(machine.handle(TaskDone(1.0, "a", survey.epoch, found)), Kind.INGEST)
    assert [unit for task in ingests for unit in task.units] == [units[missing]]
    assert machine.inherited_bytes == sum(u.stored_bytes for u in goal.new) - units[missing].stored_bytes


def test_nothing_is_read_before_every_node_has_said_what_it_holds() -> None:
    """Also one whose workers died with the coordinator: another may join there."""
    machine = follow_up(muster={"a": "n0"}, fallen={"n1": ["b"]})
    (survey,) = first_assignments(machine.handle(WorkerJoined(0.0, "a", "n0")), Kind.SURVEY)
    assert machine.handle(TaskDone(1.0, "a", survey.epoch, Survey())) == []
    (survey,) = first_assignments(machine.handle(WorkerJoined(2.0, "c", "n1")), Kind.SURVEY)
    found = Survey(making=whole(goals(manifest_of(2), (0.5, 1.0))[0]))
    said = machine.handle(TaskDone(3.0, "c", survey.epoch, found))
    assert {c.kind for c in said if isinstance(c, Assign)} == {Kind.TRANSFER}


def of_units(units: Iterable[Unit], sealed: frozenset[int] = frozenset()) -> Holdings:
    """What somebody holds who has added these units."""
    return Holdings({(unit.tensor, unit.slot): count_with(unit) for unit in units}, sealed)


def whole(goal: Goal, sealed: frozenset[int] = frozenset(), *, but: Collection[Slot] = ()) -> Holdings:
    """What somebody holds who has all of a generation but some slots."""
    return of_units((unit for slot, unit in goal.whole.items() if slot not in but), sealed)


def test_a_follower_goes_on_after_what_the_consumer_has() -> None:
    first, last = goals(manifest_of(2), (0.5, 1.0))
    machine = follow_up(taken=1, muster={"a": "n0"})
    (survey,) = first_assignments(machine.handle(WorkerJoined(0.0, "a", "n0")), Kind.SURVEY)
    assert survey.generation == 2
    found = Survey(last=whole(first, SEALED))
    ingests = first_assignments(machine.handle(TaskDone(1.0, "a", survey.epoch, found)), Kind.INGEST)
    assert {u for task in ingests for u in task.units} <= set(last.new)
    assert all(task.generation == 2 for task in ingests)


def test_only_the_hole_of_a_last_generation_is_read_from_nothing() -> None:
    """And a tensor whose state was not turned into weights counts as a hole."""
    manifest = manifest_of(5)
    first, last = goals(manifest, (0.5, 1.0))
    machine = Brain(manifest, (0.5, 1.0), home="n0", expected=2, policy=PATIENT, taken=1, muster={"a": "n0"})
    (survey,) = first_assignments(machine.handle(WorkerJoined(0.0, "a", "n0")), Kind.SURVEY)
    layered = [(u.tensor, u.slot) for u in last.new if first_layer(u)]
    stateful = {t for t, codec in enumerate(manifest.codecs) if needs_sealing(codec)}
    hole = {layered[0]} | {slot for slot in first.whole if slot[0] in stateful}
    assert len(layered) > 1
    assert len(hole) > 1
    found = Survey(last=whole(first, SEALED - stateful, but=layered[:1]))
    todo, units = machine.handle(TaskDone(1.0, "a", survey.epoch, found)), dict[Slot, Unit]()
    while ingests := first_assignments(todo, Kind.INGEST):
        units |= {(u.tensor, u.slot): u for task in ingests for u in task.units}
        todo = [c for task in ingests for c in machine.handle(TaskDone(2.0, "a", task.epoch))]
    refined = {(u.tensor, u.slot): u for u in last.new}
    assert units == {s: last.whole[s] if s in hole else refined[s] for s in hole | refined.keys()}


def layered_and_taken(*, base_ingests: bool) -> tuple[Brain, list[Assign]]:
    """The last generation is on n0 alone; a worker of n1 has just joined. Returns what both are to ingest."""
    first, _ = goals(manifest_of(7), (0.5, 1.0))
    machine = Brain(manifest_of(7), (0.5, 1.0), home="n0", expected=2, policy=PATIENT, taken=1, muster={})
    found, asked = {"a": Survey(last=whole(first, SEALED)), "b": Survey()}, []
    surveys = machine.handle(WorkerJoined(0.0, "a", "n0", base_ingests)) + machine.handle(WorkerJoined(0.0, "b", "n1"))
    for survey in first_assignments(surveys, Kind.SURVEY):
        asked += machine.handle(TaskDone(1.0, survey.worker, survey.epoch, found[survey.worker]))
    return machine, first_assignments(asked, Kind.INGEST)


@pytest.mark.parametrize("base_ingests", [True, False])
def test_refining_is_for_who_has_the_last_generation(base_ingests: bool) -> None:
    """Else what a node holds would be read again for one that does not; a receiver steps in where it must."""
    _, ingests = layered_and_taken(base_ingests=base_ingests)
    refining = [task for task in ingests if task.units[0].fragments[0].layer]
    assert refining
    assert all(task.worker == "a" for task in refining)


def test_refining_is_for_who_has_exactly_these_slots() -> None:
    """Two nodes have half of the last generation each: nothing is read from nothing, and each refines its own half."""
    manifest = manifest_of(5)
    first, last = goals(manifest, (0.5, 1.0))
    refining = [(u.tensor, u.slot) for u in last.new if first_layer(u)]
    halves = {"a": set(refining[::2]), "b": set(refining[1::2])}
    machine = Brain(manifest, (0.5, 1.0), home="n0", expected=2, policy=PATIENT, taken=1, muster={"a": "n0", "b": "n1"})
    machine.handle(WorkerJoined(0.0, "a", "n0"))
    todo = machine.handle(WorkerJoined(0.0, "b", "n1"))
    refined: dict[str, set[Slot]] = {"a": set(), "b": set()}
    while todo:
        task = todo.pop(0)
        if not isinstance(task, Assign) or task.kind not in (Kind.SURVEY, Kind.INGEST):
            continue
        for unit in task.units:
            if first_layer(unit):
                refined[task.worker].add((unit.tensor, unit.slot))
        found = Survey(last=whole(first, SEALED, but=set(refining) - halves[task.worker]))
        todo += machine.handle(TaskDone(1.0, task.worker, task.epoch, found))
    assert refined == halves


def test_refining_that_nobody_can_do_any_more_begins_anew() -> None:
    """The files of the last generation were removed behind our backs while the worker of the node was away."""
    machine, ingests = layered_and_taken(base_ingests=True)
    machine.handle(WorkerLost(2.0, "a"))
    (survey,) = first_assignments(machine.handle(WorkerJoined(3.0, "c", "n0")), Kind.SURVEY)
    seen = machine.handle(TaskDone(4.0, "c", survey.epoch, Survey()))
    todo = [c for c in [*ingests, *seen] if isinstance(c, Assign) and c.worker != "a"]
    done: list[Assign] = []
    while todo:
        task = todo.pop()
        done.append(task)
        todo += [c for c in machine.handle(TaskDone(5.0, task.worker, task.epoch)) if isinstance(c, Assign)]
    assert all(unit.fragments[0].layer == 0 for task in done for unit in task.units)
    last = goals(manifest_of(7), (0.5, 1.0))[1]
    assert {u for task in done for u in task.units} == set(last.whole.values())


def test_what_was_done_before_its_worker_died_is_found_by_the_survey() -> None:
    """Its answer was never heard, so that it is queued again, but nobody else has begun."""
    machine = brain(workers=1)
    lost = join(machine, "a")
    machine.handle(WorkerLost(1.0, "a"))
    (survey,) = first_assignments(machine.handle(WorkerJoined(2.0, "b", "n0")), Kind.SURVEY)
    found = of_units(u for task in lost for u in task.units)
    commands = machine.handle(TaskDone(3.0, "b", survey.epoch, Survey(making=found)))
    assert not found.slots.keys() & {(u.tensor, u.slot) for c in commands if isinstance(c, Assign) for u in c.units}


def test_what_a_survey_finds_while_it_is_under_way_is_not_tried_again() -> None:
    machine = follow_up(muster={"a": "n0", "b": "n1"})
    machine.handle(WorkerJoined(0.0, "a", "n0"))
    (survey,) = first_assignments(machine.handle(WorkerLost(1.0, "b")), Kind.SURVEY)
    assert first_assignments(machine.handle(TaskDone(2.0, "a", survey.epoch, Survey())), Kind.INGEST) == []
    asked = first_assignments(machine.handle(NodeLost(5.0, "n1")), Kind.INGEST)
    (survey,) = first_assignments(machine.handle(WorkerJoined(6.0, "d", "n1")), Kind.SURVEY)
    found = of_units(asked[0].units)
    todo = [*asked[1:], *machine.handle(TaskDone(7.0, "d", survey.epoch, Survey(making=found)))]
    todo += machine.handle(TaskFailed(8.0, asked[0].worker, asked[0].epoch, SourceError("gone")))
    while ingests := [c for c in todo if isinstance(c, Assign) and c.kind is Kind.INGEST]:
        assert not found.slots.keys() & {(u.tensor, u.slot) for task in ingests for u in task.units}
        todo = [c for task in ingests for c in machine.handle(TaskDone(9.0, task.worker, task.epoch))]


def test_a_node_without_workers_is_waited_for_and_then_read_again() -> None:
    machine = Brain(manifest_of(2), (1.0,), home="n0", expected=2, policy=Policy(return_s=5.0))
    asked: dict[str, list[Assign]] = {}
    for worker, node in (("a", "n0"), ("b", "n1")):
        (survey,) = first_assignments(machine.handle(WorkerJoined(0.0, worker, node)), Kind.SURVEY)
        asked[worker] = first_assignments(machine.handle(TaskDone(0.0, worker, survey.epoch, Survey())), Kind.INGEST)
    held = {(u.tensor, u.slot) for u in asked["b"][0].units}
    machine.handle(TaskDone(1.0, "b", asked["b"][0].epoch))
    todo = asked["a"] + [c for c in machine.handle(WorkerLost(2.0, "b")) if isinstance(c, Assign)]
    redone: dict[float, set[Slot]] = {}
    for now in (3.0, 6.5, 8.0):
        heard = machine.handle(Pulse(now, "a")) + machine.handle(Tick(now))
        todo += [c for c in heard if isinstance(c, Assign)]
        while todo:
            task = todo.pop(0)
            redone.setdefault(now, set()).update((u.tensor, u.slot) for u in task.units)
            todo += [c for c in machine.handle(TaskDone(now, "a", task.epoch)) if isinstance(c, Assign)]
    assert not held & (redone.get(3.0, set()) | redone.get(6.5, set()))
    assert held <= redone[8.0]


def test_a_stopped_worker_is_replaced_though_its_task_may_take_long() -> None:
    machine = brain(Policy(silence_s=4.0))
    join(machine, "a", "b")
    for now in (2.0, 4.0):
        assert machine.handle(Pulse(now, "b")) == []
        assert machine.handle(Tick(now)) == []
    assert Restart("a") in machine.handle(Tick(5.0))
    assert machine.handle(Pulse(5.5, "a")) == []


def test_who_slept_does_not_blame_the_others() -> None:
    machine = brain(Policy(silence_s=4.0))
    join(machine, "a")
    machine.handle(Tick(1.0))
    assert machine.handle(Tick(100.0)) == []


@pytest.mark.parametrize("field", ["in_flight", "patience_s", "silence_s"])
def test_impossible_bounds_are_refused(field: str) -> None:
    with pytest.raises(UsageError, match=field):
        Policy(**{field: -1})


# -- devices ------------------------------------------------------------------------------------------------


@pytest.mark.fault("collective-lost", "worker-killed", "stale-answer")
def test_every_schedule_of_devices_ends_whole() -> None:
    worlds = [run(seed, devices=True) for seed in range(PART)]
    assert sum(world.meetings.combined for world in worlds) > PART, "schedules in which groups combine"
    assert sum(world.meetings.broken for world in worlds) > PART / 2, "and in which they break up"


@pytest.mark.soak
@pytest.mark.parametrize("part", range(10))
def test_very_many_schedules_of_devices_end_whole(part: int) -> None:
    for seed in range(part * 20 * PART, (part + 1) * 20 * PART):
        run(seed, devices=True)


def on_devices(count: int, policy: Policy = PATIENT) -> tuple[Brain, list[Assign]]:
    """A brain, and what its devices are asked once all is ingested: to combine."""
    machine = Brain(manifest_of(6), (1.0,), home=None, expected=count, collective=True, policy=policy)
    todo: list[Assign] = []
    for i in range(count):
        (survey,) = first_assignments(machine.handle(WorkerJoined(0.0, f"w{i}", f"d{i}")), Kind.SURVEY)
        todo += first_assignments(machine.handle(TaskDone(0.0, survey.worker, survey.epoch, Survey())), Kind.INGEST)
    combines: list[Assign] = []
    while todo:
        task = todo.pop(0)
        for command in machine.handle(TaskDone(1.0, task.worker, task.epoch)):
            assert isinstance(command, Assign)
            (combines if command.kind is Kind.COMBINE else todo).append(command)
    return machine, combines


def test_devices_combine_at_once_and_each_slot_has_one_contributor() -> None:
    machine, combines = on_devices(3)
    assert [task.rank for task in combines] == [0, 1, 2]
    (group,) = {task.group for task in combines}
    assert group is not None
    assert group.size == 3
    for task in combines:
        own = own_slots(task)
        assert own.isdisjoint(task.slots)
        assert own | set(task.slots) == set(group.slots)
    asked = [c for task in combines for c in machine.handle(TaskDone(2.0, task.worker, task.epoch))]
    assert all(isinstance(c, Assign) and c.kind is Kind.SEAL for c in asked)


@pytest.mark.fault("collective-lost")
@pytest.mark.parametrize("how", ["fails", "dies", "hangs"])
def test_a_broken_group_is_told_and_slots_travel_one_by_one(how: str) -> None:
    machine, combines = on_devices(3, Policy(combine_timeout_s=5.0, silence_s=1e9))
    first, *others = combines
    assert first.group is not None
    if how == "fails":
        said = machine.handle(TaskFailed(2.0, first.worker, first.epoch, WorkerLostError("a peer is gone")))
    elif how == "dies":
        said = machine.handle(WorkerLost(2.0, first.worker))
    else:
        assert machine.handle(Tick(4.0)) == []
        said = machine.handle(Tick(7.0))
    told = {task.worker for task in others} | ({first.worker} if how == "hangs" else set())
    aborts = [command for command in said if isinstance(command, Abort)]
    assert {command.worker for command in aborts} == told
    assert {command.group for command in aborts} == {first.group.number}
    assert machine.handle(Tick(8.0)) == [], "told once"
    if how == "dies":  # until there is another device, there are not enough
        (survey,) = first_assignments(machine.handle(WorkerJoined(8.0, "w9", "d9")), Kind.SURVEY)
        machine.handle(NodeLost(8.0, "d0"))
        said = machine.handle(TaskDone(8.0, "w9", survey.epoch, Survey()))
    asked = [command for command in said if isinstance(command, Assign)]
    for task in combines:
        lost = WorkerLostError("told to stop")
        asked += [c for c in machine.handle(TaskFailed(9.0, task.worker, task.epoch, lost)) if isinstance(c, Assign)]
    had = {t.worker: own_slots(t) for t in combines}
    arrived = others[0].slots[0]  # in a bucket that was whole
    surveyed, transfers = set[str](), list[Assign]()
    while asked:
        task = asked.pop(0)
        found: Survey | None = None
        if task.kind is Kind.SURVEY:
            surveyed.add(task.worker)
            here = had[task.worker] | ({arrived} if task.worker == others[0].worker else set())
            found = Survey(making=of_units(unit for slot, unit in machine._goals[0].whole.items() if slot in here))
        elif task.kind is Kind.TRANSFER:
            transfers.append(task)
            continue
        asked += [c for c in machine.handle(TaskDone(9.0, task.worker, task.epoch, found)) if isinstance(c, Assign)]
    assert surveyed == {task.worker for task in combines if how != "dies" or task is not first}
    assert transfers
    assert all(arrived not in task.slots for task in transfers if task.worker == others[0].worker)


def own_slots(task: Assign) -> set[Slot]:
    """What a member of a group contributes."""
    assert task.group is not None
    return {slot for slot, rank in zip(task.group.slots, task.group.owners, strict=True) if rank == task.rank}


def test_a_bug_in_combining_is_not_hidden() -> None:
    machine, combines = on_devices(2)
    error = TypeError("a bug")
    assert machine.handle(TaskFailed(2.0, combines[0].worker, combines[0].epoch, error)) == [GiveUp(error)]


@pytest.mark.fault("no-workers")
def test_a_device_that_never_comes_ends_the_warm_up() -> None:
    machine = Brain(manifest_of(2), (1.0,), home=None, expected=2, collective=True, policy=Policy(patience_s=5.0))
    join(machine, "a")
    for now in (1.0, 3.0, 6.0):
        assert not any(isinstance(c, GiveUp) for c in machine.handle(Tick(now)) + machine.handle(Pulse(now, "a")))
    (end,) = machine.handle(Tick(6.5))
    assert isinstance(end, GiveUp)
    assert isinstance(end.error, WorkerLostError)
