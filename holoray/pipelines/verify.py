"""Verify: every byte of a store against the manifest, and what exactly is bad."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from holoray.errors import IntegrityError, SourceError, TruncatedError
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


_Located = tuple[str, FragmentEntry]


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
    for file in manifest.files:
        size = store.size(fragment_file(file.number))
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
        framing.update(_read(store, name, position, entry.offset, size))
        payload = _read(store, name, entry.offset, entry.offset + entry.stored_bytes, size)
        why = fault(entry, payload, strict=True)
        if why is not None:
            bad.append(BadFragment(name, tensor, entry.index, why))
        position = entry.offset + entry.stored_bytes
        if on_progress is not None:
            on_progress(entry.stored_bytes)
    framing.update(_read(store, name, position, size, size))
    if size != file.bytes:
        bad.append(BadFragment(name, None, None, f"has {size} bytes instead of {file.bytes}"))
    elif framing.hexdigest() != file.framing_sha256:
        bad.append(BadFragment(name, None, None, "bytes outside the payloads were changed"))
    return bad


def _read(store: Store, name: str, start: int, stop: int, size: int) -> memoryview:
    out = memoryview(bytearray(max(0, min(stop, size) - start)))
    return out[: store.read_into(name, start, out)]


def summarise(store: Store, bad: Sequence[BadFragment]) -> IntegrityError:
    """The error that says that `bad` was found."""
    return IntegrityError(
        f"{store.uri} is damaged: {len(bad)} faults, the first in {bad[0].file}: {bad[0].why}",
        hint="copy the files named again",
        tensor=bad[0].tensor,
        fragment=bad[0].fragment,
        source=store.uri,
    )
