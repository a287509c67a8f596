"""Verify: every byte of a store against the manifest, and what exactly is bad."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from holoray.errors import SourceError, TruncatedError
from holoray.fragment import FragmentEntry
from holoray.integrity import fault
from holoray.manifest import FileEntry, Manifest
from holoray.stores.base import Store, fragment_file


@dataclass(frozen=True, slots=True)
class BadFragment:
    """One thing that is wrong; `tensor` and `fragment` are None where the file as a whole is meant."""

    file: str
    tensor: str | None
    fragment: int | None
    why: str


_ASKING: Final = 16  # requests under way at once: each is a round trip and next to no bytes
_Located = tuple[str, FragmentEntry]
_PIECE_BYTES: Final = 1 << 20


def verify(store: Store, manifest: Manifest, on_progress: Callable[[int], None] | None = None) -> list[BadFragment]:
    """All faults of a store's fragment files, in file order; `on_progress` gets the bytes of each checked fragment.

    Checks xxh3_64 and sha256 of every payload, and size and sha256 of everything between the payloads.
    """
    by_file: dict[int, list[_Located]] = defaultdict(list)
    for tensor in manifest.tensors:
        for entry in tensor.fragments:
            by_file[entry.file].append((tensor.name, entry))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = pool.map(lambda file: _verify_file(store, file, by_file[file.number], on_progress), manifest.files)
        return [bad for faults in found for bad in faults]


def check_sizes(store: Store, manifest: Manifest) -> None:
    """Raise unless every fragment file is as long as the manifest says; cheap, and done before memory is allocated."""
    names = [fragment_file(file.number) for file in manifest.files]
    with ThreadPoolExecutor(_ASKING if store.remote else 1) as pool:
        sizes = list(pool.map(store.size, names))
    for file, size in zip(manifest.files, sizes, strict=True):
        if size < file.bytes:
            raise TruncatedError(
                f"{store.uri}: {fragment_file(file.number)} has {size} of {file.bytes} bytes",
                hint="copy the store again, or run `holoray verify` to see what is missing",
                source=store.uri,
            )


def _verify_file(
    store: Store, file: FileEntry, fragments: Sequence[_Located], on_progress: Callable[[int], None] | None
) -> list[BadFragment]:
    name = fragment_file(file.number)
    try:
        size = store.size(name)
    except SourceError as error:
        return [BadFragment(name, None, None, f"missing: {error}")] + [
            BadFragment(name, tensor, entry.index, "its file is missing") for tensor, entry in fragments
        ]
    bad: list[BadFragment] = []
    framing = hashlib.sha256()
    position = 0
    for tensor, entry in sorted(fragments, key=lambda located: located[1].offset):
        _hash(framing, store, name, position, min(entry.offset, size))
        payload = _read(store, name, entry.offset, min(entry.offset + entry.stored_bytes, size))
        why = fault(entry, payload, strict=True)
        if why is not None:
            bad.append(BadFragment(name, tensor, entry.index, why))
        position = entry.offset + entry.stored_bytes
        if on_progress is not None:
            on_progress(entry.stored_bytes)
    if size != file.bytes:
        bad.append(BadFragment(name, None, None, f"has {size} bytes instead of {file.bytes}"))
        return bad
    _hash(framing, store, name, position, size)
    if framing.hexdigest() != file.framing_sha256:
        bad.append(BadFragment(name, None, None, "bytes outside the payloads were changed"))
    return bad


def _hash(digest: Any, store: Store, name: str, start: int, stop: int) -> None:
    """Add a range to a digest, in pieces: how long it is, is what an untrusted file says."""
    for at in range(start, stop, _PIECE_BYTES):
        digest.update(_read(store, name, at, min(at + _PIECE_BYTES, stop)))


def _read(store: Store, name: str, start: int, stop: int) -> memoryview:
    out = memoryview(bytearray(max(0, stop - start)))
    return out[: store.read_into(name, start, out)]
