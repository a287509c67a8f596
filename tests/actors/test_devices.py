"""Warm-ups on devices: real actors, each with a device of its own, that combine over a real communicator."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import ray
from device_warming import Sabotaged, make_device, register
from faulty_communicator import Fault
from on_cpu import CpuDevice
from warming import QUALITIES, SLOW_S, MeteredStore, SlowStore, assert_exact, kill_coordinator, until

import holoray
from holoray.actors.accelerator import Accelerator
from holoray.actors.coordinator import Generation
from holoray.actors.placement import Placement
from holoray.actors.published import open_weights
from holoray.actors.roster import Policy
from holoray.actors.warm_model import WarmModel, warm_up
from holoray.errors import DeviceError, SourceError, UsageError, WorkerLostError
from holoray.kernels import device_accumulators, planes_launch, registry
from holoray.kernels.host_communicator import HostCommunicators
from holoray.pipelines.sealed_store import SealedStore
from holoray.tensor import Array

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, Array]:
    """Small, for kernels that take their time on a CPU."""
    rng = np.random.default_rng(0)
    return {
        "planes": (rng.standard_normal((700, 1000)) * 0.02).astype(ml_dtypes.bfloat16),
        "float32": rng.standard_normal((60, 100)).astype(np.float32),
        "spectral": rng.standard_normal((100, 60)).astype(np.float32),
        "lowrank": rng.standard_normal((90, 60)).astype(np.float32),
        "raw": rng.integers(0, 255, (2 << 20) + 7).astype(np.uint8),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(3.5, np.float32),
    }


@pytest.fixture(scope="module")
def store(checkpoint: dict[str, Array], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("devices") / "store"
    holoray.encode(checkpoint, path, pattern=["spectral=spectral", "lowrank=lowrank"], essential=0.3)
    return path


@pytest.fixture(scope="module")
def sealed(store: Path) -> SealedStore:
    return holoray.open(store)


@pytest.fixture(scope="module")
def accelerator() -> Iterator[Accelerator]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "DEVICE_ACCUMULATORS", dict(registry.DEVICE_ACCUMULATORS))
        patch.setitem(vars(device_accumulators), "launch", planes_launch.launch)
        register()
        yield Accelerator(make_device, HostCommunicators(30.0), cores=1)


@pytest.fixture(scope="module", autouse=True)
def ray_with_gpus() -> Iterator[None]:
    """Ray counts what it is told to; there need not be any GPU."""
    directory = tempfile.mkdtemp(prefix="hr-", dir="/tmp")
    ray.init(address="local", num_cpus=4, num_gpus=3, include_dashboard=False, _temp_dir=directory)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [3, 1])
def test_every_device_gets_every_tensor_and_fragments_are_read_once(
    workers: int,
    accelerator: Accelerator,
    store: Path,
    sealed: SealedStore,
    checkpoint: dict[str, Array],
    tmp_path: Path,
) -> None:
    origin = MeteredStore(store, 0.0, tmp_path / "log")
    seen: list[int] = []

    def look(model: WarmModel, generation: Generation) -> None:
        """A consumer on each device sees what the driver does, without a copy."""
        expected = model.state_dict()
        shared = model.on_device()
        assert len(shared) == workers
        for one in shared:
            weights = open_weights(model.manifest, one, CpuDevice(None))
            assert {n: w.tobytes() for n, w in weights.items()} == {n: e.tobytes() for n, e in expected.items()}
        seen.append(generation.generation)

    with warm_up(
        origin, workers=workers, qualities=QUALITIES, accelerator=accelerator, metrics_port=0, on_generation=look
    ) as model:
        model.wait(timeout_s=PATIENCE_S)
        assert_exact(model, sealed, checkpoint)
        assert seen == [1, 2, 3]
        model.save(tmp_path / "out.safetensors")
        read = origin.bytes_asked("fragments-")
    assert read == sum(t.stored_bytes for t in sealed.manifest.tensors)


@pytest.mark.fault("worker-killed", "collective-lost")
@pytest.mark.parametrize(
    ("fault", "rank", "at"),
    [
        pytest.param(Fault.IS_KILLED, 0, 1, marks=pytest.mark.slow),
        pytest.param(Fault.IS_KILLED, 2, 0, marks=pytest.mark.slow),
        pytest.param(Fault.HANGS, 1, 1, marks=pytest.mark.slow),
    ],
)
def test_a_device_lost_while_they_combine_changes_nothing(
    fault: Fault,
    rank: int,
    at: int,
    accelerator: Accelerator,
    store: Path,
    sealed: SealedStore,
    checkpoint: dict[str, Array],
    tmp_path: Path,
) -> None:
    """In the first generation; whoever is left gets slots one by one, and all combine again in the next."""
    origin = MeteredStore(store, 0.0, tmp_path / "log")
    assert isinstance(accelerator.communicators, HostCommunicators)
    groups = Sabotaged(accelerator.communicators, tmp_path / "groups", fault, rank, at)
    sabotaged = replace(accelerator, communicators=groups)
    policy = Policy(combine_timeout_s=5.0)
    with warm_up(origin, workers=3, qualities=QUALITIES, accelerator=sabotaged, policy=policy) as model:
        model.wait(timeout_s=PATIENCE_S)
        assert_exact(model, sealed, checkpoint)
        assert [g["generation"] for g in model.generations] == [1, 2, 3]
    assert list(groups.groups().values()) == [{0, 1, 2}] * 3, "one group a generation, also in the first"
    again = origin.bytes_asked("fragments-") - sum(t.stored_bytes for t in sealed.manifest.tensors)
    print(f"{again} bytes were read again after a device was lost ({fault.value})")
    assert fault is not Fault.HANGS or again == 0


@pytest.mark.slow
@pytest.mark.fault("coordinator-killed")
def test_a_killed_coordinator_reads_nothing_again(
    accelerator: Accelerator, store: Path, sealed: SealedStore, checkpoint: dict[str, Array], tmp_path: Path
) -> None:
    origin = MeteredStore(store, SLOW_S, tmp_path / "log")
    with warm_up(origin, workers=2, qualities=QUALITIES, accelerator=accelerator) as model:
        until(lambda: model.generation, PATIENCE_S)
        kill_coordinator(model)
        model.wait(timeout_s=PATIENCE_S)
        assert_exact(model, sealed, checkpoint)
    assert origin.bytes_asked("fragments-") == sum(t.stored_bytes for t in sealed.manifest.tensors)


def look_at_shards(seen: list[int], devices: int) -> Callable[[WarmModel, Generation], None]:
    """A consumer on each device sees its own tensors, and all of them together are the model."""

    def look(model: WarmModel, generation: Generation) -> None:
        expected, found = model.state_dict(), dict[str, bytes]()
        shared = model.on_device()
        assert len(shared) <= devices
        for one in shared:
            own = open_weights(model.manifest, one, CpuDevice(None))
            assert not own.keys() & found.keys(), "a tensor has one home"
            found |= {name: array.tobytes() for name, array in own.items()}
        assert found == {name: array.tobytes() for name, array in expected.items()}
        seen.append(generation.generation)

    return look


@pytest.mark.fault("worker-killed")
def test_a_killed_device_of_a_shard_is_replaced(
    accelerator: Accelerator, store: Path, sealed: SealedStore, checkpoint: dict[str, Array], tmp_path: Path
) -> None:
    """Killed when a generation has been published: only its own shard is read again, and nobody combines."""
    origin = MeteredStore(store, 0.0, tmp_path / "log")
    seen: list[int] = []
    look = look_at_shards(seen, 3)
    lost: list[str] = []

    def kill_one(model: WarmModel, generation: Generation) -> None:
        look(model, generation)
        if generation.generation == 1:
            victim = max(model.on_device(), key=lambda one: sum(len(tensors) for tensors, _ in one.blocks))
            lost.extend(sealed.manifest.tensors[t].name for tensors, _ in victim.blocks for t in tensors)
            os.kill(victim.pid, signal.SIGKILL)

    with warm_up(
        origin,
        workers=3,
        qualities=(0.99, 1.0),
        accelerator=accelerator,
        placement=Placement("shard", (("raw", 2),)),
        on_generation=kill_one,
    ) as model:
        model.wait(timeout_s=PATIENCE_S)
        assert_exact(model, sealed, checkpoint)
        assert seen == [1, 2]
        model.save(tmp_path / "out.safetensors")
    again = origin.bytes_asked("fragments-") - sum(t.stored_bytes for t in sealed.manifest.tensors)
    assert 0 <= again <= sum(t.stored_bytes for t in sealed.manifest.tensors if t.name in lost)


@pytest.mark.slow
def test_each_device_gets_its_own_tensors_once(
    accelerator: Accelerator, store: Path, sealed: SealedStore, checkpoint: dict[str, Array], tmp_path: Path
) -> None:
    origin = MeteredStore(store, 0.0, tmp_path / "log")
    seen: list[int] = []
    with warm_up(
        origin,
        workers=3,
        qualities=QUALITIES,
        accelerator=accelerator,
        placement="shard",
        on_generation=look_at_shards(seen, 3),
    ) as model:
        model.wait(timeout_s=PATIENCE_S)
        assert_exact(model, sealed, checkpoint)
    assert seen == [1, 2, 3]
    assert origin.bytes_asked("fragments-") == sum(t.stored_bytes for t in sealed.manifest.tensors)


@pytest.mark.slow
@pytest.mark.fault("worker-killed")
@pytest.mark.parametrize("placement", ["replicate", "shard"])
def test_weights_are_refined_where_they_are(
    placement: str, accelerator: Accelerator, store: Path, sealed: SealedStore, checkpoint: dict[str, Array]
) -> None:
    """One device is killed after the first generation; whoever asks in between is refused, and told what to do."""
    seen: list[int] = []
    looked = look_at_shards(seen, 3)

    def look(model: WarmModel, generation: Generation) -> None:
        if placement == "shard":
            looked(model, generation)
        else:
            expected = sealed.load(quality=generation.quality)
            for one in model.on_device():
                own = open_weights(model.manifest, one, CpuDevice(None))
                assert {n: w.tobytes() for n, w in own.items()} == {n: e.tobytes() for n, e in expected.items()}
            seen.append(generation.generation)
        if generation.generation == 1:
            os.kill(model.crew()[0]["pid"], signal.SIGKILL)

    refused: list[UsageError] = []
    in_place = replace(accelerator, in_place=True)
    origin = SlowStore(store, SLOW_S)
    with warm_up(
        origin, workers=3, qualities=QUALITIES, accelerator=in_place, placement=placement, on_generation=look
    ) as model:
        while not refused and not model._over:
            try:
                until(lambda: model.generation, PATIENCE_S)
                model.state_dict()
            except UsageError as error:
                refused.append(error)
            except (SourceError, WorkerLostError):  # between the death of a device and the next generation
                pass
        model.wait(timeout_s=PATIENCE_S)
        assert_exact(model, sealed, checkpoint)
        assert seen == [1, 2, 3]
    assert "on_generation" in refused[0].hint


@pytest.mark.slow
@pytest.mark.fault("coordinator-killed")
def test_a_coordinator_killed_under_the_consumer_does_not_go_on_without_it(
    accelerator: Accelerator, store: Path, sealed: SealedStore, checkpoint: dict[str, Array]
) -> None:
    """What `on_generation` has in hand on a device stays there until it returns, whoever coordinates."""
    begun: list[int] = []

    def hold(model: WarmModel, generation: Generation) -> None:
        if generation.generation != 1:
            return
        before = model.on_device()
        dead = model._crew.coordinator
        kill_coordinator(model)
        model._crew.await_successor(dead)
        news = ray.get(model._crew.coordinator.news.remote(0, PATIENCE_S))
        begun.extend(g.generation for g in news.generations)
        assert model.on_device() == before

    with warm_up(store, workers=2, qualities=QUALITIES, accelerator=accelerator, on_generation=hold) as model:
        model.wait(timeout_s=PATIENCE_S)
        assert_exact(model, sealed, checkpoint)
    assert begun == [1]


@pytest.mark.slow
@pytest.mark.fault("coordinator-killed")
def test_a_killed_coordinator_of_shards_reads_nothing_again(
    accelerator: Accelerator, store: Path, sealed: SealedStore, checkpoint: dict[str, Array], tmp_path: Path
) -> None:
    origin = MeteredStore(store, SLOW_S, tmp_path / "log")
    with warm_up(origin, workers=2, qualities=QUALITIES, accelerator=accelerator, placement="shard") as model:
        until(lambda: model.generation, PATIENCE_S)
        kill_coordinator(model)
        model.wait(timeout_s=PATIENCE_S)
        assert_exact(model, sealed, checkpoint)
    assert origin.bytes_asked("fragments-") == sum(t.stored_bytes for t in sealed.manifest.tensors)


def test_shards_are_for_devices(store: Path) -> None:
    with pytest.raises(UsageError, match="for devices"):
        warm_up(store, placement="shard")


def test_a_pin_to_no_shard_is_said_before_anything_begins(store: Path, accelerator: Accelerator) -> None:
    with pytest.raises(UsageError, match="there is no shard 3"):
        warm_up(store, workers=3, accelerator=accelerator, placement=Placement("shard", (("raw", 3),)))


def test_no_gpu_is_said_before_anything_begins(store: Path, accelerator: Accelerator) -> None:
    with pytest.raises(DeviceError, match="3 GPUs here, and 4 are needed"):
        warm_up(store, workers=4, accelerator=accelerator)
