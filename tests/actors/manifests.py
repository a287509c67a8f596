"""Manifests for the simulator: tensors of all kinds of codecs, with random sizes and gains, without any bytes."""

from __future__ import annotations

import random

from holoray.fragment import NO_PREREQUISITE, FragmentEntry, TensorEntry
from holoray.manifest import Manifest
from holoray.pipelines.plan import with_streaming_order
from holoray.tensor import TensorSpec


def make_manifest(seed: int) -> Manifest:
    """Tensors of all three kinds, with random sizes and gains."""
    rng = random.Random(seed)
    tensors = tuple(_tensor(rng, t, ("raw", "planes", "spectral")[t % 3]) for t in range(rng.randint(1, 7)))
    return Manifest(with_streaming_order(tensors), (), {}, {})


def _tensor(rng: random.Random, number: int, codec: str) -> TensorEntry:
    slots, layers = rng.randint(1, 5), 6 if codec == "planes" else 1
    fragments = [
        FragmentEntry(
            index=layer * slots + slot,
            layer=layer,
            slot=slot,
            requires=(layer - 1) * slots + slot if layer else NO_PREREQUISITE,
            compression="none",
            stored_bytes=rng.randint(1, 4000),
            raw_bytes=1,
            gain=rng.uniform(0.5, 1.0) * 4.0**-layer,
            xxh3_64=0,
            sha256=b"",
        )
        for layer in range(layers)
        for slot in range(slots)
    ]
    config: dict[str, object] = {}
    if codec == "planes":
        config = {"threshold": 120, "top": 1, "tail_cut": -6}
    if codec == "spectral":
        own = {"fragments": slots, "seed": 0, "tile": 0, "exponent": 0, "shifts": ""}
        config = own | {"essential": 1, "coefficients": "float32"}
    essential_gain = rng.uniform(0.0, 2.0) if codec == "spectral" else 0.0
    spec = TensorSpec(f"t{number}", "F32", (slots << 10,))
    return TensorEntry(spec, codec, config, 0.0, codec == "raw", b"", tuple(fragments), essential_gain)
