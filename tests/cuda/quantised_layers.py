"""Quantised layers made from integers that are known, packed word by word as the formats' descriptions say.

Plain Python on purpose: it shares no line with what unpacks. `Made.expected` is (q - zero) * scale in float32, rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from holoray.formats.quantised import Packing
from holoray.tensor import Array

AWQ_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which output of eight each nibble of a word holds."""


@dataclass(frozen=True)
class Made:
    """A layer: its packing, its tensors as `dequantise` takes them, and the integers behind them."""

    packing: Packing
    q: Array
    scales: Array
    zeros: Array | None
    order: npt.NDArray[np.int32] | None
    integers: npt.NDArray[np.int64]
    """[inputs, outputs]"""
    zero_integers: npt.NDArray[np.int64]
    """[groups, outputs]"""

    def expected(self, dtype: Any) -> Array:
        packing = self.packing
        group_of = [c // packing.group for c in range(packing.columns)] if self.order is None else self.order.tolist()
        scales = self.scales if packing.method == "int8" else self.scales.T
        out = np.zeros((packing.rows, packing.columns), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            for column, group in enumerate(group_of):
                difference = self.integers[column] - self.zero_integers[group]
                out[:, column] = difference.astype(np.float32) * scales[:, group].astype(np.float32)
            return out.astype(dtype)


def word(values: Sequence[int], bits: int) -> int:
    """One int32 of some integers, the first in the lowest bits."""
    total = sum(int(value) << bits * place for place, value in enumerate(values))
    return total - (1 << 32) if total >= 1 << 31 else total


def make_layer(
    method: str,
    rng: np.random.Generator,
    *,
    bits: int = 4,
    rows: int = 8,
    columns: int = 8,
    group: int = 8,
    zero_offset: int = 1,
    ordered: bool = False,
    scale_dtype: Any = np.float16,
    with_zeros: bool = True,
) -> Made:
    """A layer of random integers; `ordered`: with a random group for each input (not of `awq`)."""
    per_word = 32 // bits
    groups = -(-columns // group)
    order = rng.integers(0, groups, columns).astype(np.int32) if ordered else None
    if method == "int8":
        q = rng.integers(-128, 128, (columns, rows))
        z = rng.integers(-128, 128, (groups, rows)) if with_zeros else np.zeros((groups, rows), np.int64)
        scales = _scales(rng, (rows, groups), scale_dtype)
        packing = Packing("int8", 8, rows, columns, group)
        zeros = np.ascontiguousarray(z.T.astype(np.int8)) if with_zeros else None
        return Made(packing, np.ascontiguousarray(q.T.astype(np.int8)), scales, zeros, order, q, z)
    q = rng.integers(0, 1 << bits, (columns, rows))
    z = rng.integers(0, 1 << bits, (groups, rows))
    scales = _scales(rng, (groups, rows), scale_dtype)
    if method == "awq":
        eights = range(0, rows, 8)
        packed = [[word([line[r + n] for n in AWQ_NIBBLES], 4) for r in eights] for line in q.tolist()]
        packed_zeros = [[word([line[r + n] for n in AWQ_NIBBLES], 4) for r in eights] for line in z.tolist()]
        packing = Packing("awq", 4, rows, columns, group)
        return Made(packing, _int32(packed), scales, _int32(packed_zeros), None, q, z)
    packed = [[word(q[c : c + per_word, r].tolist(), bits) for r in range(rows)] for c in range(0, columns, per_word)]
    stored = (z - zero_offset) % (1 << bits)
    packed_zeros = [[word(line[r : r + per_word], bits) for r in range(0, rows, per_word)] for line in stored.tolist()]
    packing = Packing("gptq", bits, rows, columns, group, zero_offset)
    return Made(packing, _int32(packed), scales, _int32(packed_zeros), order, q, z)


def _int32(values: list[list[int]]) -> Array:
    return np.array(values, np.int32)


def _scales(rng: np.random.Generator, shape: tuple[int, int], dtype: Any) -> Array:
    return (0.02 * rng.standard_normal(shape)).astype(dtype)


@st.composite
def layers(draw: st.DrawFn, scale_dtypes: Sequence[Any]) -> Made:
    """Any layer of little more than a tile: odd shapes, all ways to pack, groups that do not divide the inputs."""
    method = draw(st.sampled_from(("gptq", "awq", "int8")))
    bits = {"awq": 4, "int8": 8}.get(method) or draw(st.sampled_from((2, 4, 8)))
    per_word = 32 // bits
    many = st.integers(1, 20) if method != "int8" else st.integers(1, 90)
    rows = draw(many) * (1 if method == "int8" else per_word)
    columns = draw(many) * per_word if method == "gptq" else draw(st.integers(1, 150))
    group = draw(st.sampled_from((1, 3, 8, 32, 64, columns)))
    return make_layer(
        method,
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        bits=bits,
        rows=rows,
        columns=columns,
        group=min(group, columns),
        zero_offset=draw(st.sampled_from((0, 1))),
        ordered=method != "awq" and draw(st.booleans()),
        scale_dtype=draw(st.sampled_from(scale_dtypes)),
        with_zeros=draw(st.booleans()),
    )
