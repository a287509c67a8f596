"""Warm-ups on devices: real actors, each with a device of its own, that combine over a real communicator."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import ray
from device_warming import MakeDevice, register
from on_cpu import COMPILER, NO_COMPILER, CpuDevice, compile_kernels
from warming import QUALITIES, SLOW_S, MeteredStore, SlowStore, assert_exact, kill_coordinator, until

import holoray
from holoray.actors.accelerator import Accelerator
from holoray.actors.coordinator import Generation
from holoray.actors.published import open_weights
from holoray.actors.warm_model import WarmModel, warm_up
from holoray.errors import DeviceError, QualityError, UsageError
from holoray.kernels.host_communicator import HostCommunicators
from holoray.pipelines.sealed_store import SealedStore
from holoray.tensor import Array

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(300),
    pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER),
]
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
        "raw": rng.integers(0, 255, (3 << 20) + 7).astype(np.uint8),
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
def accelerator(tmp_path_factory: pytest.TempPathFactory) -> Accelerator:
    register()
    folder = tmp_path_factory.mktemp("kernels")
    compile_kernels(folder)
    return Accelerator(MakeDevice(folder / "kernels.so"), HostCommunicators(30.0))


@pytest.fixture(scope="module", autouse=True)
def ray_with_gpus() -> Iterator[None]:
    """Ray counts what it is told to; there need not be any GPU."""
    directory = tempfile.mkdtemp(prefix="hr-", dir="/tmp")
    ray.init(address="local", num_cpus=4, num_gpus=3, include_dashboard=False, _temp_dir=directory)
    yield
    ray.shutdown()


@pytest.mark.parametrize("workers", [1, 3])
def test_every_device_gets_every_tensor_and_fragments_are_read_once(
    workers: int, accelerator: Accelerator, store: Path, sealed: SealedStore, checkpoint: dict[str, Array], tmp_path: Path
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
def test_a_device_killed_while_they_combine_changes_nothing() -> None:
    """TODO"""


def test_no_gpu_is_said_before_anything_begins(store: Path, accelerator: Accelerator) -> None:
    with pytest.raises(DeviceError, match="3 GPUs here, and 4 are needed"):
        warm_up(store, workers=4, accelerator=accelerator)
