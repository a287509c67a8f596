"""Devices for tests of real warm-ups: the CUDA kernels on the CPU, in every worker's process."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import on_cpu
from on_cpu import CpuDevice
from ray import cloudpickle

from holoray.codecs.base import Codec
from holoray.kernels import registry
from holoray.kernels.device import Device
from holoray.kernels.lowrank import LowRankAccumulator
from holoray.kernels.spectral import SpectralAccumulator
from holoray.tensor import TensorSpec

for module in (sys.modules[__name__], on_cpu):  # workers do not have the tests on their path
    cloudpickle.register_pickle_by_value(module)


def on_host(kind: Any) -> Any:
    """An accumulator of the CPU as one of a device: the memory of a `CpuDevice` is the CPU's."""

    def make(spec: TensorSpec, codec: Codec, out: Any, device: Device) -> Any:
        return kind(spec, codec, out.view(spec.numpy_dtype))

    return make


def register() -> None:
    """Codecs whose weights are not made on a device yet, so that state that outlives a generation is tested, too."""
    registry.DEVICE_ACCUMULATORS.setdefault("spectral", on_host(SpectralAccumulator))
    registry.DEVICE_ACCUMULATORS.setdefault("lowrank", on_host(LowRankAccumulator))


@dataclass(frozen=True)
class MakeDevice:
    """Opens a library that was compiled once for all workers."""

    library: Path

    def __call__(self) -> CpuDevice:
        register()
        return CpuDevice(ctypes.CDLL(str(self.library)))
