"""A small store in shares, and what can be done to them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest import mock

import numpy as np

import holoray
from holoray.stores import MemoryStore, Shares, ShareTarget, Store, open_shares, stripes
from holoray.stores.base import fragment_file
from holoray.stores.share_set import ShareSet
from holoray.tensor import Array, as_bytes

SHARES = Shares.usable(8, 4, 7, layers=1.5)
CHUNK, UNIT = 256, 64


@contextmanager
def small_chunks() -> Iterator[None]:
    """Chunks so small that a few kilobytes are many stripes."""
    with mock.patch.object(stripes, "CHUNK_BYTES", CHUNK), mock.patch.object(stripes, "UNIT_BYTES", UNIT):
        yield


@cache
def weights() -> dict[str, Array]:
    random = np.random.default_rng(3)
    return {
        "planes": (0.05 * random.standard_normal((96, 96))).astype(np.float16),
        "more.planes": random.standard_normal((70, 70)).astype(np.float32),
        "bias": random.standard_normal(33).astype(np.float32),
        "ids": np.arange(200, dtype=np.int64),
        "empty": np.zeros((0, 3), np.float32),
    }


def bits(tensors: dict[str, Array]) -> dict[str, bytes]:
    return {name: f"{a.dtype}{a.shape}".encode() + as_bytes(a).tobytes() for name, a in tensors.items()}


def places(number: int = SHARES.total) -> list[MemoryStore]:
    return [MemoryStore(f"memory:{i}") for i in range(number)]


def encoded(shares: Shares = SHARES) -> list[MemoryStore]:
    found = places(shares.total)
    holoray.encode(weights(), ShareTarget(found, shares), threads=1)
    return found


def copies(shares: list[MemoryStore]) -> list[MemoryStore]:
    out = places(len(shares))
    for old, new in zip(shares, out, strict=True):
        new.blobs.update(old.blobs)
    return out


def flip(place: MemoryStore, name: str, at: int) -> None:
    data = bytearray(place.blobs[name])
    data[at] ^= 0x40
    place.blobs[name] = bytes(data)


def load(where: list[MemoryStore]) -> dict[str, bytes]:
    return bits(holoray.open(open_shares(list(where))).load())


class CountingStore(MemoryStore):
    """Counts the bytes read of each blob."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store.uri)
        self.blobs = store.blobs
        self.read_bytes: Counter[str] = Counter()
        self.reads: list[tuple[str, int, int]] = []

    def read_into(self, name: str, offset: int, out: memoryview) -> int:
        got = super().read_into(name, offset, out)
        self.read_bytes[name] += got
        self.reads.append((name, offset, got))
        return got


def spread(data: bytes, needed: int, total: int, number: int = 1) -> tuple[list[MemoryStore], ShareSet, str]:
    """Bytes as a fragment file of a set of shares, with a manifest of one byte: no store, but all that shares know."""
    where = places(total)
    target = ShareTarget(where, Shares(total, (needed,)))
    name = fragment_file(number)
    for file, content in ((name, data), ("manifest.arrow", b"x"), ("ROOT", b"sha256:" + b"0" * 64 + b"\n")):
        with target.create(file) as out:
            out.write(content)
    return where, ShareSet(list[Store](where)), name


def random_bytes(seed: int, nbytes: int) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes) if nbytes else os.urandom(0)
