"""A device for tests of kernels: their text compiled for the CPU, and with `pytest -m gpu` a GPU."""

from __future__ import annotations

import pytest
from on_cpu import COMPILER, NO_COMPILER, kernels_on_cpu

from holoray.kernels.device import Device

ON_CPU = pytest.param("cpu", marks=pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER))
ON_GPU = pytest.param("gpu", marks=pytest.mark.gpu)


@pytest.fixture(scope="module", params=[ON_CPU, ON_GPU])
def device(request: pytest.FixtureRequest) -> Device:
    if request.param == "cpu":
        return kernels_on_cpu()
    from holoray.kernels.cuda.device import CudaDevice

    return CudaDevice()
