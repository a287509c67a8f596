"""Writing shares: a store whose files are cut into chunks, a share of each to every place, as they are written."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, BinaryIO, cast

from holoray.errors import SourceError, UsageError
from holoray.integrity import parse_root
from holoray.stores.base import ROOT, SHARE, Store, check_blob_name, is_own
from holoray.stores.reed_solomon import ALIGNMENT, parity
from holoray.stores.shares import (
    TRAILER_BYTES,
    CodedFile,
    Footer,
    Shares,
    ShareTable,
    footer_bytes,
    is_coded,
    part_file,
    read_trailer,
    whole_file,
)
from holoray.stores.stripes import Stripes


class ShareTarget(Store):
    """Where an encode writes shares; to read them, open a `ShareSet`.

    Coded files can only be asked for their size, and that only while all places have their part. `ROOT` is written
    last: first every place gets its `share.json`. `surplus` are places with shares of a store that this one replaces,
    emptied when that is done: they could outvote the new ones.
    """

    def __init__(self, places: Sequence[Store], shares: Shares, surplus: Sequence[Store] = ()) -> None:
        if len(places) != shares.total:
            raise UsageError(f"{shares.total} shares need as many places, not {len(places)}")
        if len({place.uri for place in places}) != len(places):
            raise UsageError(
                "two shares in one place would be lost together", hint="give each share a place of its own"
            )
        self.places = tuple(places)
        self.shares = shares
        self.surplus = tuple(surplus)
        self.uri = f"{places[0].uri} and {len(places) - 1} more"
        self.remote = any(place.remote for place in places)
        self.in_process = any(place.in_process for place in places)

    @property
    def bytes_stored(self) -> int:
        """Bytes of all files in all places."""
        return sum(place.size(name) for place in self.places for name in place.names() if is_own(name))

    def exists(self, name: str) -> bool:
        return super().exists(name) or (name == ROOT and any(place.exists(name) for place in self.surplus))

    def size(self, name: str) -> int:
        if not is_coded(name):
            return self.places[0].size(name)
        sizes = {self._layout(place, name).nbytes for place in self.places}
        if len(sizes) != 1:
            raise SourceError(f"the parts of {name} are of different files", source=self.uri)
        return sizes.pop()

    def read_into(self, name: str, offset: int, out: memoryview) -> int:
        if is_coded(name):
            raise SourceError(f"{name} is being written as shares", source=self.uri)
        return self.places[0].read_into(name, offset, out)

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        check_blob_name(name)
        if is_coded(name):
            stripes = Stripes(name, 0, self.shares.needed_for(name), self.shares.total)
            with ExitStack() as stack:
                parts = [stack.enter_context(place.create(part_file(name))) for place in self.places]
                writer = _StripeWriter(stripes, parts)
                yield cast(BinaryIO, writer)
                writer.finish()
            return
        buffer = io.BytesIO()
        yield buffer
        if name == ROOT:
            self._seal(buffer.getvalue().decode().strip())
        for place in self.places:
            write_blob(place, name, buffer.getvalue())

    def delete(self, name: str) -> None:
        for place in self.places:
            place.delete(part_file(name) if is_coded(name) else name)

    def names(self) -> Iterator[str]:
        found = {name for place in self.places for name in place.names() if is_own(name)} - {SHARE}
        return iter(sorted(whole_file(name) for name in found))

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with ExitStack() as stack:
            for place in (*self.places, *self.surplus):
                stack.enter_context(place.exclusive())
            yield

    @contextmanager
    def replacement(self) -> Iterator[Store]:
        with ExitStack() as stack:
            yield ShareTarget([stack.enter_context(place.replacement()) for place in self.places], self.shares)
        for place in self.surplus:
            own = [name for name in place.names() if is_own(name)]
            for name in sorted(own, key=lambda name: name not in (ROOT, SHARE)):  # first what makes it a share
                place.delete(name)

    def _seal(self, root: str) -> None:
        """Say in every place what all of them hold. Read back from the parts: some may be of an earlier run."""
        files = tuple(self._coded_file(name) for name in self.names() if is_coded(name))
        table = ShareTable(parse_root(root), self.shares.total, files)
        for index, place in enumerate(self.places):
            write_blob(place, SHARE, table.encoded(index))

    def _coded_file(self, name: str) -> CodedFile:
        layouts = {self._layout(place, name) for place in self.places}
        if len(layouts) != 1:
            raise SourceError(f"the parts of {name} are of different files", source=self.uri)
        stripes = layouts.pop()
        return CodedFile(stripes, tuple(hashlib.sha256(_footer(place, stripes)).digest() for place in self.places))

    def _layout(self, place: Store, name: str) -> Stripes:
        part = part_file(name)
        trailer = bytearray(TRAILER_BYTES)
        got = place.read_into(part, max(0, place.size(part) - TRAILER_BYTES), memoryview(trailer))
        return read_trailer(name, bytes(trailer[:got]))[1]


def write_blob(place: Store, name: str, data: bytes) -> None:
    with place.create(name) as file:
        file.write(data)


def _footer(place: Store, stripes: Stripes) -> bytes:
    out = bytearray(footer_bytes(stripes))
    got = place.read_into(part_file(stripes.name), stripes.part_bytes, memoryview(out))
    return bytes(out[:got])


class PartWriter:
    """The part of one share: takes its chunk of each stripe in turn, then ends with the footer."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._footer = Footer()

    def add(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._footer.add(chunk)

    def finish(self, stripes: Stripes, share: int) -> bytes:
        """Write the footer, and return its sha256."""
        footer = self._footer.encoded(stripes, share)
        self._file.write(footer)
        return hashlib.sha256(footer).digest()


def chunks_of(stripes: Stripes, data: bytes) -> list[bytes]:
    """All chunks of the stripe with these data, which may be short of a whole stripe: zeros fill it up."""
    nbytes = -(-len(data) // (stripes.needed * ALIGNMENT)) * ALIGNMENT
    data = data.ljust(nbytes * stripes.needed, b"\0")
    own = [data[j * nbytes : (j + 1) * nbytes] for j in range(stripes.needed)]
    return own + parity(data, stripes.needed, stripes.total)


class _StripeWriter:
    """The file that the writer of a store sees: what is written to it goes to the places stripe by stripe."""

    def __init__(self, stripes: Stripes, parts: Sequence[BinaryIO]) -> None:
        self._stripes = stripes  # their `nbytes` is known at the end
        self._parts = [PartWriter(part) for part in parts]
        self._pending = bytearray()
        self._stripe = 0
        self._nbytes = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._nbytes += view.nbytes
        full = self._stripes.stripe_bytes
        at = 0
        while at < view.nbytes:
            step = view[at : at + full - len(self._pending)]
            self._pending += step
            at += step.nbytes
            if len(self._pending) == full:
                self._emit()
        return view.nbytes

    def finish(self) -> None:
        if self._pending:
            self._emit()
        whole = replace(self._stripes, nbytes=self._nbytes)
        for share, part in enumerate(self._parts):
            part.finish(whole, share)

    def _emit(self) -> None:
        for chunk, data in enumerate(chunks_of(self._stripes, bytes(self._pending))):
            self._parts[self._stripes.share_of(self._stripe, chunk)].add(data)
        self._pending.clear()
        self._stripe += 1
