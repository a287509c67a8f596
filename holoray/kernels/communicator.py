"""Sums over the devices of a group: what a communicator does, and how the members of a group find each other.

Nobody waits without end: every wait looks at `stop`, an event that anybody may set from another thread, and has a
deadline. A group that lost a member, or was told to stop, is of no use any more: its members make another one.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np

from holoray.errors import UsageError, WorkerLostError
from holoray.kernels.device import Device

UNSIGNED: Final = ("uint8", "uint32", "uint64")
"""What NCCL sums without loss; it has no uint16."""


class Reduction(Protocol):
    """A sum under way; its array belongs to it until `wait` returns."""

    def wait(self) -> None:
        """Return when the array holds the sum. Raises WorkerLostError if it never will."""


class Communicator(Protocol):
    """One member's end of a group. Used by one thread at a time, all but `abort`."""

    rank: int
    size: int

    def all_reduce(self, array: Any) -> Reduction:
        """Begin to replace a contiguous unsigned array of the device, in all members, by the sum over them.

        Members sum arrays of the same size and dtype in the same order.
        """

    def abort(self) -> None:
        """Let every wait, now and later, fail with WorkerLostError. From any thread."""

    def close(self) -> None:
        """Leave the group. Of no use afterwards; may be called twice."""


class Communicators(Protocol):
    """How members find each other; pickles, so that a job can tell its workers."""

    timeout_s: float
    """No join and no reduction takes longer."""

    def ticket(self) -> bytes:
        """What all members of a new group join with; made by the process that becomes its rank 0.

        Raises DeviceError where the library is missing.
        """

    def join(self, ticket: bytes, *, rank: int, size: int, device: Device, stop: threading.Event) -> Communicator:
        """Return when all `size` members are there. Raises WorkerLostError if they are not in time, or on `stop`."""


@dataclass(frozen=True, slots=True)
class Patience:
    """A wait that ends: with `check` raising WorkerLostError."""

    stop: threading.Event
    timeout_s: float
    began: float = field(default_factory=time.monotonic)

    def check(self) -> None:
        if self.stop.is_set():
            raise WorkerLostError("the group of devices was told to stop")
        if time.monotonic() - self.began > self.timeout_s:
            raise WorkerLostError(f"a device of the group did not answer within {self.timeout_s:.0f} s")


def check_unsigned(array: Any) -> None:
    """Raise UsageError for an array that has no exact sum."""
    if np.dtype(array.dtype).name not in UNSIGNED or not array.flags.c_contiguous:
        raise UsageError(f"sums over devices take contiguous arrays of {', '.join(UNSIGNED)}, not {array.dtype}")
