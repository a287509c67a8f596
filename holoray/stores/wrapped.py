"""Wrapping a store: behaviour is added around it, not by flags in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import BinaryIO

from holoray.stores.base import Store


class WrappedStore(Store):
    """Passes everything on to `inner`; a subclass changes what it is about."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.uri, self.remote, self.in_process = inner.uri, inner.remote, inner.in_process

    def size(self, name: str) -> int:
        return self.inner.size(name)

    def read(self, name: str, limit: int) -> bytes:
        return self.inner.read(name, limit)

    def read_into(self, name: str, offset: int, out: memoryview) -> int:
        return self.inner.read_into(name, offset, out)

    def exists(self, name: str) -> bool:
        return self.inner.exists(name)

    def names(self) -> Iterator[str]:
        return self.inner.names()

    def create(self, name: str) -> AbstractContextManager[BinaryIO]:
        return self.inner.create(name)

    def delete(self, name: str) -> None:
        self.inner.delete(name)

    def exclusive(self) -> AbstractContextManager[None]:
        return self.inner.exclusive()

    def replacement(self) -> AbstractContextManager[Store]:
        return self.inner.replacement()
