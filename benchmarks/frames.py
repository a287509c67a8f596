"""Which share of a store's bytes are zstd frames: what a device's decompressor could take over from the host.

python -m benchmarks.frames [--weights 2^25]

Counted from the payloads: whole fragments of `raw` and the transforms, sections of `planes`. Sections in the density
code of `planes` (ADR 0013) are no frames.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

import holoray
from benchmarks.planes import minilm
from holoray.codecs import planes_layout as lay
from holoray.codecs.planes import PlanesCodec
from holoray.compression import ZSTD
from holoray.pipelines.sealed_store import SealedStore
from holoray.stores import MemoryStore, fragment_file
from holoray.tensor import DTYPES, Array

CODECS = ("planes", "raw", "spectral", "projection", "lowrank")


@dataclass(frozen=True, slots=True)
class Frames:
    """Bytes of a store's fragments, of frames in them as they are stored, and of what these hold; how many they are."""

    stored_bytes: int
    frame_bytes: int
    raw_bytes: int
    count: int


def count_frames(sealed: SealedStore) -> Frames:
    """Looks into every fragment."""
    frames = list(_frames(sealed))
    stored = sum(tensor.stored_bytes for tensor in sealed.manifest.tensors)
    return Frames(stored, sum(small for small, _ in frames), sum(raw for _, raw in frames), len(frames))


def _frames(sealed: SealedStore) -> Iterator[tuple[int, int]]:
    """Stored and raw bytes of each frame."""
    for tensor, codec in zip(sealed.manifest.tensors, sealed.manifest.codecs, strict=True):
        for entry in tensor.fragments:
            if not isinstance(codec, PlanesCodec):
                if entry.compression == ZSTD:
                    yield entry.stored_bytes, entry.raw_bytes
                continue
            body = bytearray(entry.stored_bytes)
            sealed.store.read_into(fragment_file(entry.file), entry.offset, memoryview(body))
            sections, _ = lay.parse_body(codec.layout(tensor.spec, entry.layer, entry.slot), memoryview(body))
            yield from ((s.end - s.start, s.raw_bytes) for s in sections if s.compression == ZSTD)


def gaussian(weights: int) -> dict[str, Array]:
    """BF16 weights of one matrix."""
    rng = np.random.default_rng(0)
    return {"w": (0.02 * rng.standard_normal((1024, weights // 1024), np.float32)).astype(DTYPES["BF16"])}


def measure(model: Mapping[str, Array], codec: str, dtype: str | None) -> Frames:
    store = MemoryStore()
    holoray.encode(model, store, codec=codec, dtype=dtype)
    return count_frames(holoray.open(store))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--weights", type=int, default=1 << 25)
    models: dict[str, tuple[dict[str, Array], str | None]] = {
        "Gaussian BF16": (gaussian(parser.parse_args().weights), None)
    }
    models |= {f"MiniLM {dtype}": (minilm(), dtype) for dtype in ("bf16", "f32")}
    for name, (model, dtype) in models.items():
        for codec in CODECS if name.startswith("MiniLM") else CODECS[:2]:
            frames = measure(model, codec, dtype)
            share = frames.frame_bytes / frames.stored_bytes
            print(
                f"{name:<14} {codec:<11} {frames.count:6} frames, {share:8.4%} of {frames.stored_bytes / 1e6:.1f} MB, "
                f"{frames.raw_bytes / 1e6:.2f} MB raw"
            )


if __name__ == "__main__":
    main()
