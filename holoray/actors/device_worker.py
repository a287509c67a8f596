"""A worker whose memory is a device: it also combines with others at once, and gives weights away."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from holoray.actors.device_memory import DeviceGenerations
from holoray.actors.in_place import InPlaceGenerations
from holoray.actors.messages import Assign, Group, Slot, Survey
from holoray.actors.worker import Bytes, JobSpec, Worker
from holoray.errors import UsageError
from holoray.kernels import registry
from holoray.kernels.combine import combine
from holoray.kernels.communicator import Communicator
from holoray.kernels.frames import opens_on_device
from holoray.manifest import Manifest
from holoray.pipelines.meter import Tally, stage


class DeviceWorker(Worker):
    """A node of its own: what it holds goes with it."""

    def __init__(self, spec: JobSpec, name: str, node: str, encoded: Bytes) -> None:
        super().__init__(spec, name, f"{name}@{node}", encoded)
        assert spec.accelerator is not None
        self._accelerator = spec.accelerator
        self._stops: dict[tuple[int, int], threading.Event] = {}

    @property
    def cores(self) -> int:
        return self._accelerator.cores or 1

    def _make_memory(self, manifest: Manifest) -> DeviceGenerations:
        device = self._accelerator.make_device()
        kind = InPlaceGenerations if self._accelerator.in_place else DeviceGenerations
        self._device_memory = kind(
            manifest,
            device,
            self._accelerator.device_bytes,
            sharded=self._spec.placement.is_sharded,
            opens_frames=opens_on_device(self._accelerator.decompress, device),
        )
        return self._device_memory

    def ticket(self, reign: int) -> bytes:
        """What the members of a group join with, of which this worker is the first."""
        self._check_reign(reign)
        return self._accelerator.communicators.ticket()

    def abort(self, reign: int, group: int) -> None:
        """End this worker's part in a group, now or when it begins; answered whatever the worker is busy with."""
        self._stop(reign, group).set()

    def share(self, generation: int) -> list[tuple[tuple[int, ...], bytes]]:
        """Tensors of each block of a published generation, and what a process on this device opens it with."""
        return self._device_memory.share(generation)

    def tensors(self, generation: int) -> list[int]:
        """The tensors of a published generation that are here."""
        return self._device_memory.tensors(generation)

    def fetch(self, generation: int, tensor: int) -> Any:
        """The bytes of a published tensor, uint8."""
        return self._device_memory.fetch(generation, tensor)

    def _survey(self, task: Assign) -> Survey:
        if task.shard is not None:
            self._device_memory.settle(task.shard, task.generation)
        return super()._survey(task)

    def _perform(self, task: Assign, digest: int, contents: Bytes | None) -> None:
        with self._device_memory.device.range(task.kind.value):
            super()._perform(task, digest, contents)

    def _combine(self, reign: int, task: Assign, ticket: bytes) -> None:
        group = task.group
        assert group is not None
        tally = Tally()
        with stage(tally, "combine"), self._device_memory.device.range("combine"):
            communicator = self._accelerator.communicators.join(
                ticket,
                rank=task.rank,
                size=group.size,
                device=self._device_memory.device,
                stop=self._stop(reign, group.number),
            )
            try:
                self._exchange(group, task.rank, task.held, communicator)
            except BaseException:
                communicator.abort()  # closing alone would wait for the others, who wait for this member's next sum
                raise
            finally:
                communicator.close()
        self._meter.add(tally)

    def _exchange(self, group: Group, rank: int, taken: Mapping[Slot, int], communicator: Communicator) -> None:
        memory = self._device_memory
        mine = [owner == rank for owner in group.owners]
        if not all(memory.holds(slot) for slot, own in zip(group.slots, mine, strict=True) if own):
            raise UsageError("this device is to contribute slots that it does not hold")
        for slot in taken:
            memory.begin(slot)
        parts = [memory.part(slot) for slot in group.slots]
        wanted = [slot in taken for slot in group.slots]
        for done in combine(parts, mine, wanted, communicator, memory.device):
            for index in done:
                if wanted[index]:
                    memory.hold(group.slots[index], taken[group.slots[index]])
                    self._combined_bytes += parts[index].nbytes

    def _stop(self, reign: int, group: int) -> threading.Event:
        """The event that ends this worker's part in a group; an abort may come before the group's task."""
        for old in [key for key in self._stops if key < (reign, group)]:
            self._stops.pop(old, None)
        return self._stops.setdefault((reign, group), threading.Event())


def check_codecs(manifest: Manifest) -> None:
    """Raise UsageError for a store with tensors that no device accumulates."""
    for entry in manifest.tensors:
        if entry.codec not in registry.DEVICE_ACCUMULATORS:
            raise UsageError(
                f"{entry.codec} tensors are not accumulated on a device",
                hint=f"codecs on a device: {', '.join(registry.DEVICE_ACCUMULATORS)}; or warm up without --device",
                tensor=entry.name,
            )
