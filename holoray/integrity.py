"""Digests of stored bytes. xxh3_64 guards against accidents; sha256 also against forgery."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import xxhash

from holoray.errors import IntegrityError, UsageError
from holoray.fragment import FragmentEntry
from holoray.stores.base import fragment_file

ROOT_PREFIX = "sha256:"


@dataclass(frozen=True, slots=True)
class Digests:
    xxh3_64: int
    sha256: bytes

    @classmethod
    def of(cls, data: Any) -> Digests:
        return cls(xxhash.xxh3_64_intdigest(data), hashlib.sha256(data).digest())


def fault(entry: FragmentEntry, data: Any, *, strict: bool) -> str | None:
    """Why `data` is not the stored payload of `entry`, or None if it is; `strict` checks sha256 besides xxh3_64."""
    size = memoryview(data).nbytes
    if size != entry.stored_bytes:
        return f"truncated: {size} of {entry.stored_bytes} bytes"
    if xxhash.xxh3_64_intdigest(data) != entry.xxh3_64:
        return "xxh3_64 mismatch"
    if strict and hashlib.sha256(data).digest() != entry.sha256:
        return "sha256 mismatch behind a matching xxh3_64 (forged)"
    return None


def check(tensor: str, entry: FragmentEntry, data: Any, *, strict: bool = False, source: str = "") -> None:
    """Raise IntegrityError unless `data` is exactly the stored payload of `entry`."""
    why = fault(entry, data, strict=strict)
    if why is not None:
        where = f" in {fragment_file(entry.file)}" if entry.file >= 0 else ""
        raise IntegrityError(
            f"fragment {entry.index} of tensor {tensor!r}{where} is damaged: {why}",
            hint="run `holoray verify STORE` to list every bad fragment, then copy the store again",
            tensor=tensor,
            fragment=entry.index,
            source=source or None,
        )


def format_root(manifest: bytes) -> str:
    """The root of a manifest: `sha256:` and 64 hex digits."""
    return ROOT_PREFIX + hashlib.sha256(manifest).hexdigest()


def parse_root(text: str, *, what: str = "root") -> str:
    """Normalise `sha256:HEX`; raises UsageError for anything else."""
    root = text.strip().lower()
    digits = root.removeprefix(ROOT_PREFIX)
    if not root.startswith(ROOT_PREFIX) or len(digits) != 64 or set(digits) - set("0123456789abcdef"):
        raise UsageError(f"{what} is no root", hint="give it as sha256:<64 hex digits>, as `holoray inspect` prints it")
    return root
