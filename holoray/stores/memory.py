"""A store in this process's memory: for tests, and for encoding and loading without a disk."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from holoray.errors import MissingError, UsageError
from holoray.stores.base import Store, check_blob_name


class MemoryStore(Store):
    """Blobs in a dict."""

    in_process = True

    def __init__(self, uri: str = "memory:") -> None:
        self.uri = uri
        self.blobs: dict[str, bytes] = {}
        self._folders: dict[str, MemoryStore] = {}
        self._writing = threading.Lock()

    def size(self, name: str) -> int:
        return len(self._blob(name))

    def read_into(self, name: str, offset: int, out: memoryview) -> int:
        data = memoryview(self._blob(name))[offset : offset + out.nbytes]
        out[: data.nbytes] = data
        return data.nbytes

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        buffer = io.BytesIO()
        yield buffer
        self.blobs[check_blob_name(name)] = buffer.getvalue()

    def delete(self, name: str) -> None:
        self.blobs.pop(name, None)

    def names(self) -> Iterator[str]:
        return iter(sorted(self.blobs))

    def folders(self) -> Iterator[str]:
        return (name for name, inside in sorted(self._folders.items()) if inside.blobs)

    def folder(self, name: str) -> Store:
        return self._folders.setdefault(check_blob_name(name), MemoryStore(f"{self.uri}/{name}"))

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        if not self._writing.acquire(blocking=False):
            raise UsageError(f"{self.uri} is being written by somebody else")
        try:
            yield
        finally:
            self._writing.release()

    @contextmanager
    def replacement(self) -> Iterator[Store]:
        fresh = MemoryStore(self.uri)
        yield fresh
        self.blobs = fresh.blobs

    def _blob(self, name: str) -> bytes:
        try:
            return self.blobs[name]
        except KeyError:
            raise MissingError(f"{self.uri} has no {name}", source=self.uri) from None
