"""Loading and encoding whole stores, from the page cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
from safetensors import safe_open

import holoray
from benchmarks.measure import Row, beside, best
from holoray.checkpoint import save_checkpoint
from holoray.pipelines import fragment_pipeline
from holoray.pipelines.api import load_file
from holoray.pipelines.sealed_store import SealedStore
from holoray.tensor import Array

MODEL_BYTES = 256 << 20


def gaussian_model(nbytes: int = MODEL_BYTES, matrices: int = 8) -> dict[str, Array]:
    """bf16 matrices of normal values."""
    rng = np.random.default_rng(0)
    rows = nbytes // 2 // matrices // 4096
    return {
        f"layers.{i}.weight": (0.02 * rng.standard_normal((rows, 4096), np.float32)).astype(ml_dtypes.bfloat16)
        for i in range(matrices)
    }


def measure(directory: Path, repeat: int) -> Iterator[Row]:
    """Rows for `raw` and `planes` loads beside safetensors, what verification costs, encoding, and file output."""
    model = gaussian_model()
    nbytes = sum(a.nbytes for a in model.values())
    checkpoint = directory / "model.safetensors"
    save_checkpoint(checkpoint, model)
    map_and_clone = partial(_map_and_clone, checkpoint)
    yield Row("safetensors: map and clone", nbytes / best(map_and_clone, repeat) / 1e9)
    by_hand = partial(_copy_to_large_pages, checkpoint)
    yield beside("the same by hand, into large pages", nbytes, by_hand, map_and_clone, repeat, to="safetensors")
    for codec, aim in (("raw", ">= 1.3"), ("planes", "")):
        encode = partial(holoray.encode, checkpoint, directory / codec, codec=codec, overwrite=True)
        yield Row(f"encode {codec}", nbytes / best(encode, 2) / 1e9, aim=">= .25 GB/s" if codec == "planes" else "")
        sealed = holoray.open(directory / codec)
        yield beside(f"load {codec}", nbytes, sealed.load, map_and_clone, repeat, to="safetensors", aim=aim)
        unverified = partial(load_unverified, sealed)
        yield beside(f"load {codec}", nbytes, sealed.load, unverified, repeat, to="unverified", aim=">= .9")
    sealed = holoray.open(directory / "planes")
    out = directory / "out.safetensors"
    others: dict[str, Callable[[], object]] = {
        "load planes, sha256 as well": holoray.open(directory / "planes", expect=sealed.root).load,
        "load planes, two layers": partial(sealed.load, fragments=(0, 1)),
        "load planes to a file, synced": partial(load_file, sealed, out),
        "verify planes (sha256 of everything)": sealed.verify,
    }
    for name, run in others.items():
        yield beside(name, nbytes, run, map_and_clone, repeat, to="safetensors")


def fragment_counts(repeat: int) -> Iterator[Row]:
    """How `spectral` scales with the number of fragments: 64 MiB of f32 weights, load from memory."""
    array: Mapping[str, Array] = {"w": np.random.default_rng(0).standard_normal((4096, 4096), np.float32)}
    nbytes = array["w"].nbytes
    first = 0.0
    for fragments in (8, 64, 512):
        store = holoray.MemoryStore()
        holoray.encode(array, store, codec="spectral", fragments=fragments)
        rate = nbytes / best(holoray.open(store).load, repeat) / 1e9
        first = first or rate
        yield Row(f"load spectral, {fragments} fragments", rate, rate / first, "8 fragments")


def _map_and_clone(path: Path) -> dict[str, Array]:
    """Every tensor as the package takes it from its map, and a copy of it."""
    with safe_open(path, framework="np") as file:
        return {name: np.array(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - not a dict


def _copy_to_large_pages(path: Path) -> dict[str, Array]:
    """The fastest that a copy out of a map gets on one thread: NumPy asks for large pages, the package does not."""
    mapped = np.memmap(path, np.uint8, "r")
    header_bytes = int(mapped[:8].view("<u8")[0])
    header = json.loads(mapped[8 : 8 + header_bytes].tobytes())
    data = mapped[8 + header_bytes :]
    return {name: np.array(data[slice(*entry["data_offsets"])]) for name, entry in header.items()}


def load_unverified(sealed: SealedStore) -> None:
    """The same load with the digest check replaced by nothing."""
    # Not a Mock: that would keep every payload it was called with, and so all memory, alive.
    with mock.patch.object(fragment_pipeline, "check_integrity", new=_accept):
        sealed.load()


def _accept(*_: object, **__: object) -> None:
    """Every fragment is fine."""
