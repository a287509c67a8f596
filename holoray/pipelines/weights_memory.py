"""Where weights are made: this process's memory, or a device's, within a number of bytes."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Final, Protocol

from holoray.errors import CapacityError, UsageError
from holoray.kernels.accumulator import Accumulator
from holoray.kernels.device import Device
from holoray.kernels.device_accumulators import device_dtype, turn_nbytes
from holoray.kernels.memory import zeros
from holoray.kernels.registry import check_device_codec, make_accumulator, make_device_accumulator, state_nbytes
from holoray.manifest import Manifest
from holoray.pipelines.frame_groups import group_nbytes
from holoray.pipelines.turns import turns_within
from holoray.tensor import Array

RESERVE_BYTES: Final = 256 << 20
"""What a load leaves free on a device unless told otherwise: modules, workspaces of libraries, other arrays."""
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class WeightsMemory(Protocol):
    """Makes the accumulators of a manifest's tensors."""

    def prepare(self, manifest: Manifest, threads: int) -> int:
        """Of so many threads, how many may decode at a time.

        Raises CapacityError where the model cannot fit, UsageError for codecs that are not decoded there.
        """

    def accumulator(self, manifest: Manifest, tensor: int) -> Accumulator:
        """A new accumulator over zeros; raises CapacityError where there is no room."""

    def take(self, accumulator: Accumulator) -> Array:
        """The weights of an accumulator that nobody uses any more, on the host."""


class HostMemory:
    """NumPy arrays. `resident`: all of them at a time."""

    def __init__(self, *, resident: bool = True) -> None:
        self._resident = resident

    def prepare(self, manifest: Manifest, threads: int) -> int:
        if self._resident:
            check_room(resident_nbytes(manifest))
        return threads

    def accumulator(self, manifest: Manifest, tensor: int) -> Accumulator:
        spec = manifest.tensors[tensor].spec
        try:
            return make_accumulator(spec, manifest.codecs[tensor], zeros(spec.shape, spec.numpy_dtype))
        except MemoryError:
            raise CapacityError(
                f"no memory for the {spec.nbytes} bytes of tensor {spec.name!r}", tensor=spec.name
            ) from None

    def take(self, accumulator: Accumulator) -> Array:
        return accumulator.out


class DeviceWeights:
    """Arrays of a device (uint16 for BF16, see `device_dtype`): all weights, and what decoding takes for a moment.

    Together at most `limit_bytes`, by default what is free when it is made, less a reserve. `opens_frames`: zstd frames
    are opened there, too.
    """

    def __init__(self, device: Device, limit_bytes: int | None = None, *, opens_frames: bool = False) -> None:
        check_device_bytes(limit_bytes)
        self.device = device
        self._opens_frames = opens_frames
        self.limit_bytes = max(device.free_bytes() - RESERVE_BYTES, 0) if limit_bytes is None else limit_bytes

    def prepare(self, manifest: Manifest, threads: int) -> int:
        return self.width_beside(resident_nbytes(manifest), manifest, threads)

    def width_beside(self, nbytes: int, manifest: Manifest, threads: int) -> int:
        """Of so many threads, how many may decode at a time where `nbytes` stay; raises as `prepare`."""
        turn_bytes = self._turn_nbytes(manifest)
        if nbytes + turn_bytes > self.limit_bytes:
            raise CapacityError(
                f"the weights and what is kept to make them take {nbytes} bytes, and decoding takes {turn_bytes} "
                f"more, of {self.limit_bytes} on the device",
                hint="free memory there, raise device_bytes, or use `holoray load STORE OUT`, which streams to a file",
            )
        return turns_within(self.limit_bytes - nbytes, turn_bytes, threads)

    def spare_bytes(self, nbytes: int, manifest: Manifest, threads: int) -> int:
        """What is left beside `nbytes` and what so many threads take for a moment; may be less than nothing."""
        return self.limit_bytes - nbytes - threads * self._turn_nbytes(manifest)

    def accumulator(self, manifest: Manifest, tensor: int) -> Accumulator:
        spec, codec = manifest.tensors[tensor].spec, manifest.codecs[tensor]
        with self.device.shared():
            out = self.device.zeros(spec.shape, device_dtype(spec))
            return make_device_accumulator(spec, codec, out, self.device)

    def take(self, accumulator: Accumulator) -> Array:
        return self.device.download(accumulator.out).view(accumulator.spec.numpy_dtype)

    def _turn_nbytes(self, manifest: Manifest) -> int:
        for tensor, codec in zip(manifest.tensors, manifest.codecs, strict=True):
            check_device_codec(tensor.spec, codec)
        fragments = (f for tensor in manifest.tensors for f in tensor.fragments)
        group_bytes = group_nbytes(fragments) if self._opens_frames else 0
        needs = [need for need in _needs(manifest) if self._may_hold(need)]
        return max((group_bytes, *(need.turn_bytes for need in needs)))

    def _may_hold(self, need: _Need) -> bool:
        """Whether a tensor is to be made on the device at all."""
        return True


class SpillingMemory(DeviceWeights):
    """For a load that lets go of each tensor when it is done: a tensor for which the device has no room goes to the
    host. The weights are the same, and neither has to hold the model. At most half of the bytes are for decoding,
    unless one turn takes more; a tensor that would not fit even alone, with its state and a turn, claims none.
    """

    def __init__(self, device: Device, limit_bytes: int | None = None, *, opens_frames: bool = False) -> None:
        super().__init__(device, limit_bytes, opens_frames=opens_frames)
        self.spilled: list[str] = []
        """Tensors that went to the host."""
        self._host = HostMemory(resident=False)
        self._there: dict[str, int] = {}
        self._room = 0
        self._lock = threading.Lock()

    def prepare(self, manifest: Manifest, threads: int) -> int:
        turn_bytes = self._turn_nbytes(manifest)
        width = turns_within(self.limit_bytes // 2, turn_bytes, threads)
        self._room = self.limit_bytes - width * turn_bytes
        return width

    def accumulator(self, manifest: Manifest, tensor: int) -> Accumulator:
        need = _need(manifest, tensor)
        spec = manifest.tensors[tensor].spec
        if self._may_hold(need) and self._reserve(spec.name, need.nbytes):
            try:
                return super().accumulator(manifest, tensor)
            except CapacityError:  # others use the device, too
                self._release(spec.name)
        self.spilled.append(spec.name)
        return self._host.accumulator(manifest, tensor)

    def _may_hold(self, need: _Need) -> bool:
        return need.nbytes + need.turn_bytes <= self.limit_bytes

    def take(self, accumulator: Accumulator) -> Array:
        if accumulator.spec.name not in self._there:
            return self._host.take(accumulator)
        weights = super().take(accumulator)
        self._release(accumulator.spec.name)
        return weights

    def _reserve(self, name: str, nbytes: int) -> bool:
        with self._lock:
            if sum(self._there.values()) + nbytes > self._room:
                return False
            self._there[name] = nbytes
            return True

    def _release(self, name: str) -> None:
        with self._lock:
            del self._there[name]


def check_device_bytes(limit_bytes: int | None, *, has_device: bool = True) -> None:
    """Raise UsageError for a bound of a device's memory that leaves nothing, or where there is no device."""
    if limit_bytes is not None and not has_device:
        raise UsageError("device_bytes without a device", hint="name one (--device cuda), or leave this out")
    if limit_bytes is not None and limit_bytes <= 0:
        raise UsageError(f"{limit_bytes} bytes of a device", hint="leave it out to use what is free")


def check_room(nbytes: int) -> None:
    """Refuse what no memory of this machine can hold: a clear error beats being killed."""
    total = os.sysconf("SC_PHYS_PAGES") * _PAGE
    if nbytes > total:
        raise CapacityError(
            f"the weights and what is kept to refine them take {nbytes} bytes and this machine has {total}",
            hint="use `holoray load STORE OUT`, which streams to a file",
        )


def resident_nbytes(manifest: Manifest) -> int:
    """Bytes of all weights, and of the state that is kept to refine them."""
    return sum(need.nbytes for need in _needs(manifest))


def tensor_nbytes(manifest: Manifest, tensor: int) -> int:
    """Bytes of a tensor while it is made: itself, and its state."""
    return _need(manifest, tensor).nbytes


@dataclass(frozen=True, slots=True)
class _Need:
    """What a tensor takes on a device: weights and state as long as it is there, and a turn's bytes for a moment."""

    nbytes: int
    turn_bytes: int


def _need(manifest: Manifest, tensor: int) -> _Need:
    spec, codec = manifest.tensors[tensor].spec, manifest.codecs[tensor]
    return _Need(spec.nbytes + state_nbytes(spec, codec), turn_nbytes(spec, codec))


def _needs(manifest: Manifest) -> list[_Need]:
    return [_need(manifest, tensor) for tensor in range(len(manifest.tensors))]
