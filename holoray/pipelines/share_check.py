"""Check shares: every byte in every place against what the shares agree on, and what exactly is bad."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from holoray.errors import HolorayError
from holoray.stores import ROOT
from holoray.stores.share_part import SharePart
from holoray.stores.share_set import ShareSet
from holoray.stores.shares import CodedFile

OnBytes = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class BadPart:
    """What is wrong with a share; `file` is None where all of it is missing, `chunk` (its stripe) where a file is."""

    share: int
    place: str | None
    file: str | None
    chunk: int | None
    why: str

    def __str__(self) -> str:
        chunk = None if self.chunk is None else f"chunk {self.chunk}"
        where = [part for part in (f"share {self.share}", self.place, self.file, chunk) if part is not None]
        return f"{', '.join(where)}: {self.why}"


def check_shares(shares: ShareSet, on_bytes: OnBytes | None = None) -> list[BadPart]:
    """All faults of the shares, by share and file; `on_bytes` gets the bytes of each chunk checked, from any thread.

    Checks xxh3_64 and sha256 of every unit, and the digests themselves. What the chunks decode to is not its business:
    see `verify`.
    """
    bad = [BadPart(share, None, None, None, why) for share, why in shares.missing.items()]
    bad += [fault for share in shares.places for fault in _check_root(shares, share)]
    work = [(share, file) for share in shares.places for file in shares.table.files]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for faults in pool.map(lambda item: list(_check_part(shares, item[0], item[1], on_bytes)), work):
            bad += faults
    return sorted(bad, key=lambda fault: (fault.share, fault.file or "", fault.chunk or 0))


def bytes_to_check(shares: ShareSet) -> int:
    return len(shares.places) * sum(file.stripes.part_bytes for file in shares.table.files)


def _check_root(shares: ShareSet, share: int) -> Iterator[BadPart]:
    place = shares.places[share]
    try:
        text = place.read(ROOT, limit=4096)
    except HolorayError as error:
        yield BadPart(share, place.uri, ROOT, None, error.message)
    else:
        if text != shares.read(ROOT, limit=4096):
            yield BadPart(share, place.uri, ROOT, None, "is not the root that the shares agree on")


def _check_part(shares: ShareSet, share: int, file: CodedFile, on_bytes: OnBytes | None) -> Iterator[BadPart]:
    part = SharePart(shares.places[share], file, share, strict=True)
    for stripe in range(file.stripes.count):
        nbytes = file.stripes.chunk_bytes(stripe)
        why = part.read(stripe, 0, nbytes, memoryview(bytearray(nbytes)))
        if part.fault:
            yield BadPart(share, part.place.uri, part.name, None, part.fault)
            return
        if why:
            yield BadPart(share, part.place.uri, part.name, stripe, why)
        if on_bytes is not None:
            on_bytes(nbytes)
    if not file.stripes.count and not part.check_length():
        yield BadPart(share, part.place.uri, part.name, None, part.fault)
