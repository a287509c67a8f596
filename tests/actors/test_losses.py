"""Going on without fragments of which no source has an honest copy: schedules, decisions, and what lies in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from on_cpu import CpuDevice
from one_process import OneProcess, sharded
from schedules import manifest_of, run
from simulator import PATIENT
from test_in_place import contents, small, spec, twins  # noqa: F401 - fixtures
from test_segment import assert_same
from test_state import PART, first_assignments, whole

import holoray
from holoray.actors.device_memory import DeviceGenerations
from holoray.actors.goals import cut, goals
from holoray.actors.in_place import InPlaceGenerations
from holoray.actors.losses import Losses
from holoray.actors.messages import (
    Assign,
    GiveUp,
    Holdings,
    Kind,
    Publish,
    Survey,
    Taken,
    TaskDone,
    WorkerJoined,
)
from holoray.actors.state import Brain
from holoray.actors.worker import JobSpec
from holoray.errors import IntegrityError, QualityError
from holoray.pipelines.curve import Key
from holoray.pipelines.fault_policy import FaultPolicy
from holoray.pipelines.ledger import QualityLedger
from holoray.pipelines.sealed_store import SealedStore
from holoray.stores import LocalStore, fragment_file

SKIP: Final = FaultPolicy(skip_corrupted=True)
QUALITIES: Final = (0.99, 1.0)
MANIFEST: Final = manifest_of(5)
PLANES: Final = next(t for t, entry in enumerate(MANIFEST.tensors) if entry.codec == "planes")
RAW: Final = next(t for t, entry in enumerate(MANIFEST.tensors) if entry.mandatory)
CHAIN: Final = sorted((f for f in MANIFEST.tensors[PLANES].fragments if f.slot == 0), key=lambda f: f.layer)
SLOT: Final = (PLANES, 0)

KINDS: Final[tuple[dict[str, bool], ...]] = ({}, {"devices": True}, {"shards": True}, {"in_place": True})


@pytest.mark.fault("lying-source", "worker-killed", "coordinator-killed")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_schedule_with_corrupt_fragments_ends_with_the_rest(kind: dict[str, bool]) -> None:
    for seed in range(PART // 4):
        run(seed, corrupt=True, **kind)
        run(seed, rotten=True, **kind)


@pytest.mark.soak
@pytest.mark.parametrize("part", range(10))
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_very_many_schedules_with_corrupt_fragments_end_with_the_rest(part: int, kind: dict[str, bool]) -> None:
    for seed in range(part * 5 * PART, (part + 1) * 5 * PART):
        run(seed, corrupt=True, **kind)
        run(seed, rotten=True, **kind)


# -- decisions ------------------------------------------------------------------------------------------------


def brain(**choices: Any) -> Brain:
    return Brain(MANIFEST, QUALITIES, home="n0", expected=2, policy=PATIENT, **choices)


def keys_from(layer: int) -> frozenset[Key]:
    """Fragments of one slot, from a layer on."""
    return frozenset((PLANES, f.index) for f in CHAIN[layer:])


class Played:
    """All that is said until the end, by workers of one node that do what they are asked, but for what they miss."""

    def __init__(self, machine: Brain, workers: str, missing: Callable[[str], frozenset[Key]]) -> None:
        self.tasks: list[Assign] = []
        self.published: list[Publish] = []
        self.error: Exception | None = None
        todo = [c for worker in workers for c in machine.handle(WorkerJoined(0.0, worker, "n0"))]
        while todo:
            command = todo.pop(0)
            if isinstance(command, Assign):
                self.tasks.append(command)
                asked = {(u.tensor, f.index) for u in command.units for f in u.fragments}
                found = Survey() if command.kind is Kind.SURVEY else None
                missed = missing(command.worker) & asked
                todo += machine.handle(TaskDone(1.0, command.worker, command.epoch, found, missed))
            elif isinstance(command, Publish):
                self.published.append(command)
                todo += machine.handle(Taken(1.0, command.generation))
            elif isinstance(command, GiveUp):
                self.error = command.error

    def readers_of(self, index: int) -> list[str]:
        return [
            task.worker
            for task in self.tasks
            for unit in task.units
            if unit.tensor == PLANES and any(f.index == index for f in unit.fragments)
        ]


def test_another_worker_tries_before_anything_is_lost() -> None:
    bad = keys_from(2)
    played = Played(brain(losses=Losses(skips=True)), "ab", lambda worker: bad if worker == "a" else frozenset())
    assert played.error is None
    assert played.published[-1].quality.complete
    assert played.published[-1].lost == frozenset()
    assert played.readers_of(CHAIN[2].index)[-1] == "b"


@pytest.mark.parametrize("workers", ["a", "ab"])
def test_what_nobody_can_read_is_lost_and_not_counted(workers: str) -> None:
    bad = keys_from(2)
    played = Played(brain(losses=Losses(skips=True)), workers, lambda _: bad)
    assert played.error is None
    assert len(played.published) == 2
    assert played.published[-1].lost == bad
    assert sorted(played.readers_of(CHAIN[2].index)) == list(workers), "once by each, at most by two"
    ledger = QualityLedger(MANIFEST.tensors)
    for t, entry in enumerate(MANIFEST.tensors):
        for fragment in entry.fragments:
            if (t, fragment.index) not in bad:
                ledger.add(t, fragment.index)
    quality = played.published[-1].quality
    assert not quality.complete
    assert quality.ratio == pytest.approx(ledger.quality.ratio, abs=1e-12)


def test_the_least_quality_ends_it_at_once() -> None:
    played = Played(brain(losses=Losses(skips=True, min_quality=0.9999)), "a", lambda _: keys_from(0))
    assert isinstance(played.error, QualityError)
    assert "can only end" in str(played.error)
    assert len(played.published) < 2


def test_what_is_mandatory_ends_it() -> None:
    played = Played(brain(losses=Losses(skips=True)), "a", lambda _: frozenset([(RAW, 0)]))
    assert isinstance(played.error, QualityError)
    assert played.error.tensor == MANIFEST.tensors[RAW].name


@pytest.mark.parametrize(("taken", "announced"), [(1, 1), (0, 1)], ids=["in hand", "heard of"])
def test_what_was_published_is_not_lost_afterwards(taken: int, announced: int) -> None:
    """Its workers are gone with all that they held, and the sources went bad: quality would fall."""
    losses = Losses(skips=True, announced=announced)
    played = Played(brain(taken=taken, muster={}, losses=losses), "a", lambda _: keys_from(0))
    assert isinstance(played.error, IntegrityError)
    assert played.error.fragment == CHAIN[0].index
    assert not played.published
    fresh = Played(brain(losses=Losses(skips=True)), "a", lambda _: keys_from(0))
    assert fresh.error is None, "what nobody was told may be lost"


def test_a_follower_takes_no_slot_for_more_than_it_holds() -> None:
    """Nobody told it of a loss, so that it asks again for what the slot lacks; of what is lost for good it was told."""
    first, last = goals(MANIFEST, QUALITIES)
    lost = keys_from(len(first.whole[SLOT].fragments) - 1)
    short, _ = cut(MANIFEST, (first, last), lost)
    found = whole(short)
    assert found.slots[SLOT] == len(first.whole[SLOT].fragments) - 1
    for losses, again in ((Losses(skips=True), [SLOT]), (Losses(skips=True, lost=lost), [])):
        machine = brain(muster={"a": "n0"}, losses=losses)
        (survey,) = first_assignments(machine.handle(WorkerJoined(0.0, "a", "n0")), Kind.SURVEY)
        said = machine.handle(TaskDone(1.0, "a", survey.epoch, Survey(making=found)))
        asked = first_assignments(said, Kind.INGEST)
        assert [(unit.tensor, unit.slot) for task in asked for unit in task.units] == again
    machine = brain(muster={"a": "n0"}, losses=Losses(skips=True, lost=lost))
    (survey,) = first_assignments(machine.handle(WorkerJoined(0.0, "a", "n0")), Kind.SURVEY)
    said = machine.handle(TaskDone(1.0, "a", survey.epoch, Survey(making=whole(first))))
    assert SLOT in {(u.tensor, u.slot) for task in first_assignments(said, Kind.INGEST) for u in task.units}


# -- memory -----------------------------------------------------------------------------------------------------


class FlippedStore(LocalStore):
    """Whoever reads one of these places gets another byte."""

    def __init__(self, path: Path, places: set[tuple[str, int]]) -> None:
        super().__init__(path)
        self._places = places

    def read_into(self, name: str, offset: int, out: memoryview) -> int:
        count = super().read_into(name, offset, out)
        for file, at in self._places:
            if file == name and offset <= at < offset + count:
                out[at - offset] ^= 1
        return count


def flipped(store: SealedStore, numbers: set[int]) -> SealedStore:
    """The store as one place, with some fragments bad that may be skipped."""
    optional = [f for entry in store.manifest.tensors if not entry.mandatory for f in entry.fragments]
    bad = {optional[number % len(optional)] for number in numbers}
    assert isinstance(store.store, LocalStore)
    places = {(fragment_file(f.file), f.offset + f.stored_bytes // 2) for f in bad}
    return holoray.open(FlippedStore(Path(store.store.path), places), fault_policy=SKIP)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sets(st.integers(0, 200), min_size=1, max_size=12),
    st.sets(st.tuples(st.integers(1, 3), st.integers(1, 10)), max_size=6),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
)
def test_every_generation_is_what_a_load_that_skips_gives(
    spec: JobSpec,  # noqa: F811
    small: SealedStore,  # noqa: F811
    numbers: set[int],
    failing: set[tuple[int, int]],
    devices: int,
    shards: bool,
    in_place: bool,
) -> None:
    sealed, qualities = flipped(small, numbers), (0.9, 0.999, 1.0)
    reference = sealed.loader()
    assert spec.accelerator is not None
    job = replace(
        spec,
        store=sealed.store,
        fault_policy=SKIP,
        placement=sharded(shards),
        accelerator=replace(spec.accelerator, in_place=in_place),
    )

    def look(run: OneProcess, generation: int) -> None:
        quality = reference.load(holoray.Target(quality=qualities[generation - 1]))
        found, expected = contents(sealed, run, generation), reference.state_dict()
        union = {name: array for one in found for name, array in one.items()}
        for own in [union] if shards else found:
            assert_same(own, expected)
        assert run.published[-1].quality.ratio == pytest.approx(quality.ratio, abs=1e-12)

    run = OneProcess(job, sealed, qualities, look, devices=devices, failing=failing)
    assert run.error is None
    assert [p.generation for p in run.published] == [1, 2, 3]
    assert run.published[-1].lost


@pytest.fixture(params=[DeviceGenerations, InPlaceGenerations])
def memory(request: pytest.FixtureRequest, small: SealedStore) -> DeviceGenerations:  # noqa: F811
    found: DeviceGenerations = request.param(small.manifest, CpuDevice(None))
    found.make(1)
    return found


def test_of_what_was_begun_and_is_lost_nothing_stays(memory: DeviceGenerations, small: SealedStore) -> None:  # noqa: F811
    """Of every codec: a slot that holds no fragment is zeros, whatever somebody had written there."""
    slots = {(t, f.slot) for t, entry in enumerate(small.manifest.tensors) for f in entry.fragments}
    for block in memory._generations[1].blocks:
        block.memory[:] = 0xA5
    for t, slot in slots:
        accumulator = memory.accumulator(t)
        if accumulator.needs_finalize:
            accumulator._scatter(slot, np.full(accumulator._count(slot), 7.0, np.float32))  # type: ignore[attr-defined]
    memory.carry(dict.fromkeys(slots, 0))
    memory.seal(range(len(small.manifest.tensors)))
    assert memory.survey(1).making == Holdings(dict.fromkeys(slots, 0), frozenset(range(len(small.manifest.tensors))))
    for t in range(len(small.manifest.tensors)):
        assert not memory.fetch(1, t).any(), small.manifest.tensors[t].name
