"""Fragments of a batch whose zstd frames are opened on the device, many at a time (ADR 0025).

Digests were checked before. A group is opened and added in one turn, so what it takes on the device is bounded by
`group_nbytes` for each thread that has a turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, cast

from holoray.compression import ZSTD, decompress
from holoray.errors import DeviceError, FormatError
from holoray.fragment import FragmentEntry
from holoray.kernels.accumulator import Accumulator
from holoray.kernels.device import Device
from holoray.kernels.frames import NVCOMP, FrameTaker, frame_nbytes, is_plain, open_frames
from holoray.pipelines.plan import Unit
from holoray.pipelines.turns import Turns

GROUP_BYTES: Final = 32 << 20
"""Of frames and of what they hold: a batch of F32 that were BF16 is one group."""


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """A unit of a batch, its verified payloads, and where it goes."""

    unit: Unit
    payloads: Sequence[memoryview]
    accumulator: Accumulator

    @property
    def nbytes(self) -> int:
        """Bytes of the device that opening it takes."""
        return sum(frame_nbytes(f.stored_bytes, f.raw_bytes) for f in self.unit.fragments)


class NamedError(Exception):
    """What is wrong with one member of a group."""

    def __init__(self, member: Member, fault: FormatError) -> None:
        super().__init__(str(fault))
        self.member, self.fault = member, fault


def groups(members: Iterable[Member], *, on_device: bool) -> Iterator[list[Member]]:
    """Members in order: neighbours whose frames the device opens go together, every other one is alone."""
    group: list[Member] = []
    for member in members:
        takes = on_device and FrameOpener.takes(member)
        if group and (not takes or sum(m.nbytes for m in group) + member.nbytes > GROUP_BYTES):
            yield group
            group = []
        if takes:
            group.append(member)
        else:
            yield [member]
    if group:
        yield group


def group_nbytes(fragments: Iterable[FragmentEntry]) -> int:
    """Bytes of the device that a group of these takes at most, without nvCOMP's own."""
    sizes = [frame_nbytes(f.stored_bytes, f.raw_bytes) for f in fragments if f.compression == ZSTD]
    return min(sum(sizes), max(GROUP_BYTES, *sizes)) if sizes else 0


class FrameOpener:
    """Opens groups on one device."""

    def __init__(self, device: Device) -> None:
        self._device = device

    @staticmethod
    def takes(member: Member) -> bool:
        """Whether the frame of a member may be opened on the device, with the result of the host."""
        return (
            isinstance(member.accumulator, FrameTaker)
            and [f.compression for f in member.unit.fragments] == [ZSTD]
            and member.unit.fragments[0].raw_bytes > 0
            and is_plain(member.payloads[0])
        )

    def add(self, group: Sequence[Member], added: list[Member], turns: Turns) -> None:
        """Open a group and accumulate it; members go to `added` one by one, as soon as they are in.

        Raises NamedError for the first frame that the host refuses as well, DeviceError where nvCOMP alone refuses
        one, CapacityError where there is no room for the group even alone.
        """
        left = list(group)

        def work() -> None:
            frames, sizes = [m.payloads[0] for m in left], [m.unit.fragments[0].raw_bytes for m in left]
            for member, raw in zip(list(left), open_frames(self._device, frames, sizes, where=NVCOMP), strict=True):
                cast(FrameTaker, member.accumulator).accumulate_opened(member.unit.slot, raw)
                self._device.synchronize()
                added.append(left.pop(0))

        try:
            turns.take(work)
        except FormatError as error:
            _name(group)
            raise DeviceError(
                f"nvCOMP refuses a frame that the host opens: {error.message}", hint="decompress on the host"
            ) from None


def _name(group: Sequence[Member]) -> None:
    """Raise NamedError for the first bad frame: nvCOMP does not say which it is."""
    for member in group:
        try:
            decompress(ZSTD, member.payloads[0], member.unit.fragments[0].raw_bytes)
        except FormatError as error:
            raise NamedError(member, error) from None
