"""Fetch: the stored bytes of a batch, adjacent fragments in one read, each verified as soon as it is there."""

from __future__ import annotations

from collections.abc import Sequence

from holoray.errors import IntegrityError
from holoray.fragment import FragmentEntry
from holoray.stores.base import Check, Part, Span, Store, fragment_file


def fetch(
    store: Store,
    entries: Sequence[FragmentEntry],
    landings: Sequence[memoryview | None],
    buffer: memoryview,
    check: Check,
) -> tuple[list[memoryview], dict[int, IntegrityError]]:
    """Read the payloads of `entries`: to their landing where they have one, else into `buffer`; one view per entry.

    `buffer` is as long as all payloads without a landing together. `check` gets the place of an entry and its bytes;
    also returned is what is wrong, by the place of the entry.
    """
    spans = [
        Span(fragment_file(entry.file), entry.offset, landing, (Part(i, 0, entry.stored_bytes),))
        for i, (entry, landing) in enumerate(zip(entries, landings, strict=True))
        if landing is not None
    ]
    position = 0
    for run in _runs(entries, [i for i, landing in enumerate(landings) if landing is None]):
        offset = entries[run[0]].offset
        parts = [Part(i, entries[i].offset - offset, entries[i].offset - offset + entries[i].stored_bytes) for i in run]
        length = parts[-1].stop
        spans.append(Span(fragment_file(entries[run[0]].file), offset, buffer[position : position + length], parts))
        position += length
    views: list[memoryview] = [buffer[:0]] * len(entries)
    for span in spans:
        for part in span.parts:
            views[part.member] = span.out[part.start : part.stop]
    return views, store.read_spans(spans, check)


def _runs(entries: Sequence[FragmentEntry], members: Sequence[int]) -> list[list[int]]:
    """The members in groups of fragments that follow each other in one file."""
    runs: list[list[int]] = []
    end = (-1, -1)
    for member in sorted(members, key=lambda i: (entries[i].file, entries[i].offset)):
        entry = entries[member]
        if end == (entry.file, entry.offset):
            runs[-1].append(member)
        else:
            runs.append([member])
        end = (entry.file, entry.offset + entry.stored_bytes)
    return runs
