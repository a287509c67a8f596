"""What a job needs to know to use devices: how a worker gets its own, and how several combine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from holoray.kernels.communicator import Communicators
from holoray.kernels.cuda.device import CudaDevice
from holoray.kernels.device import Device
from holoray.kernels.nccl import NcclCommunicators


@dataclass(frozen=True, slots=True)
class Accelerator:
    """Pickles. `make_device` is called once in each worker, which sees no device but its own.

    `threads`: how many decode in each worker; by default the CPUs of the cluster are shared out.
    """

    make_device: Callable[[], Device] = CudaDevice
    communicators: Communicators = field(default_factory=NcclCommunicators)
    threads: int | None = None
