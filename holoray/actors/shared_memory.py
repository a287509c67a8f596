"""Segments under /dev/shm: shared by the processes of a node, and reserved before they are written."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from holoray.actors.locks import DIRECTORY, locked
from holoray.errors import CapacityError, SourceError

_MADV_POPULATE_WRITE: Final = 23  # Linux 5.14
_libc: Final = ctypes.CDLL(None)
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM)


def create_or_attach(path: Path, nbytes: int) -> npt.NDArray[np.uint8]:
    """Writable bytes shared by all processes of the node; zeros where nobody has written.

    The first to come reserves all pages. Raises CapacityError if there is no room (a write could else be a SIGBUS).
    """
    with locked(path.with_name(path.name + ".making" + ".lock")):
        if not path.exists():
            _reserve(path, max(nbytes, 1))
    return attach(path, nbytes, writable=True)


def attach(path: Path, nbytes: int, *, writable: bool = False) -> npt.NDArray[np.uint8]:
    """The bytes of a file made by `create_or_attach`, read-only unless told otherwise."""
    access = os.O_RDWR if writable else os.O_RDONLY
    try:
        file = os.open(path, access | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise SourceError(f"the shared-memory segment {path} is gone", source=str(path)) from None
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_size != max(nbytes, 1):
            raise SourceError(f"{path} is not the segment that it should be", source=str(path))
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        mapping = mmap.mmap(file, found.st_size, mmap.MAP_SHARED, protection)
    finally:
        os.close(file)
    return np.frombuffer(mapping, np.uint8)[:nbytes]


def populate(data: npt.NDArray[np.uint8]) -> None:
    """Map the pages below shared bytes for writing at once: cheaper than one fault a page. Older kernels ignore it."""
    start = data.ctypes.data & -mmap.PAGESIZE
    length = data.ctypes.data + data.nbytes - start
    _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_POPULATE_WRITE)


def _reserve(path: Path, nbytes: int) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # of a process that died while making it: we hold the lock
    file = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.posix_fallocate(file, 0, nbytes)
        os.rename(partial, path)
    except OSError as error:
        free = _free_bytes()
        partial.unlink(missing_ok=True)
        if error.errno not in _NO_ROOM:
            raise
        raise CapacityError(
            f"a segment of {nbytes} bytes does not fit into {DIRECTORY}: {free} bytes are free",
            hint="two generations must fit at a time: enlarge /dev/shm (docker run --shm-size=...), or ask for "
            "fewer target qualities",
        ) from error
    finally:
        os.close(file)


def _free_bytes() -> int:
    status = os.statvfs(DIRECTORY)
    return status.f_bavail * status.f_frsize
