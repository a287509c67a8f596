"""Tensors and helpers that the tests of `planes` share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from holoray.codecs.planes import PlanesCodec
from holoray.fragment import FragmentEntry
from holoray.kernels.bits import HARDWARE
from holoray.kernels.encoder import EncodeOptions
from holoray.kernels.planes_decode import PlanesAccumulator
from holoray.kernels.planes_encode import PlanesEncoder
from holoray.kernels.scratch import Scratch
from holoray.tensor import DTYPES, Array, TensorSpec

UNSIGNED: dict[str, Any] = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}


class Case:
    """One encoded tensor."""

    def __init__(
        self,
        dtype: str,
        bits: Array,
        codec: PlanesCodec | None = None,
        *,
        compression: str = "zstd",
        hardware: bool = HARDWARE,
    ) -> None:
        self.bits = bits
        self.array = bits.view(DTYPES[dtype])
        self.spec = TensorSpec("weights", dtype, self.array.shape)
        options = EncodeOptions(compression=compression)
        encoder = PlanesEncoder(self.spec, self.array, options, codec=codec, hardware=hardware)
        fragments = [fragment for part in range(encoder.parts) for fragment in encoder.encode(part)]
        self.codec = encoder.codec
        self.runs = encoder.parts
        self.layers = self.codec.layers(self.spec)
        self.payloads = {f.index: f.payload for f in fragments}
        self.gains = {f.index: f.gain for f in fragments}
        self.entries = {
            f.index: FragmentEntry(
                f.index, f.layer, f.slot, f.requires, f.compression, len(f.payload), f.raw_bytes, f.gain, 0, b""
            )
            for f in fragments
        }

    def upto(self, layers: int, slot: int | None = None, *, first: int = 0) -> list[int]:
        """Indices of layers first..layers-1, of one run or of all."""
        slots = range(self.runs) if slot is None else [slot]
        return [layer * self.runs + s for layer in range(first, layers) for s in slots]

    def oracle(self, layers: int) -> Array:
        """The bits that the oracle gives for the first layers."""
        payloads = {index: self.payloads[index] for index in self.upto(layers)}
        return self.codec.decode(self.spec, payloads).view(UNSIGNED[self.spec.dtype])

    def accumulator(self, *, hardware: bool = HARDWARE) -> PlanesAccumulator:
        out = np.zeros(self.array.shape, self.array.dtype)
        return PlanesAccumulator(self.spec, self.codec, out, hardware=hardware)

    def add(self, accumulator: PlanesAccumulator, indices: Iterable[int], scratch: Scratch) -> None:
        """Add fragments of one run in one call."""
        chosen = list(indices)
        entries = [self.entries[i] for i in chosen]
        ready = accumulator.decompress(entries, [self.payloads[i] for i in chosen], scratch)
        accumulator.accumulate(entries[0].slot, ready, scratch)

    def decoded(self, layers: int, *, hardware: bool = HARDWARE) -> Array:
        """The bits that the kernels give from scratch for the first layers."""
        accumulator = self.accumulator(hardware=hardware)
        for slot in range(self.runs):
            self.add(accumulator, self.upto(layers, slot), Scratch())
        return bits_of(accumulator)

    def error(self, layers: int) -> tuple[float, float]:
        """Squared error of the first layers over finite elements, and the tensor's energy."""
        with np.errstate(all="ignore"):
            true = self.array.astype(np.float64)
            finite = np.isfinite(true)
            read = self.oracle(layers).view(self.array.dtype).astype(np.float64) if layers else np.zeros_like(true)
        return float(((true[finite] - read[finite]) ** 2).sum()), float((true[finite] ** 2).sum())


def bits_of(accumulator: PlanesAccumulator) -> Array:
    return accumulator.out.view(UNSIGNED[accumulator.spec.dtype])


def gaussian(dtype: str, count: int, scale: float = 0.02, seed: int = 0) -> Array:
    values = np.random.default_rng(seed).standard_normal(count, np.float32) * np.float32(scale)
    with np.errstate(all="ignore"):
        return values.astype(DTYPES[dtype]).view(UNSIGNED[dtype])


def every_pattern(dtype: str) -> Array:
    return np.random.default_rng(0).permutation(np.arange(65536, dtype=np.uint16))


def random_floats(count: int) -> Array:
    """Any bit patterns, and the special ones several times each."""
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2**32, count, dtype=np.uint32)
    special = np.array(
        [0, 1 << 31, 1, 0x80000001, 0x007FFFFF, 0x7F800000, 0xFF800000, 0x7FC00001, 0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF],
        np.uint32,
    )
    bits[rng.integers(0, count, count // 3)] = rng.choice(special, count // 3)
    return bits


def sparse(dtype: str, count: int) -> Array:
    bits = gaussian(dtype, count, seed=3)
    bits[np.random.default_rng(4).random(count) < 0.9] = 0
    return bits


def with_outliers(dtype: str, count: int) -> Array:
    """Weights far apart: most in two binades, some planted well above, a few well below."""
    rng = np.random.default_rng(5)
    values = rng.choice([-1.0, 1.0], count) * rng.uniform(1, 4, count)
    values[rng.integers(0, count, count // 900 + 1)] *= 2000
    values[rng.integers(0, count, count // 50 + 1)] *= 1e-3
    return values.astype(DTYPES[dtype]).view(UNSIGNED[dtype])


SHAPES: dict[str, Callable[[str], Array]] = {
    "gaussian": lambda dtype: gaussian(dtype, 70_000),
    "wide": lambda dtype: gaussian(dtype, 4096, 900.0),
    "tiny": lambda dtype: gaussian(dtype, 5000, 3e-5),
    "zeros": lambda dtype: np.zeros(70_000, UNSIGNED[dtype]),
    "constant": lambda dtype: np.full(9000, -0.3).astype(DTYPES[dtype]).view(UNSIGNED[dtype]),
    "sparse": lambda dtype: sparse(dtype, 70_000),
    "outliers": lambda dtype: with_outliers(dtype, 70_000),
    "patterns": lambda dtype: random_floats(70_000) if dtype == "F32" else every_pattern(dtype),
}
