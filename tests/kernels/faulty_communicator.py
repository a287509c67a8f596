"""A communicator that fails at a chosen sum."""

from __future__ import annotations

import enum
import os
import signal
import threading
from typing import Any

from holoray.errors import WorkerLostError
from holoray.kernels.communicator import Communicator, Reduction


class Fault(enum.Enum):
    DIES = "dies"
    """Leaves the group without a word, and fails."""
    IS_KILLED = "is killed"
    """Its process ends by SIGKILL."""
    HANGS = "hangs"
    """Does nothing until it is told to stop."""


class FaultyCommunicator:
    """Wraps one that works; the sum number `at` (from 0) meets the fault."""

    def __init__(self, inner: Communicator, fault: Fault, at: int, stop: threading.Event) -> None:
        self.inner, self.fault, self.at, self.stop = inner, fault, at, stop
        self.rank, self.size = inner.rank, inner.size
        self.calls = 0

    def all_reduce(self, array: Any) -> Reduction:
        self.calls += 1
        if self.calls <= self.at:
            return self.inner.all_reduce(array)
        if self.fault is Fault.IS_KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault is Fault.HANGS:
            assert self.stop.wait(60)
        self.inner.close()
        raise WorkerLostError("a fault was asked for")

    def abort(self) -> None:
        self.inner.abort()

    def close(self) -> None:
        self.inner.close()
