"""Encoding a tensor as `planes`: choose its configuration from a histogram of exponents, then run by run."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from holoray.codecs import planes_layout as lay
from holoray.codecs.planes import (
    MAX_PLANES,
    MAX_TAIL_CUT,
    MIN_TAIL_CUT,
    MIN_TOP,
    WORD_RANGES,
    PlanesCodec,
)
from holoray.codecs.planes_density import CHUNK
from holoray.compression import NONE, compress
from holoray.errors import UsageError
from holoray.fragment import NO_PREREQUISITE
from holoray.kernels.bits import HARDWARE
from holoray.kernels.encoder import EncodedFragment, EncodeOptions, Encoder
from holoray.kernels.planes_density import SLACK as SLACK_BYTES
from holoray.kernels.planes_density import TOO_LARGE, density, encode_section, encoding_tables
from holoray.kernels.planes_groups import F32, KINDS
from holoray.kernels.planes_pack import (
    ENCODE_ROWS,
    ERRORS,
    LANES,
    MAGNITUDES,
    SLACK,
    encode_run,
    error_sums,
    error_table,
    exponent_histogram,
)
from holoray.tensor import Array, TensorSpec, as_bytes, canonical

OUTLIER_SHARE: Final = 0.0015
"""Planes above which fewer weights than this lie cost more than 32 bits for each of those weights."""
MIN_PLANE_SAVING: Final = 0.025
"""Planes are coded where that saves at least this share: less costs more time at load than the bytes are worth."""
MIN_SECTION_SAVING: Final = 0.1
"""The same for other sections, which zstd decodes more slowly."""
_LEAST_DENSITY: Final = 2
"""Below this density of ones (in 1/128) zstd's matches beat a codeword a byte."""
MAX_TOP: Final = 7
MEAN_SQUARE: Final = 7 / 3
"""Of a mantissa spread evenly over [1, 2)."""

Histogram = npt.NDArray[np.int64]


class PlanesEncoder(Encoder):
    """One part a run. `codec` is chosen for the least predicted bytes unless one is given."""

    codec: PlanesCodec

    def __init__(
        self,
        spec: TensorSpec,
        array: Array,
        options: EncodeOptions,
        *,
        codec: PlanesCodec | None = None,
        hardware: bool = HARDWARE,
    ) -> None:
        super().__init__(spec, array, options)
        if spec.size == 0 or spec.dtype not in KINDS:
            raise UsageError(
                f"planes cannot hold tensor {spec.name!r} ({spec.dtype}, {spec.size} elements)",
                hint="encode it as raw",
                tensor=spec.name,
            )
        flat = canonical(array).reshape(-1)
        self._kind = KINDS[spec.dtype]
        self._bits = flat.view(np.uint32 if spec.dtype == "F32" else np.uint16)
        self._hardware = hardware
        self.codec = codec or choose_codec(spec.dtype, self._bits)
        self.codec.check(spec)
        self.parts = self.codec.runs(spec)
        self._error_table = _error_table(spec, self.codec)

    def encode(self, part: int) -> list[EncodedFragment]:
        run = _Run(self.codec, self._kind, self._bits[part * lay.RUN : (part + 1) * lay.RUN])
        run.encode(self._hardware)
        gains = run.gains(self.codec.layers(self.spec), self._error_table)
        return [self._fragment(part, layer, run, gain) for layer, gain in enumerate(gains)]

    def _fragment(self, part: int, layer: int, run: _Run, gain: float) -> EncodedFragment:
        layout = self.codec.layout(self.spec, layer, part)
        sections = [_pack(self.options.compression, place, run.section(place)) for place in layout.sections]
        payload = lay.pack_body(layout, sections, run.offsets)
        index = layer * self.parts + part
        requires = index - self.parts if layer else NO_PREREQUISITE
        return EncodedFragment(index, layer, part, requires, NONE, len(payload), gain, payload)


def _error_table(spec: TensorSpec, codec: PlanesCodec) -> npt.NDArray[np.float64]:
    """What `error_sums` needs; empty for F32, which it does not measure."""
    if spec.dtype == "F32":
        return np.zeros((0, MAGNITUDES))
    magnitudes = np.arange(MAGNITUDES, dtype=np.uint16).view(spec.numpy_dtype)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        values = np.where(np.isfinite(magnitudes), magnitudes, 0).astype(np.float32)
    table = np.empty((ERRORS - 1, MAGNITUDES))
    work = np.zeros((ENCODE_ROWS, 64), np.uint64)
    error_table(values, KINDS[spec.dtype], codec.threshold, codec.top, codec.tail_cut, table, work)
    return table


def _pack(compression: str, place: int, section: npt.NDArray[Any]) -> lay.PackedSection:
    """A section in the form in which it is stored: planes in their density code, unless hardly a bit is set."""
    raw = as_bytes(section)
    if place < lay.SIGNS and compression != NONE and density(section.reshape(-1)) >= _LEAST_DENSITY:
        limit = int(raw.size * (1 - MIN_PLANE_SAVING))
        out = np.empty(limit + CHUNK + SLACK_BYTES, np.uint8)
        size = encode_section(raw, out, limit, *encoding_tables())
        return (
            lay.PackedSection(NONE, raw, raw.size)
            if size == TOO_LARGE
            else lay.PackedSection(lay.DENSITY, out[:size], raw.size)
        )
    used, data = compress(compression, raw, MIN_SECTION_SAVING)
    return lay.PackedSection(used, data, raw.size)


class _Run:
    """The raw sections of one run while it is encoded."""

    def __init__(self, codec: PlanesCodec, kind: int, bits: npt.NDArray[Any]) -> None:
        self.codec, self.kind, self.bits = codec, kind, bits
        count, groups = bits.size, lay.groups(bits.size)
        stream_bytes = groups * lay.PLANE_BYTES + SLACK
        self.digits = codec.top - codec.tail_cut
        self.groups = groups
        self.planes = np.empty(((self.digits + lay.HALF_PLANES) * groups, 64), np.uint64)
        self.signs = np.zeros((lay.TAIL, stream_bytes), np.uint8)
        self.tail = np.zeros((lay.TAIL_PLANES, stream_bytes), np.uint8)
        self.records = np.zeros(count * lay.RECORD_BITS // 8 + SLACK, np.uint8)
        self.entries = np.empty((3, count), np.uint16)
        self.starts = np.zeros((lay.STREAMS, lay.blocks(count) + 1), np.int64)
        self.errors = np.zeros((ERRORS, LANES), np.float64)

    @property
    def offsets(self) -> npt.NDArray[np.uint32]:
        return self.starts.astype(np.uint32)

    def encode(self, hardware: bool) -> None:
        codec = self.codec
        escapes, places, outliers = self.entries
        work = np.zeros((ENCODE_ROWS, 64), np.uint64)
        encode_run(
            self.bits, self.kind, codec.threshold, codec.top, codec.tail_cut,
            self.planes, self.signs, self.tail, self.records, escapes, places, outliers,
            self.starts, self.errors, work, hardware,
        )  # fmt: skip

    def gains(self, layers: int, table: npt.NDArray[np.float64]) -> list[float]:
        """What each layer takes off the squared error; the last one leaves none."""
        if self.kind != F32:
            error_sums(self.bits, table, self.errors[:-1, 0])
        left = [float(row.sum()) for row in self.errors]
        left[-1] = left[-1] if layers > lay.LAYERS else 0.0
        left += [0.0] * (layers + 1 - len(left))
        return [before - after for before, after in pairwise(left)]

    def section(self, place: int) -> Any:
        """The raw bytes of a section."""
        totals = self.starts[:, -1]
        if place < lay.SIGNS:
            return self._plane(place - lay.PLANE)
        if place < lay.OUTLIER_PLACES:
            layer = place - lay.SIGNS
            return self.signs[layer, : _bytes(totals[lay.STREAM_SIGNS[layer]])]
        if place in (lay.OUTLIER_PLACES, lay.OUTLIER_VALUES):
            return self.entries[1 + place - lay.OUTLIER_PLACES, : totals[lay.STREAM_OUTLIERS]]
        if place < lay.RECORDS:
            r = place - lay.TAIL_BITS
            return self.tail[r, : _bytes(totals[lay.STREAM_TAIL + r])]
        if place == lay.RECORDS:
            return self.records[: _bytes(lay.RECORD_BITS * totals[lay.STREAM_RECORDS])]
        if place == lay.ESCAPES:
            return self.entries[0, : totals[lay.STREAM_ESCAPES]]
        if place < lay.LOW_BITS:
            return self._plane(self.digits + place - lay.HALF_PLANE)
        return self.bits.astype(np.uint16)

    def _plane(self, plane: int) -> npt.NDArray[np.uint64]:
        return self.planes[plane * self.groups : (plane + 1) * self.groups]


def _bytes(bits: Any) -> int:
    return -(-int(bits) // 8)


def choose_codec(dtype: str, bits: npt.NDArray[Any]) -> PlanesCodec:
    """The configuration of least predicted size for a tensor's bits (uint16, or uint32 for F32)."""
    counts = np.zeros(256, np.int64)
    exponent_histogram(bits, KINDS[dtype], counts)
    words = WORD_RANGES[dtype]
    threshold = _threshold(counts, words.special, words.thresholds)
    top = _top(counts, threshold, min(MAX_TOP, words.special - threshold))
    lowest = max(MIN_TAIL_CUT, words.smallest - threshold, top - MAX_PLANES)
    return PlanesCodec(threshold, top, _tail_cut(counts, threshold, top, lowest))


def _threshold(counts: Histogram, special: int, allowed: tuple[int, int]) -> int:
    """The exponent field nearest to the root mean square of the finite weights."""
    finite = counts[1:special].astype(np.float64)
    if not finite.sum():
        return min(max(127, allowed[0]), allowed[1])
    squares = finite * np.exp2(2.0 * (np.arange(1, special) - 127)) * MEAN_SQUARE
    rms = np.sqrt(squares.sum() / counts[:special].sum())
    return int(min(max(np.round(np.log2(rms)) + 127, allowed[0]), allowed[1]))


def _top(counts: Histogram, threshold: int, highest: int) -> int:
    """The lowest `top` with at most OUTLIER_SHARE of the weights at or above it."""
    limit = OUTLIER_SHARE * counts.sum()
    for top in range(MIN_TOP, highest):
        if counts[threshold + top :].sum() <= limit:
            return top
    return highest


def _tail_cut(counts: Histogram, threshold: int, top: int, lowest: int) -> int:
    """The tail cut of the least predicted bits."""
    cuts = range(lowest, MAX_TAIL_CUT + 1)
    return min(cuts, key=lambda cut: _predicted_bits(counts, threshold, top, cut))


def _predicted_bits(counts: Histogram, threshold: int, top: int, tail_cut: int) -> float:
    """Bits a weight of what depends on the tail cut: planes after entropy coding, signs, tail, records, escapes."""
    share = counts / counts.sum()
    relative = np.arange(256) - threshold
    inside = relative < top
    bits = 0.0
    for exponent in range(MIN_TOP - 2, tail_cut - 1, -1):
        known = share[(relative > exponent) & (relative <= exponent + 7) & inside].sum()
        ones = share[relative == exponent].sum() + known / 2
        bits += _entropy(ones)
    significant = inside & (relative >= tail_cut)
    missing = np.clip(7 - (relative - tail_cut), 0, 7)
    below = relative < tail_cut
    escaped = (relative < tail_cut - lay.ESCAPE) | (np.arange(256) == 0)
    bits += share[significant].sum() + (share * missing)[significant].sum()
    return float(bits + lay.RECORD_BITS * share[below].sum() + 16 * share[below & escaped].sum())


def _entropy(ones: float) -> float:
    """Bits a digit costs where this share of them is 1; zstd gains nothing close to one half."""
    if not 0 < ones < 1:
        return 0.0
    bits = -(ones * np.log2(ones) + (1 - ones) * np.log2(1 - ones))
    return float(bits) if bits < 0.95 else 1.0


@cache
def warm() -> None:
    """Compile the kernels, or load them from numba's cache, before threads do."""
    for dtype in KINDS:
        spec = TensorSpec("warm", dtype, (1,))
        PlanesEncoder(spec, np.zeros(1, spec.numpy_dtype), EncodeOptions()).encode(0)
    encode_section(np.zeros(1, np.uint8), np.empty(1 + CHUNK + SLACK_BYTES, np.uint8), 1, *encoding_tables())
