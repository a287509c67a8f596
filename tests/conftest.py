"""Shared fixtures: small models that look like real ones; and what is skipped where its program is missing."""

from __future__ import annotations

import shutil

import ml_dtypes
import numpy as np
import pytest

from holoray.kernels.device import Device
from holoray.tensor import Array

Model = dict[str, Array]


def make_model(seed: int = 0) -> Model:
    """About 3 MB: bf16 matrices (one of two runs), f32 and f16 ones, biases, integers, an empty tensor, a NaN."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return 0.05 * rng.standard_normal(shape)

    broken = normal(80, 80).astype(np.float32)
    broken[3, 3] = np.nan
    return {
        "embed.weight": normal(1500, 400).astype(ml_dtypes.bfloat16),
        "layers.0.attention.weight": normal(256, 200).astype(ml_dtypes.bfloat16),
        "layers.0.attention.bias": normal(256).astype(ml_dtypes.bfloat16),
        "layers.0.mlp.weight": normal(300, 256).astype(np.float32),
        "layers.1.mlp.weight": normal(8, 16, 40).astype(np.float16),
        "layers.1.broken.weight": broken,
        "layers.1.empty": np.zeros((0, 4), np.float32),
        "position_ids": np.arange(512, dtype=np.int64)[None],
    }


@pytest.fixture(scope="session")
def model() -> Model:
    return make_model()


@pytest.fixture(scope="module", params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    """What kernels run on: their very text compiled for the CPU; with `pytest -m gpu` a GPU."""
    if request.param == "gpu":
        from holoray.kernels.cuda.device import CudaDevice

        return CudaDevice()
    from on_cpu import COMPILER, NO_COMPILER, kernels_on_cpu

    if COMPILER is None:
        pytest.skip(NO_COMPILER)
    return kernels_on_cpu()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _skip_without_prometheus(items)
    # Files are given to processes in this order: no process is to begin a long one when the others are about to end.
    long = {item.path for item in items if item.get_closest_marker("timeout")}
    items.sort(key=lambda item: item.path not in long)


def _skip_without_prometheus(items: list[pytest.Item]) -> None:
    """Skip what asks Prometheus itself where it is not installed; `-ra` lists each with this reason."""
    missing = [name for name in ("promtool", "prometheus") if shutil.which(name) is None]
    if missing:
        skip = pytest.mark.skip(reason=f"{' and '.join(missing)} not installed; on Debian: apt-get install prometheus")
        for item in items:
            if item.get_closest_marker("promtool"):
                item.add_marker(skip)
