"""Combining on devices: slots of which each has one holder become slots that every member of a group has.

The merge law of `accumulator.py` over a wire: what a member does not hold is zeros in its buckets, so that an unsigned
sum over all is every holder's bytes, exactly. Buckets are apart from the weights: a slot may hold an earlier
generation, or what a broken sum left, and none of that is ever added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

from holoray.errors import UsageError
from holoray.kernels.accumulator import Accumulator
from holoray.kernels.communicator import Communicator, Reduction
from holoray.kernels.device import Device
from holoray.tensor import as_bytes

BUCKET_BYTES: Final = 64 << 20
_ALIGNMENT: Final = 16


class Part(Protocol):
    """One slot on a device, and how it comes and goes."""

    @property
    def nbytes(self) -> int:
        """Its size, the same for all members."""

    def pack(self, room: Any) -> None:
        """Copy the slot into uint8[nbytes] of the device."""

    def unpack(self, content: Any) -> None:
        """Overwrite the slot with what another member packed."""


@dataclass(frozen=True, slots=True)
class SlotPart:
    """A slot of an accumulator on a device."""

    accumulator: Accumulator
    slot: int
    device: Device

    @property
    def nbytes(self) -> int:
        return self.accumulator.slot_nbytes(self.slot)

    def pack(self, room: Any) -> None:
        place = self._place()
        if place is None:
            self.device.write(room, as_bytes(self.accumulator.read_slot(self.slot)))
        else:
            self.device.copy(place, room)

    def unpack(self, content: Any) -> None:
        place = self._place()
        if place is None:
            self.accumulator.write_slot(self.slot, self.device.download(content))
        else:
            self.device.copy(content, place)

    def _place(self) -> Any:
        """The slot in the tensor itself; None for one that lies in accumulated state."""
        bounds = self.accumulator.slot_range(self.slot)
        return None if bounds is None else as_bytes(self.accumulator.out)[slice(*bounds)]


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Parts first to past-the-last that are summed together, and where each begins."""

    parts: range
    starts: tuple[int, ...]
    nbytes: int


def combine(
    parts: Sequence[Part],
    mine: Sequence[bool],
    wanted: Sequence[bool],
    communicator: Communicator,
    device: Device,
    *,
    bucket_bytes: int = BUCKET_BYTES,
) -> Iterator[range]:
    """Exchange parts, the same ones in the same order in all members; yields the parts that are in place, in ranges.

    `mine`: which parts this member contributes; `wanted`: which it takes. While one bucket is summed, the next is
    packed and the one before unpacked. Raises UsageError unless each part has exactly one contributor, before anything
    is exchanged, and WorkerLostError where a member is lost: of the parts not yielded, the wanted ones hold anything.
    """
    _check_contributors(mine, communicator, device)
    buckets = _cut([part.nbytes for part in parts], bucket_bytes)
    room = max((bucket.nbytes for bucket in buckets), default=0)
    memories = [device.zeros((room,), np.uint8) for _ in buckets[:2]]
    flying: tuple[_Bucket, Any, Reduction] | None = None
    for number, bucket in enumerate(buckets):
        memory = memories[number % 2][: bucket.nbytes]
        device.clear(memory)
        for index, start in zip(bucket.parts, bucket.starts, strict=True):
            if mine[index]:
                parts[index].pack(memory[start : start + parts[index].nbytes])
        begun = communicator.all_reduce(memory.view(np.uint64))
        if flying is not None:
            yield _land(parts, wanted, *flying)
        flying = bucket, memory, begun
    if flying is not None:
        yield _land(parts, wanted, *flying)
    device.synchronize()


def _land(parts: Sequence[Part], wanted: Sequence[bool], bucket: _Bucket, memory: Any, reduction: Reduction) -> range:
    reduction.wait()
    for index, start in zip(bucket.parts, bucket.starts, strict=True):
        if wanted[index]:
            parts[index].unpack(memory[start : start + parts[index].nbytes])
    return bucket.parts


def _check_contributors(mine: Sequence[bool], communicator: Communicator, device: Device) -> None:
    counts = device.upload(np.asarray(mine, np.uint32))
    communicator.all_reduce(counts).wait()
    wrong = np.flatnonzero(device.download(counts) != 1)
    if wrong.size:
        raise UsageError(f"{wrong.size} of {len(mine)} slots, the first being {wrong[0]}, have not exactly one holder")


def _cut(sizes: Sequence[int], limit: int) -> list[_Bucket]:
    """Consecutive parts, aligned, in buckets of at most `limit` bytes (a larger part alone)."""
    buckets: list[_Bucket] = []
    starts: list[int] = []
    first, end = 0, 0
    for index, size in enumerate(sizes):
        room = -(-size // _ALIGNMENT) * _ALIGNMENT
        if starts and end + room > limit:
            buckets.append(_Bucket(range(first, index), tuple(starts), end))
            first, starts, end = index, [], 0
        starts.append(end)
        end += room
    if starts:
        buckets.append(_Bucket(range(first, len(sizes)), tuple(starts), max(end, _ALIGNMENT)))
    return buckets
