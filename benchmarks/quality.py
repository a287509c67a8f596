"""Bytes against usefulness on real weights: our codecs beside rounding, a BitStack-like coder and ZipNN.

python -m benchmarks.quality [--json FILE] [--plot FILE.png]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

import holoray
import minilm
from benchmarks import coders
from benchmarks.measure import machine
from benchmarks.quality_tables import tables
from benchmarks.yardstick import IN_ORDER, RIVAL, SHARES, SUBSET, Point, Yardstick
from holoray.codecs.base import present_with_prerequisites
from holoray.kernels.registry import make_accumulator
from holoray.kernels.scratch import Scratch
from holoray.pipelines.sealed_store import SealedStore
from holoray.stores.base import fragment_file
from holoray.tensor import Array

BETWEEN: Final = (0.1875, 0.3125, 0.6, 1.5)
"""More shares for ours, so that the picture shows the way between."""
EIGHTHS: Final = (1, 2, 3, 4, 7)
SEEDS: Final = (0, 1)


@dataclass(frozen=True)
class Coder:
    """One of ours, as `holoray.encode` takes it."""

    label: str
    codec: str
    options: Mapping[str, Any] = field(default_factory=dict)


CODERS: Final = (
    Coder("planes", "planes"),
    Coder("raw", "raw"),
    Coder("spectral, float32", "spectral"),
    Coder("spectral, float16", "spectral", {"coefficients": "float16"}),
    Coder("spectral, float16, essential .3", "spectral", {"coefficients": "float16", "essential": 0.3}),
    Coder("projection, float16", "projection", {"coefficients": "float16"}),
    Coder("lowrank, float16", "lowrank", {"coefficients": "float16"}),
    Coder("lowrank, float16, essential .3", "lowrank", {"coefficients": "float16", "essential": 0.3}),
)


def measure(yardstick: Yardstick, chosen: Iterable[Coder] = CODERS) -> Iterator[Point]:
    """Every point: ours in streaming order and as random subsets, then the rivals."""
    for coder in chosen:
        store = holoray.MemoryStore()
        holoray.encode(minilm.weights_path(), store, codec=coder.codec, dtype="bf16", **coder.options)
        sealed = holoray.open(store)
        yield from _in_order(yardstick, coder, sealed)
        yield from _subsets(yardstick, coder, sealed)
    yield from _rounded(yardstick)
    yield from _residual_terms(yardstick)
    yield from _zipnn(yardstick)


def _point(
    yardstick: Yardstick, coder: str, kind: str, nbytes: int, weights: dict[str, Array], eighths: int = 0
) -> Point:
    return Point(coder, kind, nbytes, nbytes / yardstick.nbytes, yardstick.score(weights), eighths)


def _in_order(yardstick: Yardstick, coder: Coder, sealed: SealedStore) -> Iterator[Point]:
    """The best that so many bytes of the stream give, and the whole store."""
    complete = sealed.curve().nbytes[-1]
    budgets = [int(share * yardstick.nbytes) for share in sorted((*SHARES, *BETWEEN))]
    done = 0
    for budget in [*(b for b in budgets if b < complete), complete]:
        loader = sealed.loader()
        loader.load(holoray.Target(bytes=budget))
        if loader.bytes_read > done:
            done = loader.bytes_read
            yield _point(yardstick, coder.label, IN_ORDER, done, loader.state_dict())


def _subsets(yardstick: Yardstick, coder: Coder, sealed: SealedStore) -> Iterator[Point]:
    """Some eighths of each tensor's fragments at random; the mandatory tensors are always there.

    Of n fragments, k n / 8 are drawn for k eighths, rounded up or down at random. What lacks its prerequisites is
    read in vain.
    """
    for eighths in EIGHTHS:
        for seed in SEEDS:
            rng = random.Random(8 * seed + eighths)
            subset = {}
            for entry in sealed.manifest.tensors:
                n = len(entry.fragments)
                count = n if entry.mandatory else math.floor(eighths / 8 * n + rng.random())
                subset[entry.name] = rng.sample(range(n), count)
            yield _point(yardstick, coder.label, SUBSET, *_load_subset(sealed, subset), eighths)


def _load_subset(sealed: SealedStore, subset: Mapping[str, list[int]]) -> tuple[int, dict[str, Array]]:
    """Bytes read (with the manifest) and weights from any fragments: what a worker does with what reaches it."""
    nbytes, weights, scratch = len(sealed.manifest.encoded), {}, Scratch()
    for entry, codec in zip(sealed.manifest.tensors, sealed.manifest.codecs, strict=True):
        accumulator = make_accumulator(entry.spec, codec, np.zeros(entry.spec.shape, entry.spec.numpy_dtype))
        for index in sorted(present_with_prerequisites(codec, entry.spec, frozenset(subset[entry.name]))):
            known = entry.fragments[index]
            payload = bytearray(known.stored_bytes)
            sealed.store.read_into(fragment_file(known.file), known.offset, memoryview(payload))
            accumulator.accumulate(known.slot, accumulator.decompress([known], [payload], scratch), scratch)
        accumulator.finalize()
        weights[entry.name] = accumulator.out
        nbytes += sum(entry.fragments[index].stored_bytes for index in subset[entry.name])
    return nbytes, weights


def _rounded(yardstick: Yardstick) -> Iterator[Point]:
    """Integers, and a start from two checkpoints: 8-bit integers, then the whole bf16 checkpoint."""
    for bits in (4, 8):
        coded = {n: coders.round_to_nearest(w, bits) for n, w in yardstick.matrices.items()}
        nbytes = yardstick.rest_nbytes + sum(c.nbytes for c in coded.values())
        point = _point(yardstick, f"int{bits}, groups of 128", RIVAL, nbytes, {n: c.decode() for n, c in coded.items()})
        yield point
    yield Point("int8, then bf16", RIVAL, point.bytes, point.share, point.score)
    yield _point(yardstick, "int8, then bf16", RIVAL, nbytes + yardstick.nbytes, {})


def _residual_terms(yardstick: Yardstick) -> Iterator[Point]:
    """The BitStack-like coder, streamed by gain per byte."""
    matrices = yardstick.matrices
    terms = {n: coders.residual_terms(w, 2 * w.size) for n, w in matrices.items()}
    weights = {n: np.zeros_like(w) for n, w in matrices.items()}
    nbytes, budgets = yardstick.rest_nbytes, [share * yardstick.nbytes for share in SHARES]
    for name, term in coders.by_gain_per_byte(terms):
        while budgets and nbytes + term.nbytes > budgets[0]:
            budgets.pop(0)
            yield _point(yardstick, "BitStack-like", RIVAL, nbytes, weights)
        weights[name] += term.decode()
        nbytes += term.nbytes
    yield _point(yardstick, "BitStack-like", RIVAL, nbytes, weights)


def _zipnn(yardstick: Yardstick) -> Iterator[Point]:
    coded = coders.zipnn_bytes([yardstick.weights[n] for n in yardstick.matrices])
    if coded is not None:
        yield _point(yardstick, "ZipNN", RIVAL, yardstick.rest_nbytes + coded, {})


def report(json_file: Path | None = None, plot_file: Path | None = None) -> str:
    """Measure everything; the tables as markdown, and where asked for the points as JSON and as a picture."""
    start = time.perf_counter()
    yardstick = Yardstick()
    points = list(measure(yardstick))
    seconds = time.perf_counter() - start
    if json_file is not None:
        values = {"machine": machine(), "bf16_bytes": yardstick.nbytes, "sentences": len(yardstick.sentences)}
        rows = {"seconds": round(seconds, 1), "points": [asdict(p) for p in points]}
        json_file.write_text(json.dumps(values | rows, indent=1) + "\n", encoding="utf-8")
    if plot_file is not None:
        from benchmarks.quality_plot import draw

        draw(points, plot_file)
    return tables(points, yardstick.nbytes, len(yardstick.sentences), seconds)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="also write the points to this file")
    parser.add_argument("--plot", type=Path, help="also draw them into this file (needs matplotlib)")
    arguments = parser.parse_args()
    print(f"{machine()}\n")
    print(report(arguments.json, arguments.plot))


if __name__ == "__main__":
    main()
