"""Where the files of a store live: a handful of named blobs with ranged reads and atomic writes."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO, Final

from holoray.errors import IntegrityError, LimitError, UsageError
from holoray.fragment import fragment_file as fragment_file  # which errors about fragments name as well

ROOT: Final = "ROOT"
MANIFEST: Final = "manifest.arrow"
PARTIAL: Final = ".partial"  # ends the name of a file that is being written
REPLACEMENT: Final = ".replacement"  # holds a store until it takes the place of the one around it
SHARE: Final = "share.json"  # says which share of a store a place holds
GROUPS: Final = 16  # file numbers of a segment: mandatory tensors, then one a layer, at the end what leads a layer
MANDATORY_GROUP: Final = 0
LEAD_GROUP: Final = GROUPS - 1
_FRAGMENTS: Final = re.compile(r"fragments-(\d{5,10})\.arrow")
_PART: Final = re.compile(r"(fragments-\d{5,10}|manifest)\.share")
_JOURNAL: Final = re.compile(r"encode-\d{5,10}\.arrow")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}")


def fragment_number(name: str) -> int:
    """The number of a fragment file; -1 for any other name."""
    match = _FRAGMENTS.fullmatch(name)
    return int(match[1]) if match else -1


def journal_file(segment: int) -> str:
    """Name of the journal that an encode leaves after each segment until the store is sealed."""
    return f"encode-{segment:05d}.arrow"


def is_journal(name: str) -> bool:
    return _JOURNAL.fullmatch(name) is not None


def is_own(name: str) -> bool:
    """Whether a file name is one that we give; others in the same directory are none of our business."""
    named = any(pattern.fullmatch(name) for pattern in (_FRAGMENTS, _PART, _JOURNAL))
    return named or name in (ROOT, MANIFEST, SHARE)


def is_blob_name(name: str) -> bool:
    """Whether it is a plain file name: nothing that leads elsewhere, nothing that a terminal would obey."""
    return _NAME.fullmatch(name) is not None


def check_blob_name(name: str) -> str:
    if not is_blob_name(name):
        raise UsageError(f"{name!r} is not a file name of a store")
    return name


@dataclass(frozen=True, slots=True)
class Part:
    """What is checked at once: `member` is its name for who checks, `start` and `stop` its place in the span."""

    member: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Span:
    """A range of a blob, from `offset` on, and where it is to be put; its parts follow each other without gaps."""

    name: str
    offset: int
    out: memoryview
    parts: Sequence[Part]


Check = Callable[[int, memoryview], IntegrityError | None]
"""Called with a member and its bytes, fewer than there should be where the blob ends: what is wrong with them."""


class Store(ABC):
    """Named blobs. A missing one raises MissingError; `create` makes a blob visible only when it is whole and safe.

    `uri` names it in messages and holds no credentials. `remote`: its bytes come over a network, so sha256 is checked.
    `in_process`: no other process can see it.
    """

    uri: str
    remote: bool = False
    in_process: bool = False

    @property
    def location(self) -> str:
        """What tells its place from all others: the URI with what `uri` leaves out, so it is for no message."""
        return self.uri

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a blob."""

    @abstractmethod
    def read_into(self, name: str, offset: int, out: memoryview) -> int:
        """Fill `out` from `offset` on; returns the bytes read, fewer only where the blob ends."""

    @abstractmethod
    def create(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A file to write; the blob appears (or replaces the old one) on a clean exit, never on an error."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a blob; missing ones are fine."""

    @abstractmethod
    def names(self) -> Iterator[str]:
        """The blobs there are (none if the store does not exist yet)."""

    @abstractmethod
    def exclusive(self) -> AbstractContextManager[None]:
        """Held by the one who writes; raises UsageError while somebody else does."""

    @abstractmethod
    def replacement(self) -> AbstractContextManager[Store]:
        """A store to write; its files take the place of this one's on a clean exit, and until then nothing changes."""

    def exists(self, name: str) -> bool:
        return name in self.names()

    def folders(self) -> Iterator[str]:
        """Names of the folders inside, where the store can list them: places for other stores."""
        return iter(())

    def folder(self, name: str) -> Store:
        """The store in a folder inside, which need not be there yet."""
        raise UsageError(f"{self.uri} has no room for folders")

    def unreadable(self, names: Sequence[str]) -> Mapping[str, str]:
        """Those of the blobs that cannot be had now, although the store should have them, and why: none, as a rule."""
        return {}

    def notes(self) -> Sequence[str]:
        """What its user should know of its state: sentences."""
        return ()

    def read(self, name: str, limit: int) -> bytes:
        """A whole blob of at most `limit` bytes; raises LimitError for larger ones."""
        size = self.size(name)
        if size > limit:
            raise LimitError(f"{name} has {size} bytes, more than the limit of {limit}", source=self.uri)
        out = bytearray(size)
        got = self.read_into(name, 0, memoryview(out))
        return bytes(out[:got])

    def read_checked(self, name: str, limit: int, check: Callable[[bytes], None]) -> bytes:
        """A whole blob that `check` does not raise over; a store with several copies tries them all."""
        data = self.read(name, limit)
        check(data)
        return data

    def read_spans(self, spans: Sequence[Span], check: Check) -> dict[int, IntegrityError]:
        """Read spans into their places and check each part as soon as it is there; returns what is wrong, by member.

        `check` is called from the calling thread: hashing takes a third of the time while the bytes are still in the
        processor's cache. A store with several copies reads elsewhere what does not pass.
        """
        wrong: dict[int, IntegrityError] = {}
        for span in spans:
            got = self.read_into(span.name, span.offset, span.out)
            for part in span.parts:
                error = check(part.member, span.out[part.start : max(part.start, min(part.stop, got))])
                if error is not None:
                    wrong[part.member] = error
        return wrong
