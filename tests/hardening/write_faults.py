"""Something bad at the n-th step of writing a file: the disk is full, or the process is killed."""

from __future__ import annotations

import builtins
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

WRITING = ("fsync", "replace", "posix_fallocate", "pwrite")
"""What may find the disk full, besides writing to and flushing a file."""
REMOVING = ("unlink", "rmdir", "mkdir")
"""What else changes a directory: a kill may fall between any two of these."""


class Steps:
    """Counts steps; at step `at` (from 0) the `deed` is done instead of it, and at every one after it if `lasting`."""

    def __init__(self, at: int, deed: Callable[[], None], *, lasting: bool = False) -> None:
        self.count = 0
        self._at, self._deed, self._lasting = at, deed, lasting

    def take(self) -> None:
        step, self.count = self.count, self.count + 1
        if step == self._at or (self._lasting and step > self._at):
            self._deed()


class _File:
    """A file whose writes and flushes are steps."""

    def __init__(self, file: Any, steps: Steps) -> None:
        self._file, self._steps = file, steps

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        self._steps.take()
        return int(self._file.write(data))

    def flush(self) -> None:
        self._steps.take()
        self._file.flush()

    def fileno(self) -> int:
        return int(self._file.fileno())


@contextmanager
def stepping(steps: Steps, calls: tuple[str, ...] = WRITING) -> Iterator[Steps]:
    """Everything that writes files of local stores and checkpoints takes `steps`, in all threads."""

    def stepped(call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            steps.take()
            # Nothing here cuts the power, and waiting for the disk would be most of the time.
            return None if call is fsync else call(*args, **kwargs)

        return step

    fsync = os.fsync

    def open_(*args: Any, **kwargs: Any) -> _File:
        return _File(builtins.open(*args, **kwargs), steps)

    with ExitStack() as stack:
        stack.enter_context(mock.patch("holoray.stores.local.open", open_, create=True))
        for call in calls:
            stack.enter_context(mock.patch.object(os, call, stepped(getattr(os, call))))
        yield steps


def no_room() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def nothing() -> None:
    """The deed of a rehearsal: only to count."""
