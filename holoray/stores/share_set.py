"""Reading shares: one store again, as long as enough of them are there.

Data chunks are read where they lie, by range. Only where one is missing or does not match its digest are others of its
stripe read as well, and the chunk is computed from any k of them.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from holoray.errors import FormatError, HolorayError, SourceError
from holoray.stores.base import ROOT, SHARE, Store
from holoray.stores.read_only import ReadOnlyStore
from holoray.stores.reed_solomon import rebuild
from holoray.stores.share_part import SharePart
from holoray.stores.shares import MAX_SHARE_BYTES, CodedFile, ShareTable, folder_index, read_share
from holoray.stores.stripes import Piece, Stripes

_AT_ONCE: Final = 16
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class OpenedPlace:
    """A place, and what it says of itself or why it says nothing."""

    place: Store
    index: int = -1
    table: ShareTable | None = None
    why: str = ""
    damaged: bool = False
    """Whether there is a `share.json` that cannot be understood."""


class ShareSet(ReadOnlyStore):
    """A store of which some shares may be missing; read only.

    Takes what most places agree on as the set, and places that disagree as missing: a share of another store, or of an
    older version of this one, can do no harm, nor can fewer liars than there are honest shares. Where several places
    say that they hold the same share, those count whose parts bear it out. Raises SourceError if no place holds a
    share, or if they are of two stores to equal parts.
    """

    write_hint = "`holoray encode --shares` writes shares, `holoray repair` rebuilds lost ones"

    def __init__(self, places: Sequence[Store]) -> None:
        self._given = tuple(places)
        opened = _at_once(_open, self._given)
        self.table = _agreed(opened)
        self.places: dict[int, Store] = {}
        """The place of each share that is there; if several hold it, the one with the most parts that open."""
        self.missing: dict[int, str] = {}
        """Why each of the other shares is not there."""
        self.strangers: list[OpenedPlace] = []
        """Places given that hold no share of the set (or one that another place holds too)."""
        self.files = {file.stripes.name: file for file in self.table.files}
        self._parts: dict[tuple[str, int], list[SharePart]] = {}
        claims: dict[int, list[OpenedPlace]] = {}
        for at in opened:
            if at.table == self.table:
                claims.setdefault(at.index, []).append(at)
            else:
                why = at.why or "holds a share of another store, or of another version of this one"
                self.strangers.append(replace(at, why=why))
        for claimants in claims.values():
            self._settle(claimants)
        for index in range(self.table.total):
            if index not in self.places:
                self.missing[index] = "its place does not hold it" if self.strangers else "no place of it was given"
        self.uri = _common_name(self._given)
        self.remote = any(place.remote for place in self._given)
        self.in_process = any(place.in_process for place in self._given)
        self.rebuilt_bytes = 0
        """Bytes that had to be computed from other shares so far."""
        self._counting = threading.Lock()
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="holoray-shares") if self.remote else None

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._given,)

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
        try:
            self._recover(stripes, reads)
        except SourceError:
            if not self._forgive(name):
                raise
            self._each(self._read_data, [read for read in reads if read.lost])
            self._recover(stripes, reads)
        for read in reads:
            read.deliver()
        return length

    def unreadable(self, names: Sequence[str]) -> Mapping[str, str]:
        asked = set(names)
        parts = [part for (name, _), holders in self._parts.items() if name in asked for part in holders]
        fine = zip(parts, _at_once(SharePart.check_length, parts), strict=True)
        whole = Counter(name for name, _ in {(part.file.stripes.name, part.share) for part, there in fine if there})
        return {
            name: self._too_few(name, whole[name]) for name in names if whole[name] < self._file(name).stripes.needed
        }

    def notes(self) -> Sequence[str]:
        said = [f"share {index} of {self.table.total} is missing: {why}" for index, why in self.missing.items()]
        said += [f"{at.place.uri}: {at.why}" for at in self.strangers]
        parts = (part for holders in self._parts.values() for part in holders)
        said += [f"share {part.share}, {part.place.uri}: {part.fault}" for part in parts if part.fault]
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

    def _settle(self, claimants: Sequence[OpenedPlace]) -> None:
        """Take in the places that say they hold one share; of several, those that have parts of it, the best first."""
        parts = {
            at: [SharePart(at.place, f, at.index, strict=at.place.remote) for f in self.table.files] for at in claimants
        }
        if len(claimants) > 1:
            opened = {at: sum(_at_once(SharePart.opens, own)) for at, own in parts.items()}
            claimants = sorted(claimants, key=lambda at: -opened[at])
            for at in claimants[1:]:
                why = "which another place holds too" if opened[at] else "but has no part of it"
                self.strangers.append(replace(at, why=f"says that it holds share {at.index}, {why}"))
            claimants = [at for at in claimants if opened[at] or at is claimants[0]]
        self.places[claimants[0].index] = claimants[0].place
        for at in claimants:
            for part in parts[at]:
                self._parts.setdefault((part.file.stripes.name, at.index), []).append(part)

    def _each(self, run: Callable[[T], U], items: Sequence[T]) -> list[U]:
        """Run for each item: at once where that saves round trips."""
        return list(map(run, items) if self._pool is None or len(items) < 2 else self._pool.map(run, items))

    def _read_data(self, read: _Read) -> None:
        read.lost = not self._read_chunk(
            read.stripes, read.piece.stripe, read.piece.chunk, read.start, read.stop, read.data
        )

    def _read_chunk(self, stripes: Stripes, stripe: int, chunk: int, start: int, stop: int, out: memoryview) -> bool:
        """Whether some place that holds the chunk gave these bytes of it."""
        return any(
            not part.fault and not part.read(stripe, start, stop, out) for part in self._holders(stripes, stripe, chunk)
        )

    def _forgive(self, name: str) -> bool:
        """Whether there are parts to ask again, whose places did not answer: for when there is no other way."""
        holders = (part for (file, _), own in self._parts.items() if file == name for part in own)
        return sum(part.forgive() for part in holders) > 0

    def _holders(self, stripes: Stripes, stripe: int, chunk: int) -> Sequence[SharePart]:
        return self._parts.get((stripes.name, stripes.share_of(stripe, chunk)), ())

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
                read.lost = False
            with self._counting:
                self.rebuilt_bytes += sum(read.stop - read.start for read in lost)

    def _gather(
        self, stripes: Stripes, stripe: int, start: int, stop: int, held: dict[int, bytes], *, without: Sequence[int]
    ) -> dict[int, bytes]:
        """Bytes `start` to `stop` of as many chunks of a stripe as rebuild others: data first, then parity."""
        holders = {c: self._holders(stripes, stripe, c) for c in range(stripes.total)}
        candidates = [c for c in holders if c not in held and c not in without]
        candidates.sort(key=lambda c: (all(part.fault for part in holders[c]), c))
        self._read_some(stripes, stripe, start, stop, held, candidates)
        if len(held) < stripes.needed:
            at = stripe * stripes.stripe_bytes
            raise SourceError(
                f"bytes {at} to {min(at + stripes.stripe_bytes, stripes.nbytes)} of "
                f"{self._too_few(stripes.name, len(held))}",
                hint="give more of the shares, or load to a lower quality: `holoray verify` names what is bad",
                source=self.uri,
            )
        return dict(sorted(held.items())[: stripes.needed])

    def _read_some(
        self, stripes: Stripes, stripe: int, start: int, stop: int, held: dict[int, bytes], candidates: Sequence[int]
    ) -> None:
        """Add bytes `start` to `stop` of some of the chunks, until there are as many as are needed."""

        def read(chunk: int) -> bytes | None:
            out = bytearray(stop - start)
            return bytes(out) if self._read_chunk(stripes, stripe, chunk, start, stop, memoryview(out)) else None

        left = list(candidates)
        while len(held) < stripes.needed and left:
            more = stripes.needed - len(held)
            asked, left = left[:more], left[more:]
            held |= {c: data for c, data in zip(asked, self._each(read, asked), strict=True) if data is not None}

    def _too_few(self, name: str, there: int) -> str:
        stripes = self._file(name).stripes
        gone = [
            str(share)
            for share in range(stripes.total)
            if all(part.fault for part in self._parts.get((name, share), ()))
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
        return OpenedPlace(place, why=error.message, damaged=True)
    except HolorayError as error:
        return OpenedPlace(place, why=f"holds no share: {error.message}")


def _agreed(opened: Sequence[OpenedPlace]) -> ShareTable:
    """What most places say the set is."""
    votes = Counter(at.table for at in opened if at.table is not None).most_common(2)
    if not votes:
        if not any(at.damaged for at in opened) and any(name for at in opened for name in at.place.names()):
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
