"""A store in a local directory."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from holoray.errors import CapacityError, HolorayError, SourceError, UsageError
from holoray.files import NO_ROOM, open_for_reading
from holoray.stores.base import PARTIAL, REPLACEMENT, ROOT, Store, check_blob_name, is_own

_LOCK: Final = ".lock"
_MAX_OPEN: Final = 64


class LocalStore(Store):
    """Blobs as files, read by `pread` (a map under a file that shrinks would kill the process)."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.uri = os.fspath(path)
        # Workers and later reads may run in another directory.
        self.path = Path(path).absolute()
        self._files: dict[str, int] = {}
        self._opening = threading.Lock()
        self._closer = weakref.finalize(self, _close_all, self._files)

    @property
    def location(self) -> str:
        return str(self.path)

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    def close(self) -> None:
        """Close the files held open for reading; the next read opens them again."""
        with self._opening:
            _close_all(self._files)

    def size(self, name: str) -> int:
        with self._opened(name) as file:
            return os.fstat(file).st_size

    def read_into(self, name: str, offset: int, out: memoryview) -> int:
        done = 0
        with self._opened(name) as file:
            while done < out.nbytes:
                try:
                    got = os.preadv(file, [out[done:]], offset + done)
                except OSError as error:
                    message = f"reading {self.path / name} failed: {error.strerror}"
                    raise SourceError(message, hint="check the disk", source=self.uri) from error
                if got == 0:
                    break
                done += got
        return done

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        target = self.path / check_blob_name(name)
        partial = target.with_name(target.name + PARTIAL)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
            _sync_directory(self.path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise _write_error(error, target) from error
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        self._forget(name)

    def delete(self, name: str) -> None:
        self._forget(name)
        (self.path / check_blob_name(name)).unlink(missing_ok=True)

    def names(self) -> Iterator[str]:
        if not self.path.is_dir():
            return
        try:
            entries = sorted(os.scandir(self.path), key=lambda e: e.name)
        except OSError as error:
            raise SourceError(f"cannot list {self.path}: {error.strerror}", source=self.uri) from error
        for entry in entries:
            if _is_file(entry) and not entry.name.startswith(".") and not entry.name.endswith(PARTIAL):
                yield entry.name

    def folders(self) -> Iterator[str]:
        if not self.path.is_dir():
            return iter(())
        try:
            return iter(sorted(name for name in os.listdir(self.path) if os.path.isdir(self.path / name)))
        except OSError as error:
            raise SourceError(f"cannot list {self.path}: {error.strerror}", source=self.uri) from error

    def folder(self, name: str) -> Store:
        inside = LocalStore(self.path / check_blob_name(name))
        inside.uri = os.path.join(self.uri, name)
        return inside

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = _lock_or_refuse(self.path)
        except OSError as error:
            raise _write_error(error, self.path) from error
        try:
            for stale in self.path.glob("*" + PARTIAL):  # ours by the lock: left by a writer that was killed
                if is_own(stale.name.removesuffix(PARTIAL)):
                    stale.unlink(missing_ok=True)
            self._end_takeover()
            yield
            (self.path / _LOCK).unlink(missing_ok=True)
        finally:
            os.close(lock)

    @contextmanager
    def replacement(self) -> Iterator[Store]:
        fresh = LocalStore(self.path / REPLACEMENT)
        yield fresh
        fresh.close()
        try:
            self.delete(ROOT)  # first: from here on nothing is sealed, until everything is in its place
            _sync_directory(self.path)
            for name in [n for n in self.names() if is_own(n)]:
                self.delete(name)
            self._take_over(fresh)
        except OSError as error:
            raise _write_error(error, self.path) from error

    def _end_takeover(self) -> None:
        """Go on where a writer was killed between the old root's end and the new one's coming."""
        fresh = LocalStore(self.path / REPLACEMENT)
        if fresh.exists(ROOT) and not self.exists(ROOT):
            self._take_over(fresh)

    def _take_over(self, fresh: LocalStore) -> None:
        for name in sorted(fresh.names(), key=lambda n: n == ROOT):  # the root last: it is what makes a store
            self._forget(name)
            os.replace(fresh.path / name, self.path / name)
        _sync_directory(self.path)
        shutil.rmtree(fresh.path)  # ours, with what a killed writer may have left in it

    @contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        """A descriptor of the file: kept open for the next read, unless there are many already."""
        with self._opening:
            file = self._files.get(name, -1)
            if file < 0:
                file = open_for_reading(self.path / check_blob_name(name))
                if len(self._files) < _MAX_OPEN:
                    self._files[name] = file
            kept = self._files.get(name) == file
        try:
            yield file
        finally:
            if not kept:
                os.close(file)

    def _forget(self, name: str) -> None:
        with self._opening:
            if name in self._files:
                os.close(self._files.pop(name))


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link that goes round in circles
        return False


def _close_all(files: dict[str, int]) -> None:
    while files:
        os.close(files.popitem()[1])


def _lock_or_refuse(path: Path) -> int:
    """A descriptor that holds the lock of the directory."""
    while True:
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            hint = "wait for the other `holoray encode` to end"
            raise UsageError(f"{path} is being written by another process", hint=hint) from None
        if os.fstat(lock).st_nlink:
            return lock
        os.close(lock)  # its last holder removed the file between our open and our lock: lock the new one


def _write_error(error: OSError, path: Path) -> HolorayError:
    if error.errno in NO_ROOM:
        return CapacityError(f"no room to write {path}: {error.strerror}", hint="free some space and run again")
    return SourceError(f"cannot write {path}: {error.strerror}", hint="check the path and its permissions")


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
