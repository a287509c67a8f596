"""Where weights lie on a device: one segment a generation, for as long as its worker lives."""

from __future__ import annotations

from typing import Any

import numpy as np

from holoray.actors.marks import Marks
from holoray.actors.messages import Holdings, Slot, Survey
from holoray.actors.slot_memory import Layout, SlotMemory
from holoray.errors import SourceError
from holoray.kernels.accumulator import Accumulator
from holoray.kernels.combine import SlotPart
from holoray.kernels.device import Device
from holoray.kernels.device_accumulators import device_dtype
from holoray.kernels.registry import make_device_accumulator
from holoray.manifest import Manifest
from holoray.tensor import TensorSpec


def device_layout(manifest: Manifest) -> Layout:
    """Where the tensors lie in a segment of a device."""
    return Layout.of(t.spec.nbytes for t in manifest.tensors)


def device_view(segment: Any, layout: Layout, tensor: int, spec: TensorSpec) -> Any:
    """A tensor of a segment, with the dtype that it has on a device."""
    return segment[layout.ranges[tensor]].view(device_dtype(spec)).reshape(spec.shape)


class DeviceMemory(SlotMemory):
    """The generations of one worker's device; marks are the worker's own, since nobody outlives it here.

    Raises CapacityError where a further generation does not fit beside the last one.
    """

    def __init__(self, manifest: Manifest, device: Device) -> None:
        super().__init__(manifest, device_layout(manifest))
        self.device = device
        self._generations: dict[int, tuple[Any, Marks]] = {}
        self._before: dict[int, Accumulator] = {}
        """Accumulators of the last generation whose state goes on, until that is taken over."""

    def survey(self, generation: int) -> Survey:
        for old in [number for number in self._generations if number < generation - 1]:
            del self._generations[old]
        return Survey(self._holdings(generation - 1), self._holdings(generation))

    def retire(self, generation: int) -> None:
        if generation == self._making:
            self._close()
        self._generations.pop(generation, None)

    def part(self, slot: Slot) -> SlotPart:
        """A slot as it is combined."""
        return SlotPart(self.accumulator(slot[0]), slot[1], self.device)

    def holds(self, slot: Slot) -> bool:
        """Whether a slot of the generation in the making is whole."""
        assert self._marks is not None
        return self._marks.holds(slot)

    def share(self, generation: int) -> bytes:
        """What a process on this device passes to `Device.attach`. Raises SourceError if the generation is gone."""
        return self.device.share(self._published(generation))

    def fetch(self, generation: int, tensor: int) -> Any:
        """The bytes of a tensor, on the host. Raises SourceError if the generation is gone."""
        return self.device.download(self._published(generation)[self._layout.ranges[tensor]])

    def _holdings(self, generation: int) -> Holdings:
        return self._generations[generation][1].holdings() if generation in self._generations else Holdings()

    def _published(self, generation: int) -> Any:
        if generation not in self._generations:
            raise SourceError(f"generation {generation} is not on this device any more", hint="ask for the newest")
        return self._generations[generation][0]

    def _open(self, generation: int) -> tuple[Any, Marks]:
        if generation not in self._generations:
            marks = Marks(self._manifest, np.zeros(Marks.nbytes(self._manifest), np.uint8))
            self._generations[generation] = self.device.segment(self._layout.nbytes), marks
        stateful = {t: a for t, a in self._accumulators.items() if a.needs_finalize}
        self._before = self._before | stateful if generation == self._making + 1 else {}
        return self._generations[generation]

    def _last_segment(self) -> Any:
        return self._generations[self._making - 1][0]

    def _make_accumulator(self, tensor: int) -> Accumulator:
        entry, codec = self._manifest.tensors[tensor], self._manifest.codecs[tensor]
        out = device_view(self._opened(), self._layout, tensor, entry.spec)
        accumulator = make_device_accumulator(entry.spec, codec, out, self.device)
        if tensor in self._before:
            accumulator.combine(self._before.pop(tensor))  # the merge law: what it held, in a new tensor
        return accumulator
