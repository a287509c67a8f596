"""Devices for tests of real warm-ups, in every worker's process, and members of their groups that fail."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import faulty_communicator
import on_cpu
from faulty_communicator import Fault, FaultyCommunicator
from on_cpu import CpuDevice
from ray import cloudpickle

from holoray.codecs.base import Codec
from holoray.kernels import device_accumulators, registry
from holoray.kernels.communicator import Communicator
from holoray.kernels.device import Device
from holoray.kernels.host_communicator import HostCommunicators
from holoray.kernels.lowrank import LowRankAccumulator
from holoray.kernels.planes_launch import launch_on_cpu
from holoray.kernels.spectral import SpectralAccumulator
from holoray.tensor import TensorSpec

for module in (sys.modules[__name__], on_cpu, faulty_communicator):  # workers do not have the tests on their path
    cloudpickle.register_pickle_by_value(module)


def on_host(kind: Any) -> Any:
    """An accumulator of the CPU as one of a device: the memory of a `CpuDevice` is the CPU's."""

    def make(spec: TensorSpec, codec: Codec, out: Any, device: Device) -> Any:
        return kind(spec, codec, out.view(spec.numpy_dtype))

    return make


def register() -> None:
    """In a worker: kernels of `planes` are their twins on the CPU, which need not be compiled from C++.

    State that outlives a generation is tested with codecs of the CPU, for the same reason.
    """
    vars(device_accumulators)["launch"] = lambda device, runs: launch_on_cpu(runs)
    registry.DEVICE_ACCUMULATORS["spectral"] = on_host(SpectralAccumulator)
    registry.DEVICE_ACCUMULATORS["lowrank"] = on_host(LowRankAccumulator)


def make_device() -> CpuDevice:
    register()
    return CpuDevice(None)


class Sabotaged:
    """Communicators of which one member, once, meets a fault at its sum number `at`; `log` gets a line for each group
    that a member joined.
    """

    def __init__(self, inner: HostCommunicators, log: Path, fault: Fault | None, rank: int, at: int) -> None:
        self.inner, self.log, self.fault, self.rank, self.at = inner, log, fault, rank, at
        self.timeout_s = inner.timeout_s

    def ticket(self) -> bytes:
        return self.inner.ticket()

    def join(self, ticket: bytes, *, rank: int, size: int, device: Device, stop: threading.Event) -> Communicator:
        with self.log.open("a") as file:
            file.write(f"{ticket.hex()} {rank} {size}\n")
        communicator = self.inner.join(ticket, rank=rank, size=size, device=device, stop=stop)
        if self.fault is None or rank != self.rank or not self._first():
            return communicator
        return FaultyCommunicator(communicator, self.fault, self.at, stop)

    def _first(self) -> bool:
        try:
            self.log.with_suffix(".done").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def groups(self) -> dict[str, set[int]]:
        """Ranks that joined each group, in the order of the groups."""
        found: dict[str, set[int]] = {}
        for line in self.log.read_text().splitlines() if self.log.exists() else []:
            ticket, rank, _ = line.split()
            found.setdefault(ticket, set()).add(int(rank))
        return found
