"""A store at a URI: on S3, GCS, Azure, HDFS, or any file system of fsspec."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, Final

from pyarrow import fs

from holoray.errors import CapacityError, HolorayError, UsageError
from holoray.files import NO_ROOM
from holoray.stores.base import PARTIAL, REPLACEMENT, ROOT, Store, check_blob_name, is_own
from holoray.stores.filesystems import can_rename, check_scheme, connect, has_directories, told
from holoray.stores.uri import join, public, scheme_of

_COPY_BYTES: Final = 8 << 20
_MAX_IDLE: Final = 256
_writing: set[str] = set()
_entering = threading.Lock()


class RemoteStore(Store):
    """Blobs below a URI, read by range with as many open files as there are threads reading.

    A blob is spooled to a local temporary file and put in its place when it is whole: an object store has no rename,
    and an upload that is closed half-way would leave half a blob. `exclusive` keeps writers of this process apart,
    not those of other machines, since object stores have no locks: two encodes of different checkpoints to one URI
    at once end in a store whose digests do not match. The URI, with its credentials, travels by pickle. It is
    connected to when something is first asked of it: that may take long, and may fail.
    """

    remote = True

    def __init__(self, uri: str) -> None:
        self._location = uri
        self.uri = public(uri)
        self.in_process = scheme_of(uri) == "memory"
        check_scheme(uri)
        self._connection: tuple[Any, str] | None = None
        self._connecting = threading.Lock()
        self._idle: defaultdict[str, list[Any]] = defaultdict(list)
        self._lending = threading.Lock()

    @property
    def location(self) -> str:
        return self._location

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._location,)

    def size(self, name: str) -> int:
        with self._told("reading", name), self._opened(name) as file:
            return int(file.size())

    def read_into(self, name: str, offset: int, out: memoryview) -> int:
        done = 0
        with self._told("reading", name), self._opened(name) as file:
            wanted = min(out.nbytes, file.size() - offset)  # past the end is an error to some
            file.seek(offset if wanted > 0 else 0)
            while done < wanted:
                got = file.readinto(out[done:wanted])
                if got == 0:
                    break
                done += got
        return done

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        check_blob_name(name)
        try:
            with tempfile.TemporaryFile(prefix="holoray-") as spool:
                yield spool
                spool.seek(0)
                with self._told("writing", name):
                    self._put(name, spool)
        except OSError as error:
            if error.errno in NO_ROOM:
                message = f"no room in {tempfile.gettempdir()} to prepare {name}: {error.strerror}"
                raise CapacityError(message, hint="free some space there, or let TMPDIR name another place") from error
            raise

    def delete(self, name: str) -> None:
        check_blob_name(name)
        self._forget(name)
        with self._told("deleting", name), suppress(FileNotFoundError):
            self._filesystem.delete_file(self._path(name))

    def names(self) -> Iterator[str]:
        return (name for name in self._listed() if not name.startswith(".") and not name.endswith(PARTIAL))

    def exists(self, name: str) -> bool:
        with self._told("looking for", name):
            return bool(self._filesystem.get_file_info(self._path(name)).type == fs.FileType.File)

    def folders(self) -> Iterator[str]:
        with self._told("listing", ""):
            found = self._filesystem.get_file_info(fs.FileSelector(self._base, allow_not_found=True))
        return iter(sorted(info.base_name for info in found if info.type == fs.FileType.Directory))

    def folder(self, name: str) -> Store:
        return RemoteStore(join(self._location, check_blob_name(name)))

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with _entering:
            if self.uri in _writing:
                raise UsageError(f"{self.uri} is being written by this process", hint="wait for the other encode")
            _writing.add(self.uri)
        try:
            for stale in self._listed():
                if stale.endswith(PARTIAL) and is_own(stale.removesuffix(PARTIAL)):
                    self.delete(stale)
            yield
        finally:
            _writing.discard(self.uri)

    @contextmanager
    def replacement(self) -> Iterator[Store]:
        fresh = RemoteStore(join(self._location, REPLACEMENT))
        yield fresh
        for name in [n for n in self.names() if is_own(n)]:
            self.delete(name)
        for name in sorted(fresh.names(), key=lambda n: n == ROOT):  # the root last: it is what makes a store
            with self._told("writing", name):
                self._filesystem.move(fresh._path(name), self._path(name))
        with self._told("deleting", REPLACEMENT), suppress(FileNotFoundError):
            self._filesystem.delete_dir(fresh._base)

    def _connected(self) -> tuple[Any, str]:
        """The file system, and the path of the store in it."""
        with self._connecting:
            if self._connection is None:
                self._connection = connect(self._location)
            return self._connection

    @property
    def _filesystem(self) -> Any:
        return self._connected()[0]

    @property
    def _base(self) -> str:
        return self._connected()[1]

    def _put(self, name: str, spool: BinaryIO) -> None:
        if has_directories(self._filesystem):
            self._filesystem.create_dir(self._base, recursive=True)
        at = name + PARTIAL if can_rename(self._filesystem) else name
        try:
            with self._filesystem.open_output_stream(self._path(at)) as target:
                shutil.copyfileobj(spool, target, _COPY_BYTES)
        except BaseException:  # leaving the stream has closed it: what is there now is half a blob
            with suppress(HolorayError):  # what went wrong first is what counts
                self.delete(at)
            raise
        if at != name:
            self._filesystem.move(self._path(at), self._path(name))
        self._forget(name)

    def _path(self, name: str) -> str:
        return f"{self._base.rstrip('/')}/{name}"

    def _listed(self) -> list[str]:
        with self._told("listing", ""):
            found = self._filesystem.get_file_info(fs.FileSelector(self._base, allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == fs.FileType.File)

    def _told(self, doing: str, name: str) -> Any:
        return told(doing, join(self._location, name))

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        """An open file that nobody else has meanwhile, since it has one position; kept for the next read."""
        with self._lending:
            idle = self._idle[name]
            file = idle.pop() if idle else None
        if file is None:
            file = self._filesystem.open_input_file(self._path(name))
        try:
            yield file
        except BaseException:
            file.close()
            raise
        with self._lending:
            kept = sum(map(len, self._idle.values())) < _MAX_IDLE
            if kept:
                self._idle[name].append(file)
        if not kept:
            file.close()

    def _forget(self, name: str) -> None:
        with self._lending:
            for file in self._idle.pop(name, []):
                file.close()
