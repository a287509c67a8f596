"""Repair: lost and bad shares are computed from the others, in place.

Nothing is overwritten before what replaces it is complete and proven: the data match the sealed root, and the part
computed from them has the digest that the shares recorded when the store was encoded, so it is the same file, byte for
byte. A repair that is killed leaves whole old parts and whole new ones; the next one does the rest.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from holoray.errors import FormatError, HolorayError, IntegrityError, SourceError, UsageError
from holoray.integrity import parse_root
from holoray.pipelines.sealed_store import SealedStore
from holoray.pipelines.share_check import BadPart, OnBytes, check_shares
from holoray.pipelines.verify import BadFragment, verify_file
from holoray.stores import MANIFEST, ROOT, ShareSet, Store
from holoray.stores.base import SHARE, fragment_number, is_own
from holoray.stores.share_part import share_held
from holoray.stores.share_set import OpenedPlace, share_places
from holoray.stores.share_target import PartWriter, chunks_of, write_blob
from holoray.stores.shares import MAX_SHARE_BYTES, CodedFile, ShareTable, part_file, share_folder


@dataclass(frozen=True, slots=True)
class RepairedPart:
    """A file of a share that is whole again."""

    share: int
    place: str
    file: str


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What a repair found and did; `failed` is what the shares that are left do not give."""

    root: str
    shares: int
    found: tuple[BadPart, ...]
    repaired: tuple[RepairedPart, ...]
    failed: tuple[BadFragment, ...]
    seconds: float


def repair(places: Sequence[Store], on_bytes: OnBytes | None = None) -> RepairReport:
    """Make every share whole that can be: of the folders `share-*` in one place, or of the shares in several.

    A place that holds nothing takes a missing share; one that does not answer, or cannot be written, is left out and
    told in `failed`. `on_bytes` gets the bytes checked and computed as they are, from any thread. Raises SourceError if
    the shares that are left do not even give the manifest, UsageError where a place holds something else, CapacityError
    for a full disk.
    """
    start = time.perf_counter()
    repaired: list[RepairedPart] = []
    failed: list[BadFragment] = []
    shares, homes = _homes(places, failed)
    sealed = SealedStore(shares)
    found = check_shares(shares, on_bytes)
    with ExitStack() as locks:
        for share in sorted({fault.share for fault in found} & set(homes)):
            try:
                locks.enter_context(homes[share].exclusive())
                _check_unchanged(shares, share)
            except HolorayError as error:
                failed.append(_left_out(homes.pop(share), error))
        for file in shares.table.files:
            part = part_file(file.stripes.name)
            bad = sorted({fault.share for fault in found if fault.file in (None, part)} & set(homes))
            faults = _against_root(sealed, file.stripes.name) if bad else []
            failed += faults
            if bad and not faults:
                _rebuild(shares, file, {share: homes[share] for share in bad}, on_bytes)
                repaired += [RepairedPart(share, homes[share].uri, part) for share in bad]
        for fault in found:
            if fault.file in (None, ROOT) and fault.share in homes:  # last: they are what makes a place a share
                home = homes[fault.share]
                write_blob(home, SHARE, shares.table.encoded(fault.share))
                write_blob(home, ROOT, shares.read(ROOT, limit=4096))
                repaired.append(RepairedPart(fault.share, home.uri, ROOT))
    seconds = time.perf_counter() - start
    return RepairReport(sealed.root, shares.table.total, tuple(found), tuple(repaired), tuple(failed), seconds)


def _left_out(place: Store, error: HolorayError) -> BadFragment:
    return BadFragment(place.uri, None, None, error.message)


def _check_unchanged(shares: ShareSet, share: int) -> None:
    """Raise SourceError if a share was replaced before its place was locked."""
    place = shares.places.get(share)
    if place is not None and place.read(SHARE, MAX_SHARE_BYTES) != shares.table.encoded(share):
        raise SourceError(f"{place.uri} was written meanwhile", hint="run `holoray repair` again", source=place.uri)


def _homes(places: Sequence[Store], failed: list[BadFragment]) -> tuple[ShareSet, dict[int, Store]]:
    """The shares that are there, and where each share belongs: also those that are not there, as far as is known.

    Places that do not say what they hold are added to `failed`.
    """
    first, *others = places
    inside = list(places) if others else share_places(first)
    parent = first if not others and inside != [first] else None
    shares = ShareSet(inside)
    homes = dict(shares.places)
    strangers = list(shares.strangers)
    if parent is not None:
        known = {place.uri for place in inside}
        folders = [parent.folder(share_folder(share)) for share in shares.missing]
        strangers += [OpenedPlace(folder) for folder in folders if folder.uri not in known]
    vacant: list[Store] = []
    for stranger in strangers:
        try:
            held = _share_of_ours(stranger, shares.table)
        except SourceError as error:
            failed.append(_left_out(stranger.place, error))
            continue
        if held is None:
            vacant.append(stranger.place)
        elif held in shares.missing:
            homes.setdefault(held, stranger.place)
    for share in shares.missing:
        own = None if parent is None else parent.folder(share_folder(share)).uri
        home = next((place for place in vacant if own in (None, place.uri)), None)
        if share not in homes and home is not None:
            vacant.remove(home)
            homes[share] = home
    return shares, homes


def _share_of_ours(stranger: OpenedPlace, table: ShareTable) -> int | None:
    """Which share of the set a place has parts of, though it does not say so; None if it is empty.

    Raises UsageError if what it holds is not ours, SourceError if it does not answer or claims what it has not.
    """
    place = stranger.place
    if not any(is_own(name) for name in place.names()):
        return None
    ours = not _is_of_another_store(place, table.root) if stranger.table is None else stranger.table.root == table.root
    held = share_held(place, table) if ours else -1
    if held >= 0:
        return held
    if ours and stranger.table is not None:
        raise SourceError(f"{place.uri} {stranger.why}", source=place.uri)
    raise UsageError(
        f"{place.uri} holds another store, or a share of one: it is left as it is",
        hint="leave it out, or empty it if a share of this store belongs there",
    )


def _is_of_another_store(place: Store, root: str) -> bool:
    """Whether its ROOT says so; a damaged one, or none, says nothing."""
    if not place.exists(ROOT):
        return False
    try:
        return parse_root(place.read(ROOT, limit=4096).decode()) != root
    except (FormatError, UsageError, UnicodeDecodeError):
        return False


def _against_root(sealed: SealedStore, name: str) -> list[BadFragment]:
    """What of a file does not match the sealed manifest, with all the shares can do; the manifest itself does."""
    if name == MANIFEST:
        return []
    number = fragment_number(name)
    entries = [entry for entry in sealed.manifest.files if entry.number == number]
    if not entries:
        return [BadFragment(name, None, None, "the manifest does not know it")]
    fragments = [(t.name, f) for t in sealed.manifest.tensors for f in t.fragments if f.file == number]
    return verify_file(sealed.store, entries[0], fragments)


def _rebuild(shares: ShareSet, file: CodedFile, homes: Mapping[int, Store], on_bytes: OnBytes | None) -> None:
    """Write the parts of some shares anew, a stripe at a time.

    Raises IntegrityError, and writes nothing, if they differ from those that were lost.
    """
    stripes = file.stripes
    with ExitStack() as stack:
        part = part_file(stripes.name)
        writers = {share: PartWriter(stack.enter_context(home.create(part))) for share, home in homes.items()}
        for stripe in range(stripes.count):
            data = bytearray(min(stripes.stripe_bytes, stripes.nbytes - stripe * stripes.stripe_bytes))
            shares.read_into(stripes.name, stripe * stripes.stripe_bytes, memoryview(data))
            chunks = chunks_of(stripes, bytes(data))
            for share, writer in writers.items():
                writer.add(chunks[stripes.chunk_on(stripe, share)])
                if on_bytes is not None:
                    on_bytes(len(chunks[0]))
        for share, writer in writers.items():
            if writer.finish(stripes, share) != file.footers[share]:
                raise IntegrityError(
                    f"what the other shares give for {part} of share {share} is not what was lost",
                    hint="nothing was replaced: the shares were sealed with digests that do not fit their data",
                    source=homes[share].uri,
                )
