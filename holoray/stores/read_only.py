"""Stores that can only be read: those that others serve, and those that are made of several places."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import BinaryIO, ClassVar, Final, NoReturn

from holoray.errors import LimitError, SourceError, UsageError
from holoray.stores.base import Store

PIECE_BYTES: Final = 8 << 20  # of one request: its deadline grows with what is asked for
_FIRST_BYTES: Final = 1 << 20  # of a blob whose size is not known yet


class ReadOnlyStore(Store):
    """Everything that would write raises UsageError; `write_hint` says what to do instead."""

    write_hint: ClassVar[str]

    def create(self, name: str) -> AbstractContextManager[BinaryIO]:
        self._refuse()

    def delete(self, name: str) -> None:
        self._refuse()

    def exclusive(self) -> AbstractContextManager[None]:
        self._refuse()

    def replacement(self) -> AbstractContextManager[Store]:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UsageError(f"{self.uri} can only be read", hint=self.write_hint)


class ServedStore(ReadOnlyStore):
    """A store behind a server: reads are cut into requests."""

    write_hint = "encode to a directory or an object store, and serve that"

    def read(self, name: str, limit: int) -> bytes:
        """As every store does, but small blobs in one request: opening a store should not cost more than it must."""
        total, first = self._beginning(name, min(limit, _FIRST_BYTES))
        if total > limit:
            raise LimitError(f"{name} has {total} bytes, more than the limit of {limit}", source=self.uri)
        out = bytearray(total)
        out[: len(first)] = first
        got = len(first) + self.read_into(name, len(first), memoryview(out)[len(first) :])
        return bytes(memoryview(out)[:got])

    def read_into(self, name: str, offset: int, out: memoryview) -> int:
        done = 0
        try:
            for start in range(0, out.nbytes, PIECE_BYTES):
                piece = out[start : start + PIECE_BYTES]
                for nbytes in self._filling(name, offset + start, piece):
                    done += nbytes
                if done < start + piece.nbytes:
                    break
        except SourceError as error:
            error.received = done
            raise
        return done

    @abstractmethod
    def _beginning(self, name: str, length: int) -> tuple[int, bytes]:
        """How long a blob is, and its first bytes: `length` of them, or all there are."""

    @abstractmethod
    def _filling(self, name: str, offset: int, out: memoryview) -> Iterator[int]:
        """One request: fills `out`, or as much of it as there is; gives how many bytes came, each time some did."""
