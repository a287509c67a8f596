"""Wrapping a store: behaviour is added around it, not by flags in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import BinaryIO

from holoray.errors import IntegrityError
from holoray.stores.base import Check, Span, Store


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

    def read_checked(self, name: str, limit: int, check: Callable[[bytes], None]) -> bytes:
        if type(self).read is not WrappedStore.read:  # what a subclass does to reads holds for these as well
            return super().read_checked(name, limit, check)
        return self.inner.read_checked(name, limit, check)

    def read_spans(self, spans: Sequence[Span], check: Check) -> dict[int, IntegrityError]:
        if type(self).read_into is not WrappedStore.read_into:
            return super().read_spans(spans, check)
        return self.inner.read_spans(spans, check)

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

    @property
    def location(self) -> str:
        return self.inner.location

    def folders(self) -> Iterator[str]:
        return self.inner.folders()

    def folder(self, name: str) -> Store:
        return self.inner.folder(name)

    def unreadable(self, names: Sequence[str]) -> Mapping[str, str]:
        return self.inner.unreadable(names)

    def notes(self) -> Sequence[str]:
        return self.inner.notes()
