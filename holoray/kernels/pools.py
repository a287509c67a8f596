"""Streams and staging memory that are borrowed and returned: asking the driver for either anew stalls a device.

Both are told how to make what they lend (`HostStream` and `host_memory` where there is no device), are safe to use from
several threads, and hand out what came back last, which is most likely still in a cache.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from holoray.errors import CapacityError, DeadlineError, UsageError

SMALLEST_BYTES: Final = 4 << 10
LARGEST_BYTES: Final = 64 << 20
_POLL_S: Final = 0.002
"""How often a full pool looks whether the device is done with something; nothing announces that."""

Stream = TypeVar("Stream")
Bytes = npt.NDArray[np.uint8]


class Event(Protocol):
    """A point in a stream's work, as CuPy's."""

    @property
    def done(self) -> bool:
        """Whether all work before it is done; does not wait."""


class StreamPool(Generic[Stream]):
    """`count` streams, each with one borrower at a time."""

    def __init__(self, count: int, make_stream: Callable[[], Stream]) -> None:
        if count < 1:
            raise UsageError(f"a pool of {count} streams")
        self.count = count
        self._free = deque(make_stream() for _ in range(count))
        self._changed = threading.Condition()

    @contextmanager
    def borrow(self, timeout_s: float | None = None) -> Iterator[Stream]:
        """A stream for the length of a `with`; queued work goes on behind it. DeadlineError if none comes free."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._free) > 0, timeout_s):
                raise DeadlineError(f"none of {self.count} streams came free in {timeout_s} s")
            stream = self._free.pop()
        try:
            yield stream
        finally:
            with self._changed:
                self._free.append(stream)
                self._changed.notify()

    @property
    def free(self) -> int:
        """How many streams nobody has borrowed."""
        return len(self._free)


@dataclass(frozen=True, slots=True)
class StagingStats:
    """`hits` were served from what had been returned, `misses` by the driver; bytes are those of size classes."""

    hits: int
    misses: int
    borrowed_bytes: int
    in_flight_bytes: int
    free_bytes: int
    peak_bytes: int


@dataclass(slots=True, eq=False)
class _Class:
    free: list[Bytes]
    in_flight: deque[tuple[Event, Bytes]]


def size_class(nbytes: int) -> int:
    """The bytes of the buffer that serves `nbytes`: the next power of two from 4 KiB on; UsageError above 64 MiB."""
    if not 0 <= nbytes <= LARGEST_BYTES:
        raise UsageError(f"staging memory of {nbytes} bytes", hint=f"copy in pieces of at most {LARGEST_BYTES} bytes")
    return max(SMALLEST_BYTES, 1 << max(nbytes - 1, 0).bit_length())


class StagingPool:
    """Page-locked buffers in size classes, at most `limit_bytes` of them in all.

    A buffer that a queued copy still reads comes back with the event behind that copy, and is free once that is done.
    """

    def __init__(self, limit_bytes: int, allocate: Callable[[int], Bytes]) -> None:
        self._limit_bytes = limit_bytes
        self._allocate = allocate
        self._classes: dict[int, _Class] = {}
        self._changed = threading.Condition()
        self._lent: dict[int, int] = {}
        self._total_bytes = self._peak_bytes = self._hits = self._misses = 0

    def prewarm(self, nbytes: int, count: int) -> None:
        """Have `count` free buffers for `nbytes`; raises CapacityError if the limit is in the way."""
        size = size_class(nbytes)
        with self._changed:
            own = self._class(size)
            while len(own.free) < count:
                if not self._make_room(size):
                    raise CapacityError(f"{count} buffers of {size} bytes do not fit into {self._limit_bytes} bytes")
                own.free.append(self._new(size))

    def borrow(self, nbytes: int, timeout_s: float | None = None) -> Bytes:
        """uint8[size class] with whatever was left in it; waits for room. Return it with `give_back`.

        Raises CapacityError if it can never fit, DeadlineError if nothing came back in time.
        """
        size = size_class(nbytes)
        if size > self._limit_bytes:
            raise CapacityError(f"{size} bytes of staging memory, where {self._limit_bytes} are allowed")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while (buffer := self._take(size)) is None:
                if deadline is not None and time.monotonic() >= deadline:
                    raise DeadlineError(f"no {size} bytes of staging memory came free in {timeout_s} s")
                self._changed.wait(_POLL_S if any(c.in_flight for c in self._classes.values()) else timeout_s)
            self._lent[buffer.ctypes.data] = size
            return buffer

    def give_back(self, buffer: Bytes, after: Event | None = None) -> None:
        """Return a borrowed buffer; `after`: the event behind the work that still uses it."""
        with self._changed:
            size = self._lent.pop(buffer.ctypes.data, None)
            if size is None:
                raise UsageError("this buffer was not borrowed here, or was returned already")
            if after is None:
                self._class(size).free.append(buffer)
            else:
                self._class(size).in_flight.append((after, buffer))
            self._changed.notify_all()

    @property
    def stats(self) -> StagingStats:
        with self._changed:
            self._reap()
            free = sum(size * len(c.free) for size, c in self._classes.items())
            in_flight = sum(size * len(c.in_flight) for size, c in self._classes.items())
            lent = sum(self._lent.values())
            return StagingStats(self._hits, self._misses, lent, in_flight, free, self._peak_bytes)

    def _class(self, size: int) -> _Class:
        return self._classes.setdefault(size, _Class([], deque()))

    def _reap(self) -> None:
        """Free what the device is done with. Streams finish in any order: each event is asked."""
        for own in self._classes.values():
            for _ in range(len(own.in_flight)):
                event, buffer = own.in_flight.popleft()
                if event.done:
                    own.free.append(buffer)
                else:
                    own.in_flight.append((event, buffer))

    def _take(self, size: int) -> Bytes | None:
        self._reap()
        own = self._class(size)
        if own.free:
            self._hits += 1
            return own.free.pop()
        if not self._make_room(size):
            return None
        self._misses += 1
        return self._new(size)

    def _make_room(self, size: int) -> bool:
        """Drop free buffers of other classes, the largest first, until `size` more bytes fit."""
        for other in sorted(self._classes, reverse=True):
            free = self._classes[other].free
            while other != size and free and self._total_bytes + size > self._limit_bytes:
                free.pop()
                self._total_bytes -= other
        return self._total_bytes + size <= self._limit_bytes

    def _new(self, size: int) -> Bytes:
        buffer = self._allocate(size)
        self._total_bytes += size
        self._peak_bytes = max(self._peak_bytes, self._total_bytes)
        return buffer


def host_memory(nbytes: int) -> Bytes:
    """Ordinary memory whose pages are there already: the twin of page-locked memory."""
    memory = np.empty(nbytes, np.uint8)
    memory.fill(0)
    return memory


class HostStream:
    """The twin of a stream where work is done when the call returns."""

    def record(self) -> Event:
        return DONE


@dataclass(frozen=True, slots=True)
class _Done:
    done: bool = True


DONE: Final[Event] = _Done()


def pinned_memory(cupy: Any) -> Callable[[int], Bytes]:
    """What gives a `StagingPool` page-locked memory of CUDA."""

    def allocate(nbytes: int) -> Bytes:
        memory = cupy.cuda.alloc_pinned_memory(nbytes)
        return np.frombuffer(memory, np.uint8, nbytes)  # which keeps it alive

    return allocate
