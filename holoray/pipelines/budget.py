"""Memory bounded by an object, not by hope."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt


class ByteBudget:
    """Hands out reused, pre-touched buffers of at most `limit_bytes` in all; `borrow` blocks until there is room.

    One request above the whole limit is let through alone, so that a fragment larger than the budget still loads.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.peak_bytes = 0
        self._idle: list[npt.NDArray[np.uint8]] = []
        self._changed = threading.Condition()

    @contextmanager
    def borrow(self, nbytes: int) -> Iterator[memoryview]:
        """`nbytes` of writable memory with whatever was left in it; valid inside the `with` block only."""
        with self._changed:
            self._changed.wait_for(lambda: self.used_bytes == 0 or self.used_bytes + nbytes <= self.limit_bytes)
            self.used_bytes += nbytes
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)
            buffer = self._take(nbytes)
        try:
            yield buffer.data[:nbytes]
        finally:
            with self._changed:
                self.used_bytes -= nbytes
                self._idle.append(buffer)
                self._trim()
                self._changed.notify_all()

    def _take(self, nbytes: int) -> npt.NDArray[np.uint8]:
        fitting = [i for i, buffer in enumerate(self._idle) if buffer.size >= nbytes]
        if fitting:
            return self._idle.pop(min(fitting, key=lambda i: self._idle[i].size))
        if self._idle:
            self._idle.pop()  # too small for today's batches: replaced by the larger one
        # Rounding up lets batches of nearly equal size share buffers.
        buffer = np.empty(max(1 << 16, -(-nbytes // (1 << 18)) * (1 << 18)), np.uint8)
        buffer.fill(0)
        return buffer

    def _trim(self) -> None:
        while self._idle and sum(buffer.size for buffer in self._idle) > self.limit_bytes:
            self._idle.pop(0)
