"""Fetch: the stored bytes of a batch, adjacent fragments in one read, each verified as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from holoray.fragment import FragmentEntry
from holoray.stores.base import Store, fragment_file


@dataclass(slots=True)
class _Span:
    """Fragments that follow each other in one file."""

    file: int
    offset: int
    length: int
    members: list[int]


Verify = Callable[[int, memoryview], None]
"""Called with the place of an entry and the bytes read for it, fewer than stored where the file ends; may raise."""


def fetch(
    store: Store,
    entries: Sequence[FragmentEntry],
    landings: Sequence[memoryview | None],
    buffer: memoryview,
    verify: Verify,
) -> list[memoryview]:
    """Read the payloads of `entries`: to their landing where they have one, else into `buffer`; one view per entry.

    `buffer` is as long as all payloads without a landing together. Hashing takes a third of the time while the bytes
    are still in the processor's cache, so `verify` gets them after each read and not after all of them.
    """
    views: list[memoryview] = [buffer[:0]] * len(entries)
    for i, (entry, landing) in enumerate(zip(entries, landings, strict=True)):
        if landing is not None:
            views[i] = landing[: store.read_into(fragment_file(entry.file), entry.offset, landing)]
            verify(i, views[i])
    position = 0
    for span in _spans(entries, [i for i, landing in enumerate(landings) if landing is None]):
        got = store.read_into(fragment_file(span.file), span.offset, buffer[position : position + span.length])
        for member in span.members:
            start = position + entries[member].offset - span.offset
            end = min(start + entries[member].stored_bytes, position + got)
            views[member] = buffer[start : max(start, end)]
            verify(member, views[member])
        position += span.length
    return views


def _spans(entries: Sequence[FragmentEntry], members: Sequence[int]) -> list[_Span]:
    spans: list[_Span] = []
    for member in sorted(members, key=lambda i: (entries[i].file, entries[i].offset)):
        entry = entries[member]
        last = spans[-1] if spans else None
        if last is not None and (last.file, last.offset + last.length) == (entry.file, entry.offset):
            last.length += entry.stored_bytes
            last.members.append(member)
        else:
            spans.append(_Span(entry.file, entry.offset, entry.stored_bytes, [member]))
    return spans
