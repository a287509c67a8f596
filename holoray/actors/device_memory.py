"""Where weights lie on a device: one segment a generation, for as long as its worker lives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from holoray.actors.marks import Marks
from holoray.actors.messages import Holdings, Slot, Survey
from holoray.actors.slot_memory import Layout, SlotMemory
from holoray.errors import CapacityError, SourceError
from holoray.kernels.accumulator import Accumulator
from holoray.kernels.combine import SlotPart
from holoray.kernels.device import Device
from holoray.kernels.device_accumulators import device_dtype, turn_nbytes
from holoray.kernels.registry import make_device_accumulator, state_nbytes
from holoray.manifest import Manifest
from holoray.pipelines.frame_groups import group_nbytes
from holoray.pipelines.plan import Unit
from holoray.pipelines.turns import turns_within
from holoray.pipelines.weights_memory import RESERVE_BYTES, check_device_bytes
from holoray.tensor import TensorSpec


def device_layout(manifest: Manifest) -> Layout:
    """Where the tensors lie in a segment of a device."""
    return Layout.of(t.spec.nbytes for t in manifest.tensors)


def device_view(segment: Any, layout: Layout, tensor: int, spec: TensorSpec) -> Any:
    """A tensor of a segment, with the dtype that it has on a device."""
    return segment[layout.ranges[tensor]].view(device_dtype(spec)).reshape(spec.shape)


class DeviceGenerations(SlotMemory):
    """The generations of one worker's device; marks are the worker's own, since nobody outlives it here.

    All of it, and what decoding takes for a moment, is at most `limit_bytes` (default: what is free when it is made,
    less a reserve). `opens_frames`: zstd frames are opened there, too. Raises CapacityError where a further generation
    does not fit beside the last one.
    """

    device: Device

    def __init__(
        self, manifest: Manifest, device: Device, limit_bytes: int | None = None, *, opens_frames: bool = False
    ) -> None:
        super().__init__(manifest)
        check_device_bytes(limit_bytes)
        self.device = device
        self.opens_frames = opens_frames
        self.limit_bytes = max(device.free_bytes() - RESERVE_BYTES, 0) if limit_bytes is None else limit_bytes
        self._layout = device_layout(manifest)
        pairs = list(zip([t.spec for t in manifest.tensors], manifest.codecs, strict=True))
        states = [state_nbytes(spec, codec) for spec, codec in pairs]
        self._state_bytes = sum(states) + max(states, default=0)
        """What is kept to refine tensors: that of one twice, while the next generation takes it over."""
        self._turn_bytes = [turn_nbytes(spec, codec) for spec, codec in pairs]
        groups = group_nbytes(f for t in manifest.tensors for f in t.fragments) if opens_frames else 0
        self._largest_turn_bytes = max((groups, *self._turn_bytes))
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

    def width(self, work: Iterable[Unit], threads: int) -> int:
        return turns_within(self.limit_bytes - self._kept_bytes, self._turn_nbytes(tuple(work)), threads)

    def _turn_nbytes(self, work: Sequence[Unit]) -> int:
        group_bytes = group_nbytes(f for unit in work for f in unit.fragments) if self.opens_frames else 0
        return max((group_bytes, *(self._turn_bytes[unit.tensor] for unit in work)))

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

    @property
    def _kept_bytes(self) -> int:
        return len(self._generations) * self._layout.nbytes + self._state_bytes

    def _check_room(self) -> None:
        """Before a generation is allocated, and so before anything of it is read."""
        more, turn = self._layout.nbytes, self._largest_turn_bytes
        if self._kept_bytes + more + turn > self.limit_bytes:
            raise CapacityError(
                f"a generation takes {more} bytes of the device, what is there already and what is kept to refine it "
                f"{self._kept_bytes}, decoding {turn}: more than {self.limit_bytes}",
                hint="two generations must fit at a time: ask for fewer target qualities, or use larger devices",
            )

    def _open(self, generation: int) -> tuple[Any, Marks]:
        if generation not in self._generations:
            self._check_room()
            marks = Marks(self._manifest, np.zeros(Marks.nbytes(self._manifest), np.uint8))
            with self.device.shared():
                self._generations[generation] = self.device.segment(self._layout.nbytes), marks
        stateful = {t: a for t, a in self._accumulators.items() if a.needs_finalize}
        self._before = self._before | stateful if generation == self._making + 1 else {}
        return self._generations[generation]

    def _last_segment(self) -> Any:
        return self._generations[self._making - 1][0]

    def _place(self, segment: Any, tensor: int) -> Any:
        return segment[self._layout.ranges[tensor]]

    def _copy_bytes(self, content: Any, to: Any) -> None:
        self.device.copy(content, to)

    def _await_copies(self) -> None:
        self.device.synchronize()

    def _make_accumulator(self, tensor: int) -> Accumulator:
        entry, codec = self._manifest.tensors[tensor], self._manifest.codecs[tensor]
        out = device_view(self._opened(), self._layout, tensor, entry.spec)
        with self.device.shared():  # all threads use it, on streams of their own
            accumulator = make_device_accumulator(entry.spec, codec, out, self.device)
        if tensor in self._before:
            with self.device.shared():
                accumulator.combine(self._before.pop(tensor))  # the merge law: what it held, in a new tensor
        return accumulator
