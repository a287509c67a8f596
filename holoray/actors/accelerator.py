"""What a job needs to know to use devices: how a worker gets its own, and how several combine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from holoray.kernels.communicator import Communicators
from holoray.kernels.cuda.device import CudaDevice
from holoray.kernels.device import Device
from holoray.kernels.frames import HOST, check_decompress
from holoray.kernels.nccl import NcclCommunicators
from holoray.pipelines.weights_memory import check_device_bytes


@dataclass(frozen=True, slots=True)
class Accelerator:
    """Pickles. `make_device` is called once in each worker, which sees no device but its own.

    `cores`: how many decode for each worker; by default the CPUs of the cluster are shared out. `device_bytes`: what a
    worker takes of its device at most, all in all; by default what is free, less a reserve. `decompress`: where zstd
    frames are opened, as for loads: "host", "device" (each worker's node needs nvCOMP) or "auto". `in_place`: a
    generation is refined in the memory of the one before, which takes the weights once instead of twice. Arrays from
    `on_device()` then change once `on_generation` has returned, and nobody is given weights before the next generation
    is whole. Raises UsageError for another word, or a bound that leaves nothing.
    """

    make_device: Callable[[], Device] = CudaDevice
    communicators: Communicators = field(default_factory=NcclCommunicators)
    cores: int | None = None
    device_bytes: int | None = None
    decompress: str = HOST
    in_place: bool = False

    def __post_init__(self) -> None:
        check_device_bytes(self.device_bytes)
        check_decompress(self.decompress)
