"""Files under /dev/shm: named so that nobody guesses them, reserved before they are written, swept after a crash.

Every process of a job keeps an exclusive lock on a file of its own for as long as it lives. The kernel releases it
however the process ends, so whoever obtains the lock knows that the process is gone (process ids are reused, and differ
between containers that share /dev/shm).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import re
import secrets
import stat
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from holoray.errors import CapacityError, SourceError, WorkerLostError

DIRECTORY: Final = Path("/dev/shm")
_OURS: Final = re.compile(r"holoray-([0-9a-f]{16})-[0-9A-Za-z_.-]+")
_LOCK: Final = ".lock"
_MADV_POPULATE_WRITE: Final = 23  # Linux 5.14
_libc: Final = ctypes.CDLL(None)
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM)


def new_job() -> str:
    """A job's unguessable name."""
    return secrets.token_hex(8)


@dataclass(frozen=True, slots=True)
class Names:
    """Names of the files of a job on one node (the nodes of a test cluster share one host)."""

    job: str
    node: str

    def path(self, what: str) -> Path:
        return DIRECTORY / f"holoray-{self.job}-{self.node[:16]}-{what}"

    def segment(self, generation: int) -> Path:
        """The weights of one generation."""
        return self.path(f"g{generation}")

    @property
    def state(self) -> Path:
        """What accumulators keep besides the weights, over all generations."""
        return self.path("state")

    def lock(self, process: str) -> Path:
        """Held by one process for life."""
        return self.path(process + _LOCK)


def hold_lock(path: Path) -> int:
    """Create and lock a file; returns the descriptor, whose closing (or our death) releases the lock."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file).st_nlink:
            return file
        os.close(file)  # swept between our open and our lock


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def await_gone(path: Path, timeout_s: float = 30.0) -> None:
    """Return once the process that held this lock is gone; raises WorkerLostError if it will not go."""
    deadline = time.monotonic() + timeout_s
    while is_held(path):
        if time.monotonic() > deadline:
            raise WorkerLostError(f"a worker given up for dead still runs after {timeout_s:.0f} s: {path.name}")
        time.sleep(0.005)


def await_end(job: str, mine: str, timeout_s: float = 5.0) -> None:
    """Return once no process of the job lives on this host but `mine`: a killed one may else make new files."""
    deadline = time.monotonic() + timeout_s
    locks = [p for p in DIRECTORY.glob(f"holoray-{job}-*{_LOCK}") if not p.name.endswith(f"-{mine}{_LOCK}")]
    while any(is_held(path) for path in locks) and time.monotonic() < deadline:
        time.sleep(0.005)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    file = hold_lock(path)
    try:
        yield
    finally:
        os.close(file)


def create_or_attach(path: Path, nbytes: int) -> npt.NDArray[np.uint8]:
    """Writable bytes shared by all processes of the node; zeros where nobody has written.

    The first to come reserves all pages. Raises CapacityError if there is no room (a write could else be a SIGBUS).
    """
    with _locked(path.with_name(path.name + ".making" + _LOCK)):
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


def remove_job(job: str) -> None:
    """Unlink all files of a job on this host; whoever has them mapped keeps what is mapped."""
    for path in sorted(DIRECTORY.glob(f"holoray-{job}-*"), key=lambda p: p.name.endswith(_LOCK)):
        path.unlink(missing_ok=True)


def sweep() -> list[str]:
    """Remove what dead jobs of this user left behind; returns their names."""
    jobs: dict[str, list[Path]] = defaultdict(list)
    for path in DIRECTORY.iterdir():
        match = _OURS.fullmatch(path.name)
        with suppress(FileNotFoundError):
            if match and path.lstat().st_uid == os.geteuid():
                jobs[match[1]].append(path)
    dead = [job for job, paths in jobs.items() if not any(is_held(p) for p in paths if p.name.endswith(_LOCK))]
    for job in dead:
        remove_job(job)
    return dead
