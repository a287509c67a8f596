"""Shared memory: reserved, shared, refined, carried over, swept."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from manifests import make_manifest

import holoray
from holoray.actors.goals import Goal, count_with, goals, needs_sealing
from holoray.actors.locks import DIRECTORY, DRIVER, Names, hold_lock, new_job, remove_job
from holoray.actors.marks import Marks
from holoray.actors.messages import Holdings, Slot
from holoray.actors.segment import NodeMemory, attach_weights, weights_layout
from holoray.actors.shared_memory import attach, create_or_attach
from holoray.actors.slot_memory import ALIGNMENT, Layout, SlotMemory
from holoray.errors import CapacityError, SourceError
from holoray.pipelines.fragment_pipeline import FragmentPipeline
from holoray.pipelines.plan import Unit
from holoray.pipelines.sealed_store import SealedStore
from holoray.tensor import Array


@pytest.fixture
def names() -> Iterator[Names]:
    found = Names(new_job(), "node")
    lock = hold_lock(found.lock(DRIVER))  # or whoever sweeps up after dead jobs meanwhile would take this for one
    yield found
    remove_job(found.job)
    os.close(lock)


class InPlace:
    """A pipeline destination over a worker's memory."""

    def __init__(self, memory: SlotMemory) -> None:
        self.open = memory.accumulator

    def close(self, tensor: int) -> None:
        pass


def ingest(sealed: SealedStore, memory: SlotMemory, generation: int, work: tuple[Unit, ...]) -> None:
    memory.make(generation)
    memory.prepare(work)
    pipeline = FragmentPipeline(sealed.store, sealed.manifest, cores=1, finalize=False)
    pipeline.run(work, InPlace(memory), lambda unit: memory.hold((unit.tensor, unit.slot), count_with(unit)))


def counts(work: Iterable[Unit]) -> dict[Slot, int]:
    """What slots hold once these units are added."""
    return {(unit.tensor, unit.slot): count_with(unit) for unit in work}


def unchanged(goal: Goal) -> dict[Slot, int]:
    """Slots without new fragments, and how many they hold."""
    return counts(goal.whole[slot] for slot in sorted(goal.whole.keys() - counts(goal.new).keys()))


def seal(sealed: SealedStore, memory: SlotMemory) -> None:
    memory.seal(i for i, codec in enumerate(sealed.manifest.codecs) if needs_sealing(codec))


def assert_same(found: dict[str, Array], expected: dict[str, Array]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes(), name


def test_layout_is_aligned_and_disjoint() -> None:
    layout = Layout.of([1, 0, 64, 65, 3])
    assert all(r.start % ALIGNMENT == 0 for r in layout.ranges)
    assert all(a.stop <= b.start for a, b in zip(layout.ranges, layout.ranges[1:], strict=False))
    assert layout.nbytes == layout.ranges[-1].stop


def test_segments_are_shared_and_read_only_for_consumers(names: Names) -> None:
    first = create_or_attach(names.segment(1), 1000)
    again = create_or_attach(names.segment(1), 1000)
    reader = attach(names.segment(1), 1000)
    assert not first.any()
    first[7] = 42
    assert again[7] == reader[7] == 42
    assert not reader.flags.writeable
    names.segment(1).unlink()
    assert reader[7] == 42  # what is mapped stays


def test_what_is_gone_or_of_another_size_is_refused(names: Names) -> None:
    with pytest.raises(SourceError):
        attach(names.segment(1), 10)
    create_or_attach(names.segment(1), 10)
    with pytest.raises(SourceError):
        attach(names.segment(1), 11)


@pytest.mark.fault("changing-file")
def test_a_link_in_the_place_of_a_segment_is_not_followed(names: Names, tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"x" * 10)
    names.segment(1).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"):
        attach(names.segment(1), 10)


@contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.fault("no-shared-memory")
def test_no_room_is_a_capacity_error(names: Names) -> None:
    with file_size_limit(1 << 16), pytest.raises(CapacityError, match="bytes are free") as caught:
        create_or_attach(names.segment(1), 1 << 20)
    assert "shm-size" in caught.value.hint
    assert not [p for p in DIRECTORY.glob(f"holoray-{names.job}-*") if not p.name.endswith(".lock")]
    assert create_or_attach(names.segment(1), 1 << 20).size == 1 << 20  # with room again


@pytest.mark.fault("no-shared-memory")
def test_more_than_the_file_system_holds_is_a_capacity_error(names: Names) -> None:
    with pytest.raises(CapacityError):
        create_or_attach(names.segment(1), 1 << 50)


def test_a_half_made_segment_of_a_dead_process_is_made_again(names: Names) -> None:
    partial = names.segment(1).with_name(names.segment(1).name + ".partial")
    partial.write_bytes(b"garbage")
    assert not create_or_attach(names.segment(1), 100).any()
    assert not partial.exists()


def test_refining_generation_after_generation(names: Names, sealed: SealedStore, checkpoint: dict[str, Array]) -> None:
    memory = NodeMemory(sealed.manifest, names)
    reference = holoray.open(sealed.store)
    for number, goal in enumerate(goals(sealed.manifest, (0.5, 0.9, 0.99, 0.999, 1.0)), start=1):
        ingest(sealed, memory, number, goal.new)
        for slot, count in unchanged(goal).items():
            memory.carry({slot: count})
        seal(sealed, memory)
        found = attach_weights(sealed.manifest, names, number)
        assert_same(found, reference.load(quality=goal.quality))
        memory.retire(number - 1)
    for name in checkpoint.keys() - {"spectral", "lowrank"}:
        assert found[name].tobytes() == checkpoint[name].tobytes()
    assert not found["large"].flags.writeable


@pytest.mark.fault("duplicated")
def test_a_slot_done_again_is_overwritten_wholly(names: Names, sealed: SealedStore) -> None:
    first, last = goals(sealed.manifest, (0.9, 1.0))
    ingest(sealed, NodeMemory(sealed.manifest, names), 1, first.new)
    spoiler = create_or_attach(names.segment(2), weights_layout(sealed.manifest).nbytes)
    spoiler[:] = 0xA5  # what a killed worker might leave
    memory = NodeMemory(sealed.manifest, names)
    ingest(sealed, memory, 2, last.new)
    ingest(sealed, memory, 2, last.new)  # in the same process, too
    memory.carry(unchanged(last))
    seal(sealed, memory)
    assert_same(attach_weights(sealed.manifest, names, 2), sealed.load())


def test_slots_travel_between_nodes(names: Names, sealed: SealedStore) -> None:
    (goal,) = goals(sealed.manifest, (1.0,))
    here = NodeMemory(sealed.manifest, names)
    there = NodeMemory(sealed.manifest, Names(names.job, "other"))
    ingest(sealed, here, 1, goal.new[::2])
    ingest(sealed, there, 1, goal.new[1::2])
    slots = counts(goal.new[1::2])
    here.write(slots, there.read(slots))
    here.write(slots, there.read(slots))
    seal(sealed, here)
    assert_same(attach_weights(sealed.manifest, names, 1), sealed.load())
    with pytest.raises(SourceError):
        here.write(slots, there.read(slots)[:-1])
    with pytest.raises(SourceError):
        here.write(counts(goal.new[1:-2:2]), there.read(slots))


def test_a_survey_finds_what_others_left_and_nothing_half_done(names: Names, sealed: SealedStore) -> None:
    first, last = goals(sealed.manifest, (0.9, 1.0))
    writer, wanted = NodeMemory(sealed.manifest, names), counts(first.new)
    ingest(sealed, writer, 1, first.new)
    other = NodeMemory(sealed.manifest, names)
    assert other.survey(1).making.slots == wanted
    stateful = {i for i, codec in enumerate(sealed.manifest.codecs) if needs_sealing(codec)}
    assert not other.survey(1).making.sealed & stateful
    seal(sealed, writer)
    assert other.survey(1).making.sealed >= stateful
    writer.make(2)
    kept = dict([next(iter(unchanged(last).items()))])
    writer.carry(kept)
    half = last.new[0]
    writer.prepare([half])  # and dies here
    found = other.survey(2)
    assert found.last.slots == wanted
    assert found.making.slots == kept
    ingest(sealed, writer, 2, (half,))
    writer.prepare([half])
    assert other.survey(2).making.slots == kept, "the mark goes before the slot is written"
    assert not other.survey(3).making.slots
    assert sorted(names.segments) == [2]


def test_sealing_is_void_when_a_slot_is_written_again(names: Names, sealed: SealedStore) -> None:
    (goal,) = goals(sealed.manifest, (1.0,))
    memory = NodeMemory(sealed.manifest, names)
    ingest(sealed, memory, 1, goal.new)
    seal(sealed, memory)
    unit = next(u for u in goal.new if needs_sealing(sealed.manifest.codecs[u.tensor]))
    memory.prepare([unit])
    assert unit.tensor not in memory.survey(1).making.sealed


@given(st.integers(0, 19), st.lists(st.tuples(st.sampled_from(["hold", "forget", "seal"]), st.integers(0, 99))))
def test_marks_are_sets(seed: int, acts: list[tuple[str, int]]) -> None:
    manifest = make_manifest(seed)
    every = [(t, s) for t, entry in enumerate(manifest.tensors) for s in {f.slot for f in entry.fragments}]
    memory = np.zeros(Marks.nbytes(manifest), np.uint8)
    slots: dict[Slot, int] = {}
    sealed: set[int] = set()
    for act, place in acts:
        slot = every[place % len(every)]
        if act == "hold":
            slots[slot] = place
            Marks(manifest, memory).hold(slot, place)
        elif act == "forget":
            slots.pop(slot, None)
            sealed.discard(slot[0])
            Marks(manifest, memory).forget(slot)
        else:
            sealed.add(slot[0])
            Marks(manifest, memory).seal(slot[0])
    assert Marks(manifest, memory).holdings() == Holdings(slots, frozenset(sealed))
