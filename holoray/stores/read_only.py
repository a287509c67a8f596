"""Stores that can only be read."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import BinaryIO, NoReturn

from holoray.errors import UsageError
from holoray.stores.base import Store


class ReadOnlyStore(Store):
    """Everything that would write raises UsageError."""

    def create(self, name: str) -> AbstractContextManager[BinaryIO]:
        self._refuse()

    def delete(self, name: str) -> None:
        self._refuse()

    def exclusive(self) -> AbstractContextManager[None]:
        self._refuse()

    def replacement(self) -> AbstractContextManager[Store]:
        self._refuse()

    def _refuse(self) -> NoReturn:
        hint = "encode to a directory or an object store, and serve that"
        raise UsageError(f"{self.uri} can only be read", hint=hint)
