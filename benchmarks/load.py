"""Loading and encoding whole stores, from the page cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
from safetensors import safe_open

import holoray
from benchmarks.measure import Row, best
from holoray.checkpoint import save_checkpoint
from holoray.pipelines import fragment_pipeline
from holoray.pipelines.plan import Target
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
    reference = nbytes / best(lambda: _mmap_and_clone(checkpoint), repeat) / 1e9
    yield Row("safetensors: map and clone", reference)
    for codec, aim in (("raw", ">= 1.3"), ("planes", "")):
        store = directory / codec
        seconds = best(lambda: holoray.encode(checkpoint, store, codec=codec, overwrite=True), 2)  # noqa: B023
        yield Row(f"encode {codec}", nbytes / seconds / 1e9, aim=">= .25 GB/s" if codec == "planes" else "")
        sealed = holoray.open(store)
        rate = nbytes / best(sealed.load, repeat) / 1e9
        yield Row(f"load {codec}", rate, rate / reference, "safetensors", aim)
        unverified = nbytes / best(lambda: _load_unverified(sealed), repeat) / 1e9  # noqa: B023
        yield Row(f"load {codec}, unverified", unverified, rate / unverified, "(verified / unverified)", ">= .9")
    yield from _planes_details(directory / "planes", directory, nbytes, reference, repeat)


def _planes_details(store: Path, directory: Path, nbytes: int, reference: float, repeat: int) -> Iterator[Row]:
    sealed = holoray.open(store)
    strict = holoray.open(store, expect=sealed.root)
    rate = nbytes / best(strict.load, repeat) / 1e9
    yield Row("load planes, sha256 as well", rate, rate / reference, "safetensors")
    usable = nbytes / best(lambda: sealed.load(fragments=(0, 1)), repeat) / 1e9
    yield Row("load planes, two layers", usable, usable / reference, "safetensors")
    to_file = nbytes / best(lambda: _to_file(sealed, directory / "out.safetensors"), repeat) / 1e9
    yield Row("load planes to a file (written and synced)", to_file, to_file / reference, "safetensors")
    verified = nbytes / best(sealed.verify, repeat) / 1e9
    yield Row("verify planes (sha256 of everything)", verified, verified / reference, "safetensors")


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


def _mmap_and_clone(path: Path) -> dict[str, Array]:
    with safe_open(path, "numpy") as file:
        # The reference gives no bfloat16 to NumPy: read the same bytes through its own mapping.
        raw = np.memmap(path, np.uint8, "r")
        header = int(raw[:8].view("<u8")[0])
        data = raw[8 + header :]
        return {name: np.array(data[start:stop]) for name, (start, stop) in _ranges(path, list(file.keys())).items()}


def _ranges(path: Path, names: list[str]) -> dict[str, tuple[int, int]]:
    import json

    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: tuple(header[name]["data_offsets"]) for name in names}


def _load_unverified(sealed: SealedStore) -> None:
    """The same load with the digest check replaced by nothing."""
    with mock.patch.object(fragment_pipeline, "check_integrity"):
        sealed.load()


def _to_file(sealed: SealedStore, path: Path) -> None:
    from holoray.pipelines.api import load_file

    load_file(sealed, path, Target())
