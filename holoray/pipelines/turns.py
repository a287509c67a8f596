"""How many threads work at once: fewer when memory runs out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from holoray.errors import CapacityError

T = TypeVar("T")


def turns_within(room_bytes: int, turn_bytes: int, threads: int) -> int:
    """How many of so many threads may work at a time, at least one, if each takes so many bytes for a moment."""
    return max(1, min(threads, room_bytes // turn_bytes)) if turn_bytes else threads


class Turns:
    """At most `width` threads work at a time. Whoever lacks memory halves that, lets the others end and tries again."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._working = 0
        self._changed = threading.Condition()

    def take(self, work: Callable[[], T]) -> T:
        """What `work` returns; it may be called several times, and must leave everything as it was if it fails.

        Raises its CapacityError once it was raised with nobody else at work.
        """
        while True:
            width = self._begin()
            try:
                return work()
            except CapacityError as error:
                # The traceback holds what the attempt had allocated, by its frames.
                lack = error.with_traceback(None)
            finally:
                self._end()
            self._narrow(width, lack)

    def _begin(self) -> int:
        with self._changed:
            self._changed.wait_for(lambda: self._working < self.width)
            self._working += 1
            return self.width

    def _end(self) -> None:
        with self._changed:
            self._working -= 1
            self._changed.notify_all()

    def _narrow(self, width: int, lack: CapacityError) -> None:
        """Let fewer work than did in an attempt that began at `width`; several that failed together count once."""
        if width == 1:
            raise lack
        with self._changed:
            if self.width == width:
                self.width = width // 2
