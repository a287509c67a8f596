"""What `planes` fragments mean, in plain NumPy: slow, and written to be checked by eye.

All arrays are in *rank order*: a plane of a group is 256 little-endian u16 words, bit j of word i belongs to weight
j * 256 + i of the group, and ranks count the bits as they lie in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from holoray.codecs import planes_layout as lay
from holoray.codecs.planes_layout import BLOCK, GROUP, RUN, LayerLayout
from holoray.errors import FormatError
from holoray.tensor import Array, TensorSpec

Words = npt.NDArray[np.uint16]
Digits = npt.NDArray[np.uint32]
Mask = npt.NDArray[np.bool_]

LONE_DIGIT: Final = 1.4609375
"""What a weight reads whose only known digit is its leading 1: the centroid of [1, 2) for a Laplacian."""
HALF_BIAS: Final = 112
"""Difference of the exponent biases of bfloat16 and float16."""


def decode_tensor(
    spec: TensorSpec,
    threshold: int,
    top: int,
    tail_cut: int,
    bodies: Sequence[Sequence[tuple[LayerLayout, memoryview]]],
) -> Array:
    """The tensor from the bodies of the layers that each run has, from layer 0 on without a gap."""
    out = np.zeros(spec.size, np.uint32 if spec.dtype == "F32" else np.uint16)
    for slot, layers in enumerate(bodies):
        if layers:
            part = out[slot * RUN : (slot + 1) * RUN]
            part[:] = _Run(spec.dtype, threshold, top, tail_cut, part.size, layers).decode()
    return out.view(spec.numpy_dtype).reshape(spec.shape)


def natural_places(count: int) -> npt.NDArray[np.int64]:
    """For every rank of a run of `count` weights (padded to whole groups), the place of its weight."""
    places = np.arange(lay.groups(count) * GROUP, dtype=np.int64)
    return places.reshape(-1, 16, 256).transpose(0, 2, 1).reshape(-1)


def value_words(digits: Digits, exponent: int, *, filled: bool) -> Words:
    """The top 16 bits of float32(digits + 1/2) * 2^(exponent - 127), 0 where there are no digits."""
    value = digits.astype(np.float32)
    if filled:
        value = np.where(digits == 1, np.float32(LONE_DIGIT), value + np.float32(0.5))
    bits = np.ldexp(value, exponent - 127).astype(np.float32).view(np.uint32)
    return np.where(digits > 0, bits >> 16, 0).astype(np.uint16)


def half_bits(words: npt.NDArray[Any]) -> Words:
    """The float16 bits of words (normal numbers and +0)."""
    magnitude = words & np.uint16(0x7FFF)
    shifted = (magnitude - np.uint16(HALF_BIAS << 7)) << np.uint16(3)
    return np.where(magnitude > 0, (words & np.uint16(0x8000)) | shifted, 0).astype(np.uint16)


class _Run:
    """One run under reconstruction."""

    def __init__(
        self,
        dtype: str,
        threshold: int,
        top: int,
        tail_cut: int,
        count: int,
        layers: Sequence[tuple[LayerLayout, memoryview]],
    ) -> None:
        self.dtype = dtype
        self.threshold = threshold
        self.top = top
        self.tail_cut = tail_cut
        self.count = count
        self.layers = len(layers)
        self.raw: dict[int, npt.NDArray[np.uint8]] = {}
        self.offsets = np.zeros((lay.STREAMS, lay.blocks(count) + 1), np.int64)
        for layout, body in layers:
            sections, rows = lay.parse_body(layout, body)
            self.offsets[slice(*layout.streams)] = rows
            for section in sections:
                self.raw[section.place] = np.frombuffer(lay.raw_section(body, section), np.uint8)

    def decode(self) -> npt.NDArray[Any]:
        """The bits of the run's weights, uint16[count] or uint32[count]."""
        places = natural_places(self.count)
        size = places.size
        digits, negative = np.zeros(size, np.uint32), np.zeros(size, np.bool_)
        for layer in range(min(self.layers, lay.TAIL)):
            digits = self._add_layer(layer, digits, negative)
        significant = digits > 0
        whole = self.layers > lay.TAIL
        if whole:
            exponent, digits = self.threshold + self.tail_cut - 7, self._add_tail(digits)
        else:
            exponent = self.threshold + (*lay.FIRST_CUTS, self.tail_cut)[self.layers - 1]
        words = value_words(digits, exponent, filled=not whole)
        words |= (negative & significant).astype(np.uint16) << 15
        low = np.zeros(size, np.uint16)
        if self.dtype == "F16":
            words = half_bits(words)
            for p in range(lay.HALF_PLANES if whole else 0):
                low = low << np.uint16(1) | self._bits(lay.HALF_PLANE + p)
            words |= low
        outliers, values = self._outliers()
        is_outlier = np.zeros(size, np.bool_)
        is_outlier[outliers] = True
        if whole:
            below = ~significant & ~is_outlier[places] & (places < self.count)
            words[below] = self._below(below, low[below])
        natural = np.zeros(size, np.uint16)
        natural[places] = words
        natural[outliers] = values
        return self._with_low_bits(natural[: self.count])

    def _bits(self, place: int) -> npt.NDArray[np.uint8]:
        return np.unpackbits(self.raw[place], bitorder="little")

    def _counts(self, mask: Mask, stream: int) -> int:
        """How many are in `mask`; raises FormatError unless the offset row says the same block by block."""
        ends = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
        at = np.minimum(np.arange(self.offsets.shape[1]) * BLOCK, mask.size)
        if not np.array_equal(ends[at], self.offsets[stream]):
            raise FormatError("planes: a stream is longer or shorter than its block")
        return int(ends[-1])

    def _compacted(self, place: int, stream: int, mask: Mask) -> npt.NDArray[np.uint8]:
        """The bits of a compacted stream, one for each weight in `mask`."""
        count = self._counts(mask, stream)
        if self.raw[place].size != -(-count // 8):
            raise FormatError("planes: a stream has another length than its offsets say")
        return self._bits(place)[:count]

    def _add_layer(self, layer: int, digits: Digits, negative: Mask) -> Digits:
        """The digits with those of a layer appended; `negative` takes the signs of the newly significant."""
        known = digits > 0
        for p in lay.planes_of(self.top, self.tail_cut, layer):
            digits = digits << np.uint32(1) | self._bits(lay.PLANE + p)
        newly = (digits > 0) & ~known
        negative[newly] = self._compacted(lay.SIGNS + layer, lay.STREAM_SIGNS[layer], newly)
        return digits

    def _add_tail(self, digits: Digits) -> Digits:
        """The digits with the seven of the tail appended: of weights with fewer than 8 known digits."""
        full = digits
        for r in range(1, lay.TAIL_PLANES + 1):
            takers = (digits > 0) & (digits >> (8 - r) == 0)
            full = full << np.uint32(1)
            full[takers] |= self._compacted(lay.TAIL_BITS + r - 1, lay.STREAM_TAIL + r - 1, takers)
        return full

    def _outliers(self) -> tuple[npt.NDArray[np.int64], Words]:
        """Places in the run and bits of the outliers."""
        starts = self.offsets[lay.STREAM_OUTLIERS]
        inside = self.raw[lay.OUTLIER_PLACES].view("<u2").astype(np.int64)
        values = self.raw[lay.OUTLIER_VALUES].view("<u2")
        if inside.size != values.size or starts[0] != 0 or starts[-1] != values.size or np.any(np.diff(starts) < 0):
            raise FormatError("planes: outliers are not where their offsets say")
        places = inside + np.repeat(np.arange(starts.size - 1) * BLOCK, np.diff(starts))
        if np.any(np.diff(places // GROUP) < 0) or np.any(places >= self.count):
            raise FormatError("planes: outliers are out of order or out of range")
        return places, values

    def _below(self, below: Mask, low: Words) -> Words:
        """The bits of the weights below the tail cut: 12-bit records, and escapes among them."""
        count = self._counts(below, lay.STREAM_RECORDS)
        if self.raw[lay.RECORDS].size != -(-lay.RECORD_BITS * count // 8):
            raise FormatError("planes: records have another length than their offsets say")
        digits = self._bits(lay.RECORDS)[: lay.RECORD_BITS * count].reshape(count, lay.RECORD_BITS)
        records = digits @ (1 << np.arange(lay.RECORD_BITS, dtype=np.int64))
        distance = records & 15
        exponent = self.threshold + self.tail_cut - 1 - distance
        bits = (records >> 11) << 15 | (exponent << 7) & 0x7FFF | (records >> 4) & 127
        words: Words = bits.astype(np.uint16)
        if self.dtype == "F16":
            words = half_bits(words) | low
        escaped = np.zeros(below.size, np.bool_)
        escaped[below] = distance == lay.ESCAPE
        values = self.raw[lay.ESCAPES].view("<u2")
        if self._counts(escaped, lay.STREAM_ESCAPES) != values.size:
            raise FormatError("planes: escapes have another length than their offsets say")
        words[distance == lay.ESCAPE] = values
        return words

    def _with_low_bits(self, words: Words) -> npt.NDArray[Any]:
        if self.dtype != "F32":
            return words
        full = words.astype(np.uint32) << 16
        if self.layers > lay.LOW:
            full |= self.raw[lay.LOW_BITS].view("<u2")
        return full
