"""How a blob lies on N shares: in stripes of k data chunks and N - k parity chunks, a chunk on each share.

Which share has which chunk turns from stripe to stripe and from blob to blob: reads are spread over all of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from holoray.stores.reed_solomon import ALIGNMENT

CHUNK_BYTES: Final = 256 << 10
UNIT_BYTES: Final = 64 << 10
"""What has a digest of its own: the smallest piece that is read, and all that one bad byte costs."""


def unit_ranges(nbytes: int) -> Iterator[tuple[int, int]]:
    """Beginning and end of each unit of so many bytes."""
    return ((start, min(start + UNIT_BYTES, nbytes)) for start in range(0, nbytes, UNIT_BYTES))


def unit_at(offset: int) -> int:
    """The number of the unit that begins at an offset of a part."""
    return offset // UNIT_BYTES


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes `start` to `stop` of data chunk `chunk` of a stripe; they are `at` bytes into what was asked for."""

    stripe: int
    chunk: int
    start: int
    stop: int
    at: int


@dataclass(frozen=True)
class Stripes:
    """The layout of a blob of `nbytes` bytes under a code of which any `needed` of `total` chunks suffice."""

    name: str
    nbytes: int
    needed: int
    total: int

    @property
    def stripe_bytes(self) -> int:
        """Data bytes of a full stripe."""
        return self.needed * CHUNK_BYTES

    @property
    def count(self) -> int:
        return -(-self.nbytes // self.stripe_bytes)

    def chunk_bytes(self, stripe: int) -> int:
        """Length of each chunk of a stripe; the last stripe is as short as its data allow (zeros fill it up)."""
        rest = self.nbytes - stripe * self.stripe_bytes
        if rest >= self.stripe_bytes:
            return CHUNK_BYTES
        step = self.needed * ALIGNMENT
        return -(-rest // step) * ALIGNMENT

    def part_offset(self, stripe: int) -> int:
        """Where the chunk of a stripe begins on each share."""
        return stripe * CHUNK_BYTES

    @cached_property
    def part_bytes(self) -> int:
        """Bytes of the chunks on each share."""
        return self.part_offset(self.count - 1) + self.chunk_bytes(self.count - 1) if self.count else 0

    @property
    def units(self) -> int:
        """How many digests the chunks on one share have."""
        return -(-self.part_bytes // UNIT_BYTES)

    def share_of(self, stripe: int, chunk: int) -> int:
        return (self._shift + stripe + chunk) % self.total

    def chunk_on(self, stripe: int, share: int) -> int:
        return (share - self._shift - stripe) % self.total

    @cached_property
    def _shift(self) -> int:
        return zlib.crc32(self.name.encode())

    def pieces(self, offset: int, length: int) -> Iterator[Piece]:
        """The data chunks, or parts of them, that hold a range of the blob; the range must lie inside it."""
        at = 0
        while at < length:
            stripe, inside = divmod(offset + at, self.stripe_bytes)
            nbytes = self.chunk_bytes(stripe)
            chunk, start = divmod(inside, nbytes)
            stop = min(nbytes, start + length - at)
            yield Piece(stripe, chunk, start, stop, at)
            at += stop - start

    def whole_units(self, piece: Piece) -> tuple[int, int]:
        """The piece widened to the bytes that its digests cover."""
        start = piece.start // UNIT_BYTES * UNIT_BYTES
        stop = min(-(-piece.stop // UNIT_BYTES) * UNIT_BYTES, self.chunk_bytes(piece.stripe))
        return start, stop
