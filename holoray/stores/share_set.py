"""Reading shares: one store again, as long as enough of them are there.

Data chunks are read where they lie, by range. Only where one is missing or does not match its digest are others of its
stripe read as well, and the chunk is computed from any k of them.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import xxhash

from holoray.errors import FormatError, HolorayError, SourceError
from holoray.stores.base import ROOT, SHARE, Store
from holoray.stores.read_only import ReadOnlyStore
from holoray.stores.reed_solomon import rebuild
from holoray.stores.shares import (
    MAX_SHARE_BYTES,
    CodedFile,
    ShareTable,
    digest_of,
    folder_index,
    footer_bytes,
    part_file,
    read_share,
)
from holoray.stores.stripes import Piece, Stripes, unit_at, unit_ranges

_AT_ONCE: Final = 16
T = TypeVar("T")
U = TypeVar("U")


class SharePart:
    """The part of a file on one share, whose bytes are checked as they are read; what fails once is not asked again."""

    def __init__(self, place: Store, file: CodedFile, share: int, *, strict: bool) -> None:
        self.place = place
        self.file = file
        self.share = share
        self.name = part_file(file.stripes.name)
        self.strict = strict
        """Whether sha256 is checked besides xxh3_64."""
        self.fault = ""
        """Why the part as a whole cannot be used; empty as long as it can."""
        self._footer: bytes | None = None
        self._opening = threading.Lock()

    def check_length(self) -> bool:
        """Whether it is there and as long as it should be."""
        try:
            size = self.place.size(self.name)
        except HolorayError as error:
            self.fault = error.message
        else:
            if size != self.file.part_bytes:
                self.fault = f"{self.name} has {size} bytes instead of {self.file.part_bytes}"
        return not self.fault

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
            self.fault = error.message
            return self.fault
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
                    self.fault = error.message
                else:
                    if hashlib.sha256(out).digest() == self.file.footers[self.share]:
                        self._footer = bytes(out)
                    else:
                        self.fault = f"the digests at the end of {self.name} are not those that the shares agree on"
            return self._footer


@dataclass(frozen=True, slots=True)
class OpenedPlace:
    """A place, and what it says of itself or why it says nothing."""

    place: Store
    index: int = -1
    table: ShareTable | None = None
    why: str = ""


class ShareSet(ReadOnlyStore):
    """A store of which some shares may be missing; read only.

    Takes what most places agree on as the set, and places that disagree as missing: a share of another store, or of an
    older version of this one, can do no harm, nor can fewer liars than there are honest shares. Raises SourceError if
    no place holds a share, or if they are of two stores to equal parts.
    """

    write_hint = "`holoray encode --shares` writes shares, `holoray repair` rebuilds lost ones"

    def __init__(self, places: Sequence[Store]) -> None:
        self._given = tuple(places)
        opened = _at_once(_open, self._given)
        self.table = _agreed(opened)
        self.places: dict[int, Store] = {}
        """The place of each share that is there."""
        self.missing: dict[int, str] = {}
        """Why each of the other shares is not there."""
        self.strangers: list[OpenedPlace] = []
        """Places given that hold no share of the set (or one that another place holds too)."""
        for at in opened:
            if at.table == self.table and at.index not in self.places:
                self.places[at.index] = at.place
            else:
                self.strangers.append(replace(at, why=at.why or self._why_not(at)))
        for index in range(self.table.total):
            if index not in self.places:
                self.missing[index] = "its place does not hold it" if self.strangers else "no place of it was given"
        self.uri = _common_name(self._given)
        self.remote = any(place.remote for place in self._given)
        self.in_process = any(place.in_process for place in self._given)
        self.files = {file.stripes.name: file for file in self.table.files}
        self.rebuilt_bytes = 0
        """Bytes that had to be computed from other shares so far."""
        self._counting = threading.Lock()
        self._parts = {
            (name, share): SharePart(place, file, share, strict=place.remote)
            for name, file in self.files.items()
            for share, place in self.places.items()
        }
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="holoray-shares") if self.remote else None

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._given,)

    def part(self, name: str, share: int) -> SharePart | None:
        """The part of a file on a share; None if the share is not there."""
        return self._parts.get((name, share))

    def names(self) -> Iterator[str]:
        return iter(sorted([ROOT, *self.files]))

    def size(self, name: str) -> int:
        return len(self._root) if name == ROOT else self._file(name).stripes.nbytes

    def read_into(self, name: str, offset: int, out: memoryview) -> int:
        if name == ROOT:
            data = self._root[offset : offset + out.nbytes]
            out[: len(data)] = data
            return len(data)
        stripes = self._file(name).stripes
        length = max(0, min(out.nbytes, stripes.nbytes - offset))
        reads = [_Read(piece, stripes, out) for piece in stripes.pieces(offset, length)]
        self._each(self._read_data, reads)
        if any(read.lost for read in reads):
            self._recover(stripes, reads)
        for read in reads:
            read.deliver()
        return length

    def unreadable(self, names: Sequence[str]) -> Mapping[str, str]:
        asked = set(names)
        parts = [part for (name, _), part in self._parts.items() if name in asked]
        whole = Counter(
            part.file.stripes.name
            for part, fine in zip(parts, _at_once(SharePart.check_length, parts), strict=True)
            if fine
        )
        return {
            name: self._too_few(name, whole[name]) for name in names if whole[name] < self._file(name).stripes.needed
        }

    def notes(self) -> Sequence[str]:
        said = [f"share {index} of {self.table.total} is missing: {why}" for index, why in self.missing.items()]
        said += [f"{at.place.uri}: {at.why}" for at in self.strangers]
        said += [f"share {part.share}, {part.place.uri}: {part.fault}" for part in self._parts.values() if part.fault]
        if self.rebuilt_bytes:
            said.append(f"{self.rebuilt_bytes} bytes were computed from other shares: run `holoray repair`")
        return said

    @property
    def _root(self) -> bytes:
        return self.table.root.encode() + b"\n"

    def _file(self, name: str) -> CodedFile:
        if name not in self.files:
            raise SourceError(f"the shares at {self.uri} hold no {name}", source=self.uri)
        return self.files[name]

    def _why_not(self, at: OpenedPlace) -> str:
        if at.table == self.table:
            return f"holds share {at.index}, which {self.places[at.index].uri} holds too"
        return "holds a share of another store, or of another version of this one"

    def _each(self, run: Callable[[T], U], items: Sequence[T]) -> list[U]:
        """Run for each item: at once where that saves round trips."""
        return list(map(run, items) if self._pool is None or len(items) < 2 else self._pool.map(run, items))

    def _read_data(self, read: _Read) -> None:
        part = self.part(read.stripes.name, read.stripes.share_of(read.piece.stripe, read.piece.chunk))
        read.lost = part is None or bool(part.fault or part.read(read.piece.stripe, read.start, read.stop, read.data))

    def _recover(self, stripes: Stripes, reads: Sequence[_Read]) -> None:
        """Compute what was lost, a stripe at a time; what is in hand already is not read again."""
        by_stripe: dict[int, list[_Read]] = {}
        for read in reads:
            by_stripe.setdefault(read.piece.stripe, []).append(read)
        for stripe, own in by_stripe.items():
            lost = [read for read in own if read.lost]
            if not lost:
                continue
            start, stop = min(read.start for read in lost), max(read.stop for read in lost)
            wanted = [read.piece.chunk for read in lost]
            held = {
                read.piece.chunk: read.range(start, stop) for read in own if not read.lost and read.has(start, stop)
            }
            chunks = self._gather(stripes, stripe, start, stop, held, without=wanted)
            found = rebuild(chunks, wanted, stripes.needed, stripes.total)
            for read, data in zip(lost, found, strict=True):
                read.data[:] = data[read.start - start : read.stop - start]
            with self._counting:
                self.rebuilt_bytes += sum(read.stop - read.start for read in lost)

    def _gather(
        self, stripes: Stripes, stripe: int, start: int, stop: int, held: dict[int, bytes], *, without: Sequence[int]
    ) -> dict[int, bytes]:
        """Bytes `start` to `stop` of as many chunks of a stripe as rebuild others: data first, then parity."""
        parts = {c: self.part(stripes.name, stripes.share_of(stripe, c)) for c in range(stripes.total)}
        candidates = [c for c in parts if c not in held and c not in without]
        candidates.sort(key=lambda c: (parts[c] is None or bool(getattr(parts[c], "fault", "")), c))
        while len(held) < stripes.needed and candidates:
            more = stripes.needed - len(held)
            asked, candidates = candidates[:more], candidates[more:]

            def read(chunk: int) -> bytes | None:
                part, out = parts[chunk], bytearray(stop - start)
                if part is None or part.read(stripe, start, stop, memoryview(out)):
                    return None
                return bytes(out)

            held |= {c: data for c, data in zip(asked, self._each(read, asked), strict=True) if data is not None}
        if len(held) < stripes.needed:
            at = stripe * stripes.stripe_bytes
            raise SourceError(
                f"bytes {at} to {min(at + stripes.stripe_bytes, stripes.nbytes)} of "
                f"{self._too_few(stripes.name, len(held))}",
                hint="give more of the shares, or load to a lower quality: `holoray verify` names what is bad",
                source=self.uri,
            )
        return dict(sorted(held.items())[: stripes.needed])

    def _too_few(self, name: str, there: int) -> str:
        stripes = self._file(name).stripes
        gone = [
            str(share) for share in range(stripes.total) if share not in self.places or self._parts[name, share].fault
        ]
        more = stripes.needed - there
        return (
            f"{name}: {there} of the {stripes.needed} shares that it takes are there, {more} more needed; "
            f"missing or damaged: {', '.join(gone) or 'none as a whole'}"
        )


class _Read:
    """A piece under way: read to where it is wanted, or, where it begins or ends inside a unit, beside."""

    def __init__(self, piece: Piece, stripes: Stripes, out: memoryview) -> None:
        self.piece = piece
        self.stripes = stripes
        self.start, self.stop = stripes.whole_units(piece)
        self.lost = False
        self._target = out[piece.at : piece.at + piece.stop - piece.start]
        whole = (self.start, self.stop) == (piece.start, piece.stop)
        self.data = self._target if whole else memoryview(bytearray(self.stop - self.start))

    def has(self, start: int, stop: int) -> bool:
        return self.start <= start and stop <= self.stop

    def range(self, start: int, stop: int) -> bytes:
        return bytes(self.data[start - self.start : stop - self.start])

    def deliver(self) -> None:
        if self.data is not self._target:
            self._target[:] = self.data[self.piece.start - self.start : self.piece.stop - self.start]


def find_shares(store: Store) -> ShareSet | None:
    """The shares in the folders `share-*` of a store, or the one that it is itself; None if there are none."""
    folders = share_places(store)
    return ShareSet(folders) if folders != [store] or store.exists(SHARE) else None


def share_places(store: Store) -> list[Store]:
    """The folders `share-*` of a place, by number; the place itself if it has none."""
    try:
        folders = sorted((folder_index(name), name) for name in store.folders() if folder_index(name) >= 0)
    except SourceError:  # whoever reads there will be told why
        return [store]
    return [store.folder(name) for _, name in folders] or [store]


def _open(place: Store) -> OpenedPlace:
    try:
        return OpenedPlace(place, *read_share(place.read(SHARE, MAX_SHARE_BYTES)))
    except FormatError as error:
        return OpenedPlace(place, why=error.message)
    except HolorayError as error:
        return OpenedPlace(place, why=f"holds no share: {error.message}")


def _agreed(opened: Sequence[OpenedPlace]) -> ShareTable:
    """What most places say the set is."""
    votes = Counter(at.table for at in opened if at.table is not None).most_common(2)
    if not votes:
        if any(name for at in opened for name in at.place.names()):
            raise SourceError(
                f"{_common_name([at.place for at in opened])} was never sealed: an encode was interrupted",
                hint="run the same `holoray encode` again",
            )
        told = "; ".join(f"{at.place.uri}: {at.why}" for at in opened[:3])
        raise SourceError(f"no share of a store is there: {told}", hint="are the paths right?")
    if len(votes) == 2 and votes[0][1] == votes[1][1]:
        raise SourceError(
            f"the places hold shares of two stores: {votes[0][0].root} and {votes[1][0].root}",
            hint="give the shares of one store",
        )
    return votes[0][0]


def _common_name(places: Sequence[Store]) -> str:
    head, separator, folder = places[0].uri.rpartition("/")
    if separator and folder_index(folder) >= 0 and all(place.uri.startswith(head + separator) for place in places):
        return head
    return places[0].uri if len(places) == 1 else f"{places[0].uri} and {len(places) - 1} more"


def _at_once(run: Callable[[T], U], items: Sequence[T]) -> list[U]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(run, items))
