"""Devices by the names that users give them."""

from __future__ import annotations

import re
from typing import Final

from holoray.errors import UsageError
from holoray.kernels.device import Device

CPU: Final = "cpu"
_CUDA: Final = re.compile(r"cuda(?::(\d{1,4}))?")


def open_device(name: str) -> Device | None:
    """None for "cpu", where arrays are NumPy's; a CUDA device for "cuda" (the first one) and "cuda:N".

    Raises UsageError for another name, DeviceError for a device that is not there.
    """
    if name == CPU:
        return None
    match = _CUDA.fullmatch(name)
    if match is None:
        raise UsageError(f"device {name!r} is not known", hint="choose cpu, cuda or cuda:N")
    from holoray.kernels.cuda.device import CudaDevice

    return CudaDevice(int(match[1] or 0))
