"""A store of some 35 KB with every way of decoding in it, small enough to damage each of its bits."""

from __future__ import annotations

from functools import cache

import ml_dtypes
import numpy as np

import holoray
from holoray.stores import MANIFEST, ROOT, MemoryStore, Store
from holoray.tensor import Array, as_bytes

Blobs = dict[str, bytes]

PATTERNS = ("layer.spectral=spectral", "layer.raw=raw", "layer.lowrank=lowrank")


@cache
def weights() -> dict[str, Array]:
    """The checkpoint: one tensor for each way that bytes take."""
    random = np.random.default_rng(7)
    return {
        "layer.planes": (0.05 * random.standard_normal((49, 100))).astype(ml_dtypes.bfloat16),
        "layer.spectral": random.standard_normal((64, 66)).astype(np.float32),
        "layer.raw": np.repeat(random.standard_normal(69).astype(np.float16), 60).reshape(90, 46),
        "layer.bias": random.standard_normal(33).astype(np.float32),
        "layer.ids": random.integers(-128, 128, (5, 7), np.int8),
        "layer.empty": np.zeros((0, 3), np.float32),
        "layer.scale": np.asarray(0.125, np.float32),
        "layer.lowrank": random.standard_normal((64, 66)).astype(np.float32),
    }


@cache
def _encoded() -> tuple[tuple[str, bytes], ...]:
    store = MemoryStore()
    holoray.encode(weights(), store, pattern=PATTERNS, fragments=4, essential=0.02, rank=5, threads=1)
    return tuple(sorted(store.blobs.items()))


def blobs() -> Blobs:
    """The files of the store, by name: a fresh dict."""
    return dict(_encoded())


def fragment_files() -> list[str]:
    return [name for name in blobs() if name not in (ROOT, MANIFEST)]


def store_of(files: Blobs) -> MemoryStore:
    store = MemoryStore()
    store.blobs.update(files)
    return store


@cache
def pristine() -> dict[str, bytes]:
    """What the undamaged store loads, as bits by tensor."""
    return bits(holoray.open(store_of(blobs())).load())


def bits(tensors: dict[str, Array]) -> dict[str, bytes]:
    """Dtype, shape and bytes of each tensor: equal means bit-identical (NaN included)."""
    return {name: f"{a.dtype}{a.shape}".encode() + as_bytes(a).tobytes() for name, a in tensors.items()}


def load(store: Store) -> dict[str, bytes]:
    return bits(holoray.open(store).load())
