"""Refining where the weights lie: whole generations only, whatever fails on the way, and once the memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from device_warming import make_device, register
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from late_device import LateDevice
from on_cpu import CpuDevice
from one_process import OneProcess, sharded
from test_device_memory import fetched, make_generation, make_worker, of, run_group
from test_segment import assert_same, counts, ingest, seal, unchanged

import holoray
from holoray.actors import watchdog
from holoray.actors.accelerator import Accelerator
from holoray.actors.goals import first_layer, goals
from holoray.actors.in_place import InPlaceGenerations
from holoray.actors.locks import new_job, remove_job
from holoray.actors.messages import Assign, Group, Kind, Shard
from holoray.actors.worker import JobSpec
from holoray.errors import CapacityError, SourceError, UsageError
from holoray.kernels import device_accumulators, planes_launch, registry
from holoray.kernels.device_accumulators import turn_nbytes
from holoray.kernels.host_communicator import HostCommunicators
from holoray.pipelines.sealed_store import SealedStore
from holoray.tensor import Array

QUALITIES = (0.9, 0.999, 0.99999, 1.0)


@pytest.fixture(autouse=True)
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "DEVICE_ACCUMULATORS", dict(registry.DEVICE_ACCUMULATORS))
    monkeypatch.setitem(vars(device_accumulators), "launch", planes_launch.launch)
    monkeypatch.setattr(watchdog, "watch_job", lambda names: None)
    register()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SealedStore:
    """Several slots of each kind, and little of each."""
    rng = np.random.default_rng(3)
    tensors = {
        "planes": (rng.standard_normal((1200, 1000)) * 0.02).astype(ml_dtypes.bfloat16),
        "more": rng.standard_normal((60, 100)).astype(np.float32),
        "spectral": rng.standard_normal((100, 60)).astype(np.float32),
        "lowrank": rng.standard_normal((90, 60)).astype(np.float32),
        "raw": rng.integers(0, 255, (1 << 20) + 7).astype(np.uint8),
    }
    path = tmp_path_factory.mktemp("small") / "store"
    holoray.encode(tensors, path, pattern=["spectral=spectral", "lowrank=lowrank"], essential=0.3)
    return holoray.open(path)


@pytest.fixture(scope="module")
def expected(small: SealedStore) -> list[dict[str, Array]]:
    """Fault-free loads of each quality."""
    return [small.load(quality=quality) for quality in QUALITIES]


@pytest.fixture
def spec(small: SealedStore) -> Iterator[JobSpec]:
    job = new_job()
    accelerator = Accelerator(make_device, cores=1, in_place=True)
    yield JobSpec(job, small.store, small.root, strict=False, accelerator=accelerator)
    remove_job(job)


def contents(sealed: SealedStore, run: OneProcess, generation: int) -> list[dict[str, Array]]:
    """What each device gives of a generation."""
    found = []
    for worker in run.workers.values():
        specs = {t: sealed.manifest.tensors[t].spec for t in worker.tensors(generation)}
        fetched = {t: worker.fetch(generation, t) for t in specs}
        found.append({s.name: fetched[t].view(s.numpy_dtype).reshape(s.shape) for t, s in specs.items()})
    return found


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.tuples(st.integers(1, 4), st.integers(1, 10)), max_size=12), st.integers(1, 2), st.booleans())
def test_every_generation_is_whole_whatever_fails_on_the_way(
    spec: JobSpec,
    small: SealedStore,
    expected: list[dict[str, Array]],
    failing: set[tuple[int, int]],
    devices: int,
    shards: bool,
) -> None:
    seen: list[int] = []

    def look(run: OneProcess, generation: int) -> None:
        found = contents(small, run, generation)
        union = {name: array for one in found for name, array in one.items()}
        for own in [union] if shards else found:
            assert_same({name: own[name] for name in expected[generation - 1]}, expected[generation - 1])
        assert not shards or sum(map(len, found)) == len(expected[0]), "a tensor has one home"
        seen.append(generation)

    run = OneProcess(replace(spec, placement=sharded(shards)), small, QUALITIES, look, devices=devices, failing=failing)
    assert run.error is None
    assert seen == [1, 2, 3, 4]


@pytest.mark.fault("collective-lost")
def test_devices_that_refine_in_place_combine(spec: JobSpec, small: SealedStore) -> None:
    """Each refines every other slot, and takes the rest over what it has of the last generation."""
    accelerator = Accelerator(make_device, HostCommunicators(20.0), cores=1, in_place=True)
    workers = [make_worker(replace(spec, accelerator=accelerator), small, f"w{rank}") for rank in range(2)]
    first, last = goals(small.manifest, (0.9, 1.0))
    for worker in workers:
        assert make_generation(worker, small, 1, first) is None
    order = tuple((u.tensor, u.slot) for u in last.new)
    owners = tuple(i % 2 for i in range(len(order)))
    kept = unchanged(last)
    carried = Assign(Kind.CARRY, "w0", 2, 2, slots=tuple(kept), counts=tuple(kept.values()))
    for rank, worker in enumerate(workers):
        own = [unit for unit, owner in zip(last.new, owners, strict=True) if owner == rank]
        for refining in (False, True):
            units = tuple(unit for unit in own if bool(first_layer(unit)) == refining)
            assert not units or worker.do(0, Assign(Kind.INGEST, "w0", 3, 2, units=units)).error is None
        assert worker.do(0, carried).error is None
    slots = [counts(last.whole[s] for s, o in zip(order, owners, strict=True) if o != rank) for rank in range(2)]
    assert [report.error for report in run_group(workers, Group(3, 2, order, owners), slots, 2)] == [None, None]
    for worker in workers:
        memory = worker._device_memory
        assert memory.survey(2).making.slots == counts(last.whole.values())
        assert memory.survey(2).last.slots == kept, "what was overwritten is no base any more"
        seal(small, memory)
        assert_same(fetched(worker, small, 2), small.load())


def test_nobody_is_given_weights_while_they_are_refined(small: SealedStore) -> None:
    first, last = goals(small.manifest, (0.9, 1.0))
    memory = InPlaceGenerations(small.manifest, CpuDevice(None))
    ingest(small, memory, 1, first.new)
    seal(small, memory)
    assert memory.share(1)
    handle = memory._generations[1].blocks[0].memory.ctypes.data
    memory.make(2)
    for ask in (memory.share, memory.tensors, lambda generation: memory.fetch(generation, 0)):
        with pytest.raises(UsageError, match="refined in place") as refused:
            ask(1)
        assert "on_generation" in refused.value.hint
        with pytest.raises(SourceError, match="not whole"):
            ask(2)
    ingest(small, memory, 2, last.new)
    memory.carry(unchanged(last))
    seal(small, memory)
    assert memory.share(2)
    memory.retire(1)
    assert memory.share(2)
    assert memory._generations[2].blocks[0].memory.ctypes.data == handle, "the same memory"


def test_what_began_to_be_refined_is_no_base_any_more(small: SealedStore) -> None:
    """A survey says so, and the device refuses to go on from it, or to pass it off as unchanged."""
    first, last = goals(small.manifest, (0.9, 1.0))
    memory = InPlaceGenerations(small.manifest, CpuDevice(None))
    ingest(small, memory, 1, first.new)
    seal(small, memory)
    unit = next(unit for unit in last.new if first_layer(unit))
    slot = unit.tensor, unit.slot
    memory.make(2)
    assert slot in memory.survey(2).last.slots
    memory.prepare([unit])
    survey = memory.survey(2)
    assert slot not in survey.making.slots
    assert survey.last.slots == counts(unit for place, unit in first.whole.items() if place != slot)
    with pytest.raises(UsageError, match="does not hold any more"):
        memory.prepare([unit])
    with pytest.raises(UsageError, match="does not hold any more"):
        memory.carry({slot: 1})
    ingest(small, memory, 2, (last.whole[slot],))
    assert slot in memory.survey(2).making.slots


def test_who_is_to_hold_less_takes_new_memory(small: SealedStore) -> None:
    first, last = goals(small.manifest, (0.9, 1.0))
    memory = InPlaceGenerations(small.manifest, CpuDevice(None), sharded=True)
    everything = frozenset(range(len(small.manifest.tensors)))
    memory.settle(Shard((1, 1), everything), 1)
    ingest(small, memory, 1, first.new)
    seal(small, memory)
    memory.settle(Shard((2, 1), everything - {0}), 2)
    ingest(small, memory, 2, of(replace(last, new=tuple(last.whole.values())), everything - {0}))
    seal(small, memory)
    assert set(memory.tensors(2)) == everything - {0}


@pytest.mark.fault("no-device-memory")
def test_four_generations_take_the_weights_once(spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte of the device is counted: 1.1 times the weights, and what decoding takes for a moment."""
    weights = (np.random.default_rng(1).standard_normal((8, 1 << 19)) * 0.02).astype(ml_dtypes.bfloat16)
    holoray.encode({"w": weights}, tmp_path / "store")
    sealed = holoray.open(tmp_path / "store")
    (entry,), (codec,) = sealed.manifest.tensors, sealed.manifest.codecs
    assert entry.codec == "planes"
    monkeypatch.setitem(vars(device_accumulators), "launch", planes_launch.launch)  # queued, as on a GPU
    staging_bytes = 2 * turn_nbytes(entry.spec, codec)
    limit_bytes = int(1.1 * weights.nbytes) + staging_bytes
    peaks: dict[bool, int] = {}
    for in_place in (True, False):
        device = LateDevice()
        room = limit_bytes if in_place else None
        accelerator = Accelerator(lambda device=device: device, cores=2, device_bytes=room, in_place=in_place)  # type: ignore[misc]
        job = replace(spec, store=sealed.store, root=sealed.root, accelerator=accelerator)
        seen: list[int] = []
        run = OneProcess(job, sealed, QUALITIES, lambda run, generation, seen=seen: seen.append(generation))  # type: ignore[misc]
        assert run.error is None
        assert seen == [1, 2, 3, 4]
        (found,) = contents(sealed, run, 4)
        assert found["w"].tobytes() == weights.tobytes()
        peaks[in_place] = device.peak_bytes
    print(f"peak: {peaks[True]} bytes in place, {peaks[False]} with two generations, of {weights.nbytes} of weights")
    assert peaks[True] <= limit_bytes
    assert peaks[False] > 2 * weights.nbytes
    device = LateDevice()
    accelerator = Accelerator(lambda: device, cores=2, device_bytes=limit_bytes)
    job = replace(spec, store=sealed.store, root=sealed.root, accelerator=accelerator)
    run = OneProcess(job, sealed, QUALITIES, lambda run, generation: None)
    assert isinstance(run.error, CapacityError), "two generations do not fit there"
    assert "in_place" in run.error.hint
