"""Accumulators whose tensor lies on a device: fragments are opened on the host, and weights made where they stay.

`out` is an array of the device, uint16 for BF16 (`device_dtype`). Slots travel as host arrays, as everywhere.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from holoray.codecs.base import Codec
from holoray.codecs.planes import PlanesCodec
from holoray.codecs.raw import RawCodec
from holoray.fragment import FragmentEntry
from holoray.kernels.device import Device
from holoray.kernels.planes_decode import PlanesAccumulator, RunLayers
from holoray.kernels.planes_groups import KINDS
from holoray.kernels.planes_launch import RUN, SLACK, launch
from holoray.kernels.raw import RawAccumulator
from holoray.kernels.scratch import Scratch
from holoray.tensor import Array, TensorSpec

_ALIGNMENT = 16
_RUN_COPIES = 3
"""The run as it was, and its sections, which take more than the run only where nearly all weights are outliers."""
_RUN_TABLES = 64 << 10
"""Records, verdicts, and the room behind sections."""


def device_dtype(spec: TensorSpec) -> np.dtype[Any]:
    """The dtype of a tensor on a device: its own where NumPy itself has it, else unsigned numbers of that width."""
    own = spec.numpy_dtype
    return own if own.kind in "fiucb" else np.dtype(f"<u{own.itemsize}")


def turn_nbytes(spec: TensorSpec, codec: Codec) -> int:
    """Bytes of a device, besides weights and state, that adding a slot or finalizing takes at most for a moment.

    For `planes` the sections of a run, and the run as it was before; `raw` goes straight to its place. Codecs that
    finalize are allowed for with float32 twice on its way through a transform, and once as it was.
    """
    if isinstance(codec, RawCodec):
        return 0
    if isinstance(codec, PlanesCodec):
        run = codec.run_weights(spec, 0)
        return _RUN_COPIES * run * spec.numpy_dtype.itemsize + _RUN_TABLES
    return 3 * spec.size * 4


class DeviceRawAccumulator(RawAccumulator):
    """Runs are copied to their place on the device."""

    def __init__(self, spec: TensorSpec, codec: Codec, out: Array, device: Device) -> None:
        super().__init__(spec, codec, out)
        self._device = device

    def landing(self, entry: FragmentEntry) -> None:
        """Nothing is read straight to a device."""

    def discard(self, slot: int) -> None:
        """Nothing was read here."""

    def read_slot(self, slot: int) -> npt.NDArray[Any]:
        return self._device.download(super().read_slot(slot))

    def write_slot(self, slot: int, content: npt.NDArray[Any]) -> None:
        self._device.write(super().read_slot(slot), content)
        self._device.synchronize()

    def accumulate(self, slot: int, decompressed: Any, scratch: Scratch) -> None:
        self.write_slot(slot, np.frombuffer(decompressed, np.uint8))
        self._held[slot] = 1

    def accumulate_opened(self, slot: int, raw: Any) -> None:
        self._device.copy(raw, super().read_slot(slot))
        self._held[slot] = 1


class DevicePlanesAccumulator(PlanesAccumulator):
    """Entropy codes are opened on the host, digits become words on the device."""

    def __init__(self, spec: TensorSpec, codec: PlanesCodec, out: Array, device: Device) -> None:
        super().__init__(spec, codec, out)
        self._device = device

    @staticmethod
    def _out_dtype(spec: TensorSpec) -> np.dtype[Any]:
        return device_dtype(spec)

    def read_slot(self, slot: int) -> npt.NDArray[Any]:
        return self._device.download(super().read_slot(slot))

    def write_slot(self, slot: int, content: npt.NDArray[Any]) -> None:
        self._device.write(super().read_slot(slot), content)
        self._device.synchronize()

    def _copy(self, weights: Any, scratch: Scratch) -> Any:
        return self._device.copy(weights)

    def _restore(self, weights: Any, before: Any) -> None:
        self._device.copy(before, weights)

    def _decode(self, run: RunLayers, held: int, target: int, scratch: Scratch) -> int:
        places = [p for layer in range(held, target) for p in self.codec.layout(self.spec, layer, run.slot).sections]
        packed, starts = pack_sections(run, places, scratch)
        sections = self._device.upload(packed)
        records = np.zeros(1, RUN)
        record = records[0]
        record["out"] = self._device.address(self._weights(run.slot))
        record["sections"][places] = self._device.address(sections) + starts
        record["lengths"], record["offsets"] = run.lengths, run.offsets
        record["count"] = self.codec.run_weights(self.spec, run.slot)
        record["kind"], record["threshold"] = KINDS[self.spec.dtype], self.codec.threshold
        record["top"], record["tail_cut"] = self.codec.top, self.codec.tail_cut
        record["held"], record["layers"] = held, target
        return int(launch(self._device, records)[0])


def pack_sections(
    run: RunLayers, places: Sequence[int], scratch: Scratch
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint64]]:
    """The raw sections at `places` one behind the other, as the kernels want them, and where each begins.

    The array lives in `scratch`. Every section, also an empty one, has `SLACK` readable bytes behind it.
    """
    lengths = run.lengths[list(places)]
    room = -(-(lengths + SLACK) // _ALIGNMENT) * _ALIGNMENT
    ends = np.cumsum(room)
    packed = scratch.array("planes.packed", int(ends[-1]), np.uint8)
    starts = ends - room
    for place, start, length in zip(places, starts.tolist(), lengths.tolist(), strict=True):
        ctypes.memmove(packed.ctypes.data + start, int(run.addresses[place]), length)
    return packed, starts.astype(np.uint64)
