"""Verify: every byte of a store against the manifest, and what exactly is bad."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

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

    def __str__(self) -> str:
        where = "" if self.tensor is None else f", fragment {self.fragment} of tensor {self.tensor!r}"
        return f"{self.file}{where}: {self.why}"


_ASKING: Final = 16  # requests under way at once: each is a round trip and next to no bytes
Located = tuple[str, FragmentEntry]
_PIECE_BYTES: Final = 1 << 20


def verify(store: Store, manifest: Manifest, on_progress: Callable[[int], None] | None = None) -> list[BadFragment]:
    """All faults of a store's fragment files, in file order; `on_progress` gets the bytes of each checked fragment.

    Checks xxh3_64 and sha256 of every payload, and size and sha256 of everything between the payloads.
    """
    by_file: dict[int, list[Located]] = defaultdict(list)
    for tensor in manifest.tensors:
        for entry in tensor.fragments:
            by_file[entry.file].append((tensor.name, entry))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = pool.map(lambda file: verify_file(store, file, by_file[file.number], on_progress), manifest.files)
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


def verify_file(
    store: Store, file: FileEntry, fragments: Sequence[Located], on_progress: Callable[[int], None] | None = None
) -> list[BadFragment]:
    """All faults of one fragment file, whose fragments are given with the names of their tensors."""
    name = fragment_file(file.number)
    try:
        size = store.size(name)
    except SourceError as error:
        return [BadFragment(name, None, None, f"missing: {error}")] + [
            BadFragment(name, tensor, entry.index, "its file is missing") for tensor, entry in fragments
        ]
    bad: list[BadFragment] = []
    framing = _Framing(store, name)
    position = 0
    for tensor, entry in sorted(fragments, key=lambda located: located[1].offset):
        framing.add(position, min(entry.offset, size))
        why = _payload_fault(store, name, entry, size)
        if why is not None:
            bad.append(BadFragment(name, tensor, entry.index, why))
        position = entry.offset + entry.stored_bytes
        if on_progress is not None:
            on_progress(entry.stored_bytes)
    if size != file.bytes:
        bad.append(BadFragment(name, None, None, f"has {size} bytes instead of {file.bytes}"))
        return bad
    framing.add(position, size)
    if framing.fault or framing.digest.hexdigest() != file.framing_sha256:
        bad.append(BadFragment(name, None, None, framing.fault or "bytes outside the payloads were changed"))
    return bad


def _payload_fault(store: Store, name: str, entry: FragmentEntry, size: int) -> str | None:
    """Why a payload is bad, None if it is not; of a file that is there but cannot be read throughout, the rest is."""
    try:
        payload = _read(store, name, entry.offset, min(entry.offset + entry.stored_bytes, size))
    except SourceError as error:
        return error.message
    return fault(entry, payload, strict=True)


class _Framing:
    """Digest of the bytes between the payloads of a file, as far as they can be read."""

    def __init__(self, store: Store, name: str) -> None:
        self.digest = hashlib.sha256()
        self.fault = ""
        self._store = store
        self._name = name

    def add(self, start: int, stop: int) -> None:
        """Add a range, in pieces: how long it is, is what an untrusted file says."""
        try:
            for at in range(start, stop, _PIECE_BYTES):
                self.digest.update(_read(self._store, self._name, at, min(at + _PIECE_BYTES, stop)))
        except SourceError as error:
            self.fault = error.message


def _read(store: Store, name: str, start: int, stop: int) -> memoryview:
    out = memoryview(bytearray(max(0, stop - start)))
    return out[: store.read_into(name, start, out)]
