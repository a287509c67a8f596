"""A checkpoint of every kind of tensor, its store, and an eye on what stays behind in shared memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import holoray
from holoray.actors import locks
from holoray.pipelines.sealed_store import SealedStore
from holoray.tensor import Array


@pytest.fixture(scope="session")
def checkpoint() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {
        "large": (rng.standard_normal((3000, 1000)) * 0.02).astype(ml_dtypes.bfloat16),
        "float32": rng.standard_normal((600, 1000)).astype(np.float32),
        "float16": rng.standard_normal((100, 1000)).astype(np.float16),
        "spectral": rng.standard_normal((300, 200)).astype(np.float32),
        "lowrank": rng.standard_normal((90, 200)).astype(np.float32),
        "raw": rng.integers(0, 255, (3 << 20) + 7).astype(np.uint8),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(3.5, np.float32),
    }


@pytest.fixture(scope="session")
def store(checkpoint: dict[str, Array], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("warm") / "store"
    holoray.encode(checkpoint, path, pattern=["spectral=spectral", "lowrank=lowrank"], essential=0.3)
    return path


@pytest.fixture(scope="session")
def sealed(store: Path) -> SealedStore:
    return holoray.open(store)


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    jobs: list[str] = []
    new_job = locks.new_job

    def recording() -> str:
        jobs.append(new_job())
        return jobs[-1]

    monkeypatch.setattr(locks, "new_job", recording)
    yield
    assert not [path for job in jobs for path in locks.DIRECTORY.glob(f"holoray-{job}-*")]
