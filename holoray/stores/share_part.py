"""The part of a file on one share, whose bytes are checked as they are read."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter

import xxhash

from holoray.errors import FormatError, HolorayError, SourceError
from holoray.stores.base import Store
from holoray.stores.shares import (
    TRAILER_BYTES,
    CodedFile,
    ShareTable,
    digest_of,
    footer_bytes,
    part_file,
    read_trailer,
)
from holoray.stores.stripes import unit_at, unit_ranges


class SharePart:
    """Part of `file` in `place`, which says that it holds `share`; what fails as a whole is not asked again."""

    def __init__(self, place: Store, file: CodedFile, share: int, *, strict: bool) -> None:
        self.place = place
        self.file = file
        self.share = share
        self.name = part_file(file.stripes.name)
        self.strict = strict
        """Whether sha256 is checked besides xxh3_64."""
        self.fault = ""
        """Why the part as a whole cannot be used; empty as long as it can."""
        self._passing = False
        self._footer: bytes | None = None
        self._opening = threading.Lock()

    def check_length(self) -> bool:
        """Whether it is there and as long as it should be."""
        try:
            size = self.place.size(self.name)
        except HolorayError as error:
            self._fail(error)
        else:
            if size != self.file.part_bytes:
                self.fault = f"{self.name} has {size} bytes instead of {self.file.part_bytes}"
        return not self.fault

    def opens(self) -> bool:
        """Whether its digests are those that all shares name."""
        return self._checked_footer() is not None

    def forgive(self) -> bool:
        """Let a part be asked again whose place did not answer; False for one that is damaged, or has no fault."""
        passing, self._passing = self._passing, False
        if passing:
            self.fault = ""
        return passing

    def read(self, stripe: int, start: int, stop: int, out: memoryview) -> str:
        """Read bytes of its chunk of a stripe, from the beginning of a unit to the end of one.

        Returns why they cannot be used; an empty text if `out` holds what was written.
        """
        footer = self._checked_footer()
        if footer is None:
            return self.fault
        at = self.file.stripes.part_offset(stripe) + start
        try:
            got = self.place.read_into(self.name, at, out)
        except HolorayError as error:
            return self._fail(error)
        if got != stop - start:
            self.fault = f"{self.name} ends at byte {at + got}"
            return self.fault
        for begin, end in unit_ranges(got):
            data = out[begin:end]
            expected = digest_of(footer, unit_at(at + begin))
            same = xxhash.xxh3_64_intdigest(data) == expected.xxh3_64
            if not same or (self.strict and hashlib.sha256(data).digest() != expected.sha256):
                return f"bytes {at + begin} to {at + end} of {self.name} do not match their digest"
        return ""

    def _checked_footer(self) -> bytes | None:
        """The digests, once they match what all shares say of them."""
        with self._opening:
            if self._footer is None and not self.fault and self.check_length():
                out = bytearray(footer_bytes(self.file.stripes))
                try:
                    self.place.read_into(self.name, self.file.stripes.part_bytes, memoryview(out))
                except HolorayError as error:
                    self._fail(error)
                else:
                    if hashlib.sha256(out).digest() == self.file.footers[self.share]:
                        self._footer = bytes(out)
                    else:
                        self.fault = f"the digests at the end of {self.name} are not those that the shares agree on"
            return self._footer

    def _fail(self, error: HolorayError) -> str:
        self.fault, self._passing = error.message, isinstance(error, SourceError)
        return self.fault


def share_held(place: Store, table: ShareTable) -> int:
    """Which share of a set the parts in a place are of, whatever its `share.json` says; -1 for none.

    Raises SourceError if the place does not answer.
    """
    there = set(place.names())
    found: Counter[int] = Counter()
    for file in table.files:
        part = part_file(file.stripes.name)
        if part not in there:
            continue
        trailer = bytearray(TRAILER_BYTES)
        got = place.read_into(part, max(0, place.size(part) - TRAILER_BYTES), memoryview(trailer))
        try:
            share, stripes = read_trailer(file.stripes.name, bytes(trailer[:got]))
        except FormatError:
            continue
        if stripes == file.stripes:
            found[share] += 1
    return found.most_common(1)[0][0] if found else -1
