"""The only door to CuPy. Nothing is imported before a device is asked for."""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from typing import Any, Final

from holoray.errors import DeviceError

INSTALL_HINT = "install the extra for your driver: pip install 'holoray[cuda13]' (or cuda12), and see `holoray doctor`"

_NO_DEVICE: Final = 100
"""cudaErrorNoDevice, for which CuPy has no name."""


_NVCOMP: Final = 6
"""The first major version whose `as_arrays` takes offsets into one buffer."""


@cache
def cupy() -> Any:
    """The module `cupy`; raises DeviceError, with how to get it, where it is missing or cannot be loaded."""
    try:
        return importlib.import_module("cupy")
    except ImportError as error:  # also a CUDA library that it does not find
        raise DeviceError(f"CuPy cannot be imported: {error}", hint=INSTALL_HINT) from None
    except OSError as error:  # it makes its cache of kernels when it is imported
        raise DeviceError(f"CuPy cannot be imported: {error}", hint="set CUPY_CACHE_DIR to a folder of yours") from None


def fft() -> Any:
    """The module `cupyx.scipy.fft`; raises DeviceError where CuPy is missing."""
    cupy()
    return importlib.import_module("cupyx.scipy.fft")


def nccl() -> Any:
    """The module `cupy.cuda.nccl`, which finds the library where pip put it; raises DeviceError where there is none."""
    cupy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a library that is missing, which is told here
        module = importlib.import_module("cupy.cuda.nccl")
    if not module.available:
        raise DeviceError("NCCL cannot be loaded", hint=INSTALL_HINT)
    return module


def nvcomp() -> Any:
    """The module `nvidia.nvcomp`, 6.0 or later; raises DeviceError, with how to get it, where it is missing."""
    cupy()
    hint = "pip install 'nvidia-nvcomp-cu13>=6' (or nvidia-nvcomp-cu12)"
    try:
        module = importlib.import_module("nvidia.nvcomp")
    except ImportError as error:
        raise DeviceError(f"nvCOMP cannot be imported: {error}", hint=hint) from None
    if int(str(module.__version__).partition(".")[0]) < _NVCOMP:
        raise DeviceError(f"nvCOMP {module.__version__} has no batches of frames in one buffer", hint=hint)
    return module


def nvtx() -> Any:
    """The module that names stretches of work in a profiler's trace, or None where this CuPy was built without."""
    cupy()
    try:
        return importlib.import_module("cupy_backends.cuda.libs.nvtx")
    except ImportError:
        return None


def device_count() -> int:
    """How many CUDA devices this process can use; raises DeviceError where there is no CuPy or no driver."""
    runtime = cupy().cuda.runtime
    try:
        return int(runtime.getDeviceCount())
    except runtime.CUDARuntimeError as error:
        if error.status == _NO_DEVICE:
            return 0
        raise DeviceError(
            f"the CUDA driver does not answer: {error}",
            hint="is an NVIDIA driver installed (nvidia-smi), and does the container see it (--gpus all)?",
        ) from None


def check_device(number: int) -> int:
    """The number unchanged; raises DeviceError where there is no such device."""
    count = device_count()
    if not 0 <= number < count:
        raise DeviceError(
            f"there is no CUDA device {number}: this process sees {count}",
            hint="see `holoray doctor`; CUDA_VISIBLE_DEVICES may hide devices",
        )
    return number
