"""The files of a job under /dev/shm: named so that nobody guesses them, and removed when nobody lives to use them.

Every process of a job keeps an exclusive lock on a file of its own for as long as it lives. The kernel releases it
however the process ends, so whoever obtains the lock knows that the process is gone (process ids are reused, and differ
between containers that share /dev/shm). Only the standard library: the watchdog, which needs little, imports this.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import signal
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holoray.errors import WorkerLostError

DIRECTORY: Final = Path("/dev/shm")
DRIVER: Final = "driver"
_OURS: Final = re.compile(r"holoray-([0-9a-f]{16})-[0-9A-Za-z_.-]+")
_LOCK: Final = ".lock"


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

    @property
    def segments(self) -> dict[int, Path]:
        """The weights that are there, by generation."""
        found = DIRECTORY.glob(self.path("g").name + "*")
        numbers = ((path.name.rpartition("-g")[2], path) for path in found)
        return {int(number): path for number, path in numbers if number.isdecimal()}

    def lock(self, process: str) -> Path:
        """Held by one process for life."""
        return self.path(process + _LOCK)

    @property
    def guard(self) -> Path:
        """Held for a moment, by who joins the job on this host and by who removes its files."""
        return DIRECTORY / f"holoray-{self.job}-guard{_LOCK}"

    @property
    def files(self) -> list[Path]:
        """What the job has on this node."""
        return list(DIRECTORY.glob(self.path("*").name))

    @property
    def workers(self) -> list[Path]:
        """Locks of the workers that live or lived on this node."""
        return list(DIRECTORY.glob(self.lock("w[0-9]*").name))


def hold_lock(path: Path, *, wait: bool = True) -> int:
    """Create and lock a file; returns the descriptor, whose closing (or our death) releases the lock.

    Without `wait` raises BlockingIOError if somebody else has it.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file).st_nlink:
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # swept between our open and our lock


def join_job(names: Names, process: str) -> int:
    """The lock of a process of the job, as a descriptor: from now on nobody removes the job's files on this node."""
    with locked(names.guard):
        return hold_lock(names.lock(process))


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


def end_holder(path: Path, pid: int) -> None:
    """Kill the process that holds the lock, which named itself `pid` on this node; nothing if it is gone."""
    if is_held(path):  # so the number is not another's by now
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def any_held(locks: Iterable[Path]) -> bool:
    """Whether some living process holds one of the locks."""
    return any(is_held(path) for path in locks)


def await_gone(path: Path, timeout_s: float = 30.0) -> None:
    """Return once the process that held this lock is gone; raises WorkerLostError if it will not go."""
    deadline = time.monotonic() + timeout_s
    while is_held(path):
        if time.monotonic() > deadline:
            raise WorkerLostError(f"a worker given up for dead still runs after {timeout_s:.0f} s: {path.name}")
        time.sleep(0.005)


def await_end(job: str, timeout_s: float = 5.0) -> None:
    """Return once no worker of the job lives on this host: a killed one may else make new files."""
    deadline = time.monotonic() + timeout_s
    locks = list(DIRECTORY.glob(f"holoray-{job}-*-w[0-9]*{_LOCK}"))
    while any_held(locks) and time.monotonic() < deadline:
        time.sleep(0.005)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock inside."""
    file = hold_lock(path, wait=wait)
    try:
        yield
    finally:
        os.close(file)


def remove_job(job: str) -> None:
    """Unlink all files of a job on this host; whoever has them mapped keeps what is mapped."""
    _unlink(DIRECTORY.glob(f"holoray-{job}-*"))


def remove_node(names: Names) -> bool:
    """Unlink the files of a job on a node unless a worker of it lives there; returns whether they are gone."""
    with locked(names.guard):
        if any_held(names.workers):
            return False
        _unlink([*names.files, names.guard])
    return True


def sweep() -> list[str]:
    """Remove what dead jobs of this user left behind; returns their names."""
    jobs: dict[str, list[Path]] = defaultdict(list)
    for path in DIRECTORY.iterdir():
        match = _OURS.fullmatch(path.name)
        with suppress(FileNotFoundError):
            if match and path.lstat().st_uid == os.geteuid():
                jobs[match[1]].append(path)
    return [job for job in jobs if _remove_if_dead(job)]


def _remove_if_dead(job: str) -> bool:
    guard = Names(job, "").guard
    try:
        with locked(guard, wait=False):
            files = list(DIRECTORY.glob(f"holoray-{job}-*"))
            if any_held(path for path in files if path.name.endswith(_LOCK) and path != guard):
                return False
            _unlink(files)
    except BlockingIOError:  # whoever joins or tidies up lives; it may be stopped, and is no business of ours
        return False
    return True


def _unlink(files: Iterable[Path]) -> None:
    """Locks last: they say to whom the others belong."""
    for path in sorted(files, key=lambda p: p.name.endswith(_LOCK)):
        path.unlink(missing_ok=True)
