"""A worker's device: what lies on it generation after generation, and its part in a group; without Ray."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import nvcomp_stand_in
import pytest
from device_warming import make_device, register
from late_device import LateDevice
from on_cpu import CpuDevice
from test_device_frames import count_groups
from test_segment import assert_same, counts, ingest, seal, unchanged

import holoray
from holoray.actors import watchdog
from holoray.actors.accelerator import Accelerator
from holoray.actors.device_memory import DeviceGenerations, device_layout
from holoray.actors.device_worker import DeviceWorker, check_codecs
from holoray.actors.goals import Goal, count_with, first_layer, goals, needs_sealing
from holoray.actors.locks import new_job, remove_job
from holoray.actors.messages import Assign, Group, Kind, Shard, Slot
from holoray.actors.published import SharedWeights, open_weights
from holoray.actors.worker import JobSpec, Report
from holoray.errors import CapacityError, DeviceError, SourceError, UsageError, WorkerLostError
from holoray.kernels import device_accumulators, planes_launch, registry, xp
from holoray.kernels.host_communicator import HostCommunicators
from holoray.pipelines import fragment_pipeline
from holoray.pipelines.frame_groups import group_nbytes
from holoray.pipelines.plan import Unit
from holoray.pipelines.sealed_store import SealedStore
from holoray.tensor import Array


@pytest.fixture(autouse=True)
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "DEVICE_ACCUMULATORS", dict(registry.DEVICE_ACCUMULATORS))
    monkeypatch.setitem(vars(device_accumulators), "launch", planes_launch.launch)
    monkeypatch.setattr(watchdog, "watch_job", lambda names: None)
    register()


def contents(sealed: SealedStore, memory: DeviceGenerations, generation: int) -> dict[str, Array]:
    """As a consumer on the device sees them."""
    shared = SharedWeights("w0", "n", 1, generation, tuple(memory.share(generation)))
    found = open_weights(sealed.manifest, shared, CpuDevice(None))
    return {t.name: found[t.name].view(t.spec.numpy_dtype) for t in sealed.manifest.tensors if t.name in found}


def poison(memory: DeviceGenerations, generation: int) -> None:
    for block in memory._generations[generation].blocks:
        block.memory[:] = 0xA5


def test_refining_generation_after_generation(sealed: SealedStore) -> None:
    """State goes on, the last generation stays as it was published, and the one before goes."""
    memory = DeviceGenerations(sealed.manifest, CpuDevice(None))
    reference, before = holoray.open(sealed.store), None
    for number, goal in enumerate(goals(sealed.manifest, (0.5, 0.9, 0.99, 1.0)), start=1):
        ingest(sealed, memory, number, goal.new)
        memory.carry(unchanged(goal))
        seal(sealed, memory)
        survey = memory.survey(number)
        assert survey.making.slots == counts(goal.whole.values())
        assert_same(contents(sealed, memory, number), reference.load(quality=goal.quality))
        if before is not None:
            assert_same(contents(sealed, memory, number - 1), before)
        before = {name: array.copy() for name, array in contents(sealed, memory, number).items()}
        memory.retire(number - 1)
        with pytest.raises(SourceError, match="not whole on this device"):
            memory.share(number - 1)


def test_a_slot_done_again_is_overwritten_wholly(sealed: SealedStore) -> None:
    """Whatever a broken sum, or a failed task, left in the generation in the making."""
    first, last = goals(sealed.manifest, (0.9, 1.0))
    memory = DeviceGenerations(sealed.manifest, CpuDevice(None))
    ingest(sealed, memory, 1, first.new)
    memory.make(2)
    poison(memory, 2)
    for _ in range(2):
        ingest(sealed, memory, 2, last.new)
    memory.carry(unchanged(last))
    seal(sealed, memory)
    assert_same(contents(sealed, memory, 2), sealed.load())


# -- shards -------------------------------------------------------------------------------------------------


def of(goal: Goal, tensors: Iterable[int]) -> tuple[Unit, ...]:
    return tuple(unit for unit in goal.new if unit.tensor in set(tensors))


def expected_of(sealed: SealedStore, tensors: Iterable[int], quality: float) -> dict[str, Array]:
    names = {sealed.manifest.tensors[t].name for t in tensors}
    return {name: array for name, array in sealed.load(quality=quality).items() if name in names}


def make_shard(sealed: SealedStore, memory: DeviceGenerations, number: int, goal: Goal) -> None:
    """What a coordinator asks of a device for its own tensors, of which it has the last generation."""
    tensors = memory._tensors
    ingest(sealed, memory, number, of(goal, tensors))
    if number > 1:
        memory.carry({slot: count for slot, count in unchanged(goal).items() if slot[0] in tensors})
    memory.seal(t for t in tensors if needs_sealing(sealed.manifest.codecs[t]))


def test_a_device_of_a_shard_has_room_for_its_own_only(sealed: SealedStore) -> None:
    """And gives only these away; what it was told later lies beside."""
    manifest, goal = sealed.manifest, goals(sealed.manifest, (1.0,))[0]
    count = len(manifest.tensors)
    memory = DeviceGenerations(manifest, CpuDevice(None), sharded=True)
    assert memory.survey(1).shard is None
    first = Shard((1, 1), frozenset(range(0, count, 2)))
    memory.settle(first, 1)
    make_shard(sealed, memory, 1, goal)
    assert memory.survey(1).shard == first
    assert sorted(memory.tensors(1)) == sorted(first.tensors)
    assert_same(contents(sealed, memory, 1), expected_of(sealed, first.tensors, 1.0))
    own_bytes = sum(manifest.tensors[t].spec.nbytes for t in first.tensors)
    assert memory._generations[1].nbytes <= own_bytes + 64 * count
    with pytest.raises(SourceError, match="not on this device"):
        memory.fetch(1, 1)
    grown = Shard((1, 2), first.tensors | {1})
    memory.settle(grown, 1)
    ingest(sealed, memory, 1, of(goal, {1}))
    with pytest.raises(SourceError, match="not whole"):
        memory.share(1)
    make_shard(sealed, memory, 1, goal)
    assert len(memory.share(1)) == 2
    assert_same(contents(sealed, memory, 1), expected_of(sealed, grown.tensors, 1.0))


@pytest.mark.fault("no-device-memory")
def test_a_shard_that_grows_beyond_the_device_is_refused_before_it_is_allocated(
    sealed: SealedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was spread: what was published stays."""
    monkeypatch.setitem(vars(device_accumulators), "launch", planes_launch.launch)  # queued, as on a GPU
    manifest, goal = sealed.manifest, goals(sealed.manifest, (1.0,))[0]
    large = max(range(len(manifest.tensors)), key=lambda t: manifest.tensors[t].spec.nbytes)
    others = frozenset(range(len(manifest.tensors))) - {large}
    device = LateDevice()
    room = sum(manifest.tensors[t].spec.nbytes for t in others) + (8 << 20)
    memory = DeviceGenerations(manifest, device, room, sharded=True)
    memory.settle(Shard((1, 1), others), 1)
    make_shard(sealed, memory, 1, goal)
    used = device.used_bytes
    memory.settle(Shard((1, 2), others | {large}), 2)
    with pytest.raises(CapacityError, match="a generation takes"):
        memory.make(2)
    assert device.used_bytes == used
    assert sorted(memory.tensors(1)) == sorted(others)


def test_what_a_device_is_not_to_hold_any_more_is_not_passed_off_as_held(sealed: SealedStore) -> None:
    """Another was told later to hold it: it begins this generation anew, and still gives the last one away."""
    first, last = goals(sealed.manifest, (0.9, 1.0))
    everything = frozenset(range(len(sealed.manifest.tensors)))
    memory = DeviceGenerations(sealed.manifest, CpuDevice(None), sharded=True)
    memory.settle(Shard((1, 1), everything), 1)
    make_shard(sealed, memory, 1, first)
    ingest(sealed, memory, 2, last.new)
    memory.settle(Shard((2, 1), everything - {0}), 2)
    survey = memory.survey(2)
    assert not survey.making.slots
    assert not survey.last.slots
    assert_same(contents(sealed, memory, 1), sealed.load(quality=first.quality))
    ingest(sealed, memory, 2, tuple(unit for unit in last.whole.values() if unit.tensor))
    memory.seal(t for t in everything - {0} if needs_sealing(sealed.manifest.codecs[t]))
    assert_same(contents(sealed, memory, 2), expected_of(sealed, everything - {0}, 1.0))


# -- groups -------------------------------------------------------------------------------------------------


@pytest.fixture
def spec(sealed: SealedStore) -> Iterator[JobSpec]:
    job = new_job()
    accelerator = Accelerator(make_device, HostCommunicators(20.0))
    yield JobSpec(job, sealed.store, sealed.root, strict=False, accelerator=accelerator)
    remove_job(job)


def make_worker(spec: JobSpec, sealed: SealedStore, name: str) -> DeviceWorker:
    worker = DeviceWorker(spec, name, "node", np.frombuffer(sealed.manifest.encoded, np.uint8))
    hello = worker.hello()
    assert hello.error is None
    assert hello.node == f"{name}@node", "a device is a node of its own"
    return worker


def run_group(
    workers: list[DeviceWorker], group: Group, slots: list[dict[Slot, int]], generation: int = 1
) -> list[Report]:
    ticket = workers[0].ticket(0)
    reports: list[Report] = [Report()] * len(workers)

    def run(rank: int) -> None:
        taken, held = tuple(slots[rank]), tuple(slots[rank].values())
        task = Assign(Kind.COMBINE, f"w{rank}", 9, generation, slots=taken, counts=held, group=group, rank=rank)
        reports[rank] = workers[rank].do(0, task, ticket=ticket)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(workers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return reports


def test_two_halves_become_two_wholes(spec: JobSpec, sealed: SealedStore) -> None:
    (goal,) = goals(sealed.manifest, (1.0,))
    workers = [make_worker(spec, sealed, f"w{rank}") for rank in range(2)]
    order = tuple(goal.whole)
    owners = tuple(i % 2 for i in range(len(order)))
    for rank, worker in enumerate(workers):
        units = tuple(goal.whole[slot] for slot, owner in zip(order, owners, strict=True) if owner == rank)
        assert worker.do(0, Assign(Kind.INGEST, f"w{rank}", 1, 1, units=units)).error is None
    slots = [counts(goal.whole[s] for s, o in zip(order, owners, strict=True) if o != rank) for rank in range(2)]
    reports = run_group(workers, Group(3, 2, order, owners), slots)
    assert [report.error for report in reports] == [None, None]
    for worker in workers:
        memory = worker._device_memory
        assert memory.survey(1).making.slots == counts(goal.whole.values())
        seal(sealed, memory)
        assert_same(contents(sealed, memory, 1), sealed.load())


@pytest.mark.fault("collective-lost")
def test_an_abort_that_overtakes_its_task_ends_it(spec: JobSpec, sealed: SealedStore) -> None:
    (goal,) = goals(sealed.manifest, (1.0,))
    workers = [make_worker(spec, sealed, f"w{rank}") for rank in range(2)]
    slot = next(iter(goal.whole))
    assert workers[0].do(0, Assign(Kind.INGEST, "w0", 1, 1, units=(goal.whole[slot],))).error is None
    for worker in workers:
        worker.abort(0, 3)
    reports = run_group(workers, Group(3, 2, (slot,), (0,)), [{}, {slot: count_with(goal.whole[slot])}])
    assert all(isinstance(report.error, WorkerLostError) for report in reports)
    reports = run_group(workers, Group(4, 2, (slot,), (0,)), [{}, {slot: count_with(goal.whole[slot])}])
    assert [report.error for report in reports] == [None, None], "another group is not concerned"


def test_what_is_not_held_is_not_contributed(spec: JobSpec, sealed: SealedStore) -> None:
    worker = make_worker(spec, sealed, "w0")
    slot = next(iter(goals(sealed.manifest, (1.0,))[0].whole))
    (report,) = run_group([worker], Group(3, 1, (slot,), (0,)), [{}])
    assert isinstance(report.error, UsageError)


def test_codecs_that_no_device_has_are_refused_first(sealed: SealedStore) -> None:
    check_codecs(sealed.manifest)
    del registry.DEVICE_ACCUMULATORS["lowrank"]
    with pytest.raises(UsageError, match="lowrank tensors are not accumulated on a device"):
        check_codecs(sealed.manifest)


# -- what a load onto a device has, too -----------------------------------------------------------------------


def late_worker(
    sealed: SealedStore, spec: JobSpec, monkeypatch: pytest.MonkeyPatch, device_bytes: int | None = None
) -> tuple[DeviceWorker, LateDevice]:
    """A worker whose device does nothing before it is waited for, and enough batches for several streams."""
    monkeypatch.setattr(fragment_pipeline, "MIN_BATCH_BYTES", 32 << 10)
    monkeypatch.setitem(vars(device_accumulators), "launch", planes_launch.launch)  # queued, as on a GPU
    device = LateDevice()
    accelerator = Accelerator(lambda: device, cores=2, device_bytes=device_bytes or device.limit_bytes)
    return make_worker(replace(spec, accelerator=accelerator), sealed, "w0"), device


class QueuedLateDevice(LateDevice):
    stream_address = 7


_NUMBERS = itertools.count()
"""Of workers: a name is a lock, which its process holds to the end."""


@pytest.fixture(scope="module")
def framed() -> SealedStore:
    """`raw` in frames of several runs, and runs that are none."""
    rng, store = np.random.default_rng(3), holoray.MemoryStore()
    model = {"ids": np.arange(300_000), "noise": rng.integers(0, 255, 1 << 20, np.uint8), "few": np.arange(9_000)}
    holoray.encode(model, store, codec="raw")
    return holoray.open(store)


def opening_worker(
    framed: SealedStore, spec: JobSpec, monkeypatch: pytest.MonkeyPatch, device: LateDevice, **options: Any
) -> DeviceWorker:
    nvcomp_stand_in.install(monkeypatch)
    accelerator = Accelerator(lambda: device, cores=2, **{"device_bytes": device.limit_bytes} | options)
    own = replace(spec, store=framed.store, root=framed.root, accelerator=accelerator)
    return make_worker(own, framed, f"w{next(_NUMBERS)}")


def test_a_worker_opens_frames_on_its_device(
    framed: SealedStore, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, (goal,) = count_groups(monkeypatch), goals(framed.manifest, (1.0,))
    frames = sum(f.compression == "zstd" for t in framed.manifest.tensors for f in t.fragments)
    for decompress, opened in (("host", 0), ("device", frames), ("auto", frames)):
        worker = opening_worker(framed, spec, monkeypatch, QueuedLateDevice(), decompress=decompress)
        assert make_generation(worker, framed, 1, goal) is None
        assert_same(fetched(worker, framed, 1), framed.load())
        assert sum(groups) == opened
        groups.clear()
    assert frames > 3


@pytest.mark.fault("no-device-memory")
def test_frames_that_a_worker_opens_are_planned_for(
    framed: SealedStore, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for the weights and one group, to the byte; one byte less is told before anything is read."""
    monkeypatch.setattr(fragment_pipeline, "MIN_BATCH_BYTES", 32 << 10)
    (goal,) = goals(framed.manifest, (1.0,))
    group = group_nbytes(f for t in framed.manifest.tensors for f in t.fragments)
    least = device_layout(framed.manifest, range(len(framed.manifest.tensors))).nbytes + group
    device = QueuedLateDevice()
    worker = opening_worker(framed, spec, monkeypatch, device, decompress="device", device_bytes=least)
    assert make_generation(worker, framed, 1, goal) is None
    assert device.peak_bytes <= least
    device = QueuedLateDevice()
    worker = opening_worker(framed, spec, monkeypatch, device, decompress="device", device_bytes=least - 1)
    assert isinstance(make_generation(worker, framed, 1, goal), CapacityError)
    assert device.peak_bytes == 0


def test_as_many_threads_open_frames_as_there_is_room_for(framed: SealedStore) -> None:
    (goal,) = goals(framed.manifest, (1.0,))
    room = 3 * group_nbytes(f for t in framed.manifest.tensors for f in t.fragments)
    for opens_frames, width in ((True, 3), (False, 8)):
        memory = DeviceGenerations(framed.manifest, LateDevice(), room, opens_frames=opens_frames)
        assert memory.width(goal.new, 8) == width


def test_a_worker_without_nvcomp_says_so(framed: SealedStore, spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise DeviceError("nvCOMP cannot be imported")

    monkeypatch.setattr(xp, "nvcomp", missing)
    encoded = np.frombuffer(framed.manifest.encoded, np.uint8)
    for decompress, error in (("device", DeviceError), ("auto", type(None)), ("host", type(None))):
        accelerator = Accelerator(LateDevice, device_bytes=1 << 30, decompress=decompress)
        own = replace(spec, store=framed.store, root=framed.root, accelerator=accelerator)
        assert isinstance(DeviceWorker(own, f"w{next(_NUMBERS)}", "node", encoded).hello().error, error)


def test_options_of_devices_without_meaning() -> None:
    for options in ({"device_bytes": 0}, {"device_bytes": -1}, {"decompress": "gpu"}):
        with pytest.raises(UsageError):
            Accelerator(**options)


def make_generation(worker: DeviceWorker, sealed: SealedStore, number: int, goal: Goal) -> Exception | None:
    """What a coordinator asks of a single device; the first error."""
    stateful = tuple(t for t, codec in enumerate(sealed.manifest.codecs) if needs_sealing(codec))
    fresh = tuple(unit for unit in goal.new if not first_layer(unit))
    layered = tuple(unit for unit in goal.new if first_layer(unit))
    tasks = [Assign(Kind.INGEST, "w0", 1, number, units=units) for units in (fresh, layered) if units]
    if number > 1:
        kept = unchanged(goal)
        tasks.append(Assign(Kind.CARRY, "w0", 2, number, slots=tuple(kept), counts=tuple(kept.values())))
    tasks.append(Assign(Kind.SEAL, "w0", 3, number, tensors=stateful))
    return next((error for task in tasks if (error := worker.do(0, task).error) is not None), None)


def fetched(worker: DeviceWorker, sealed: SealedStore, generation: int) -> dict[str, Array]:
    specs = [t.spec for t in sealed.manifest.tensors]
    contents = [worker.fetch(generation, t) for t in range(len(specs))]
    return {s.name: c.view(s.numpy_dtype).reshape(s.shape) for s, c in zip(specs, contents, strict=True)}


def test_a_worker_overlaps_and_waits_for_what_it_reports(
    sealed: SealedStore, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that was asked for is still queued when the answer is given, on whichever stream it was."""
    worker, device = late_worker(sealed, spec, monkeypatch)
    for number, goal in enumerate(goals(sealed.manifest, (0.9, 0.999, 1.0)), start=1):
        assert make_generation(worker, sealed, number, goal) is None
        assert_same(fetched(worker, sealed, number), sealed.load(quality=goal.quality))
        worker.retire(0, number - 1)
    assert any(stream.most_queued > 0 for stream in device.streams), "threads have streams of their own"
    assert device.staging.stats.borrowed_bytes == 0
    stages = {"ingest", "carry", "seal", "fetch", "verify", "decompress", "accumulate", "upload"}
    assert stages <= device.names.keys()


@pytest.mark.fault("no-device-memory")
def test_a_worker_without_memory_says_so_and_leaves_what_was_published(
    sealed: SealedStore, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, device = late_worker(sealed, spec, monkeypatch)
    first, last = goals(sealed.manifest, (0.9, 1.0))
    assert make_generation(worker, sealed, 1, first) is None
    before = fetched(worker, sealed, 1)
    (block,) = worker._device_memory._generations[1].blocks
    segment_bytes = block.layout.nbytes
    device.lack = lambda nbytes: nbytes not in (0, segment_bytes)
    assert isinstance(make_generation(worker, sealed, 2, last), CapacityError)
    assert_same(fetched(worker, sealed, 1), before)
    device.lack = lambda nbytes: False
    assert make_generation(worker, sealed, 2, last) is None, "the same task may be asked again"
    assert_same(fetched(worker, sealed, 2), sealed.load())


@pytest.mark.fault("no-device-memory")
def test_a_second_generation_that_cannot_fit_is_refused_before_it_is_allocated(
    sealed: SealedStore, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 3 * sum(t.spec.nbytes for t in sealed.manifest.tensors) // 2 + (8 << 20)
    assert room < 2 * sum(t.spec.nbytes for t in sealed.manifest.tensors) + (8 << 20)
    worker, device = late_worker(sealed, spec, monkeypatch, room)
    first, last = goals(sealed.manifest, (0.9, 1.0))
    assert make_generation(worker, sealed, 1, first) is None
    used = device.used_bytes
    error = make_generation(worker, sealed, 2, last)
    assert isinstance(error, CapacityError)
    assert "two generations" in error.hint
    assert device.used_bytes == used
