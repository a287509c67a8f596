"""Which encoder and accumulators serve a codec, on the CPU and on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from holoray.codecs.base import Codec
from holoray.errors import UsageError
from holoray.kernels import dealing, dequant, hadamard, planes_decode, planes_encode
from holoray.kernels.accumulator import Accumulator
from holoray.kernels.device import Device
from holoray.kernels.device_accumulators import DevicePlanesAccumulator, DeviceRawAccumulator
from holoray.kernels.device_dealt import (
    DeviceLowRankAccumulator,
    DeviceProjectionAccumulator,
    DeviceSpectralAccumulator,
)
from holoray.kernels.encoder import EncodeOptions, Encoder
from holoray.kernels.lowrank import LowRankAccumulator, LowRankEncoder
from holoray.kernels.planes_decode import PlanesAccumulator
from holoray.kernels.planes_encode import PlanesEncoder
from holoray.kernels.projection import ProjectionAccumulator, ProjectionEncoder
from holoray.kernels.raw import RawAccumulator, RawEncoder
from holoray.kernels.spectral import SpectralAccumulator, SpectralEncoder
from holoray.tensor import Array, TensorSpec

ENCODERS: Final[dict[str, type[Encoder]]] = {
    "raw": RawEncoder,
    "planes": PlanesEncoder,
    "spectral": SpectralEncoder,
    "projection": ProjectionEncoder,
    "lowrank": LowRankEncoder,
}
ACCUMULATORS: Final[dict[str, type[Accumulator]]] = {
    "raw": RawAccumulator,
    "planes": PlanesAccumulator,
    "spectral": SpectralAccumulator,
    "projection": ProjectionAccumulator,
    "lowrank": LowRankAccumulator,
}
DEVICE_ACCUMULATORS: Final[dict[str, Callable[[TensorSpec, Any, Any, Device], Accumulator]]] = {
    "raw": DeviceRawAccumulator,
    "planes": DevicePlanesAccumulator,
    "spectral": DeviceSpectralAccumulator,
    "projection": DeviceProjectionAccumulator,
    "lowrank": DeviceLowRankAccumulator,
}


def check_codec_name(codec: str) -> str:
    """Return the name unchanged; raises UsageError for one that nobody registered."""
    if codec not in ENCODERS:
        raise UsageError(f"unknown codec {codec!r}", hint=f"choose one of {', '.join(ENCODERS)}, auto")
    return codec


def make_encoder(codec: str, spec: TensorSpec, array: Array, options: EncodeOptions) -> Encoder:
    """An encoder of a codec that can represent the array."""
    return ENCODERS[codec](spec, array, options)


def make_accumulator(
    spec: TensorSpec, codec: Codec, out: Array, memory: npt.NDArray[np.uint8] | None = None
) -> Accumulator:
    """An accumulator on the CPU that fills `out` (zeros of the spec's dtype and shape).

    `memory`: zeros of `state_nbytes`.
    """
    return ACCUMULATORS[codec.name](spec, codec, out, memory)


def make_device_accumulator(spec: TensorSpec, codec: Codec, out: Any, device: Device) -> Accumulator:
    """An accumulator that fills `out` on a device (zeros of `device_dtype` and the spec's shape).

    Raises UsageError for a codec whose weights are made on the host only.
    """
    check_device_codec(spec, codec)
    return DEVICE_ACCUMULATORS[codec.name](spec, codec, out, device)


def check_device_codec(spec: TensorSpec, codec: Codec) -> None:
    """Raise UsageError for a tensor whose codec has no accumulator on a device."""
    if codec.name not in DEVICE_ACCUMULATORS:
        hint = f"codecs on a device: {', '.join(DEVICE_ACCUMULATORS)}"
        raise UsageError(f"{codec.name} tensors are not accumulated on a device", hint=hint, tensor=spec.name)


def state_nbytes(spec: TensorSpec, codec: Codec) -> int:
    """Bytes of state that this codec's accumulator keeps besides the tensor itself."""
    return ACCUMULATORS[codec.name].state_nbytes(spec, codec)


def warm() -> None:
    """Compile every kernel once (cached on disk): call before threads or processes would each do it."""
    planes_encode.warm()
    dequant.warm()
    warm_accumulators()


def warm_accumulators() -> None:
    """Compile, or load from the cache, what decoding needs."""
    planes_decode.warm()
    dealing.warm()
    hadamard.warm()
