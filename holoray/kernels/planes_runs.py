"""Decoding one run of `planes`: whole layers from scratch, or further layers into what is already there.

A call works on one thread and holds no lock. It writes only the run's own weights; it returns 0, or the number of the
first stream (plus one) that does not have as many entries as the planes ask for.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import njit

from holoray.codecs import planes_layout as lay
from holoray.kernels import planes_streams as streams
from holoray.kernels import planes_words as words
from holoray.kernels.bits import array_at
from holoray.kernels.planes_streams import deposit_stream, load_plane
from holoray.kernels.planes_words import (
    DIGITS,
    LOWS,
    MASK,
    NEGATIVE,
    PLACES,
    REACHED,
    SIGNIFICANT,
    TAKEN,
    VALUES,
    U,
)

BF16: Final = 0
F16: Final = 1
F32: Final = 2
KINDS: Final = {"BF16": BF16, "F16": F16, "F32": F32}
FUSED_PLANES: Final = 16 - lay.TAIL_PLANES
"""With so many planes or fewer the digits of the tail fit into the same word: one pass from scratch."""

_GROUP: Final = lay.GROUP
_GROUPS: Final = lay.BLOCK // lay.GROUP
_BAD_OUTLIERS: Final = lay.STREAM_OUTLIERS + 1
_BAD_RECORDS: Final = lay.STREAM_RECORDS + 1


@njit(nogil=True, cache=True)
def layer_end(layer: int, top: int, tail_cut: int) -> int:
    """The first plane that layers 0..layer (0 to 4) do not have."""
    return top + 1 + layer if layer < 4 else top - tail_cut


@njit(nogil=True, cache=True)
def stream_end(layers: int) -> int:
    """The first offset row that layers 0..layers-1 do not have."""
    if layers > lay.TAIL:
        return lay.STREAMS
    return 0 if layers == 0 else layers + 1


@njit(nogil=True, cache=True)
def decode_run(
    out: Any,
    count: int,
    kind: int,
    threshold: int,
    top: int,
    tail_cut: int,
    layers: int,
    addresses: Any,
    lengths: Any,
    offsets: Any,
    work: Any,
    hardware: bool,
) -> int:
    """Decode layers 0..layers-1 of a run into `out` (the run's weights as uint16), whatever it held before.

    `addresses` and `lengths` (int64[SECTIONS]) are the raw sections, `offsets` uint32[STREAMS, BLOCKS + 1]. With the tail
    there may be at most `FUSED_PLANES` planes.
    """
    positions = np.zeros(lay.STREAMS, np.int64)
    temporary = work[VALUES : VALUES + 16].reshape(-1).view(np.uint16)
    lows = work[LOWS : LOWS + 16].reshape(-1).view(np.uint16)
    blocks = (count + lay.BLOCK - 1) // lay.BLOCK
    end = stream_end(layers)
    for block in range(blocks):
        bad = streams.streams_begin(offsets, lengths, block, 0, end, positions)
        if bad:
            return bad
        outliers_end = min(np.int64(offsets[lay.STREAM_OUTLIERS, block + 1]), lengths[lay.OUTLIER_VALUES] // 2)
        outliers_end = min(outliers_end, lengths[lay.OUTLIER_PLACES] // 2)
        first = block * _GROUPS
        for group in range(first, min(first + _GROUPS, (count + _GROUP - 1) // _GROUP)):
            start = group * _GROUP
            size = min(_GROUP, count - start)
            direct = kind != F32 and size == _GROUP
            values = out[start : start + _GROUP] if direct else temporary
            _digits(group, min(layers, lay.TAIL), top, tail_cut, layers > lay.TAIL, addresses, work)
            _signs(0, min(layers, lay.TAIL), top, tail_cut, addresses, lengths, positions, work, hardware)
            _convert(values, layers, threshold, top, tail_cut, addresses, lengths, positions, work, hardware)
            if kind == F16:
                lows[:] = np.uint16(0)
                if layers > lay.TAIL:
                    _add_lows(group, addresses, lows, work)
                words.halves_from_words(values, lows)
            if streams.patch_outliers(values, group - first, size, addresses, outliers_end, positions, work):
                return _BAD_OUTLIERS
            if layers > lay.TAIL and _records(
                values, size, kind, threshold + tail_cut - 1, addresses, lengths, positions, work
            ):
                return _BAD_RECORDS
            if not direct:
                _store(values, out, start, size, kind, layers > lay.LOW, addresses, work)
        bad = streams.streams_end(offsets, lengths, block, blocks, 0, end, positions)
        if bad:
            return bad
    return 0


@njit(nogil=True, cache=True)
def refine_run(
    out: Any,
    count: int,
    kind: int,
    threshold: int,
    top: int,
    tail_cut: int,
    held: int,
    layers: int,
    addresses: Any,
    lengths: Any,
    offsets: Any,
    work: Any,
    hardware: bool,
) -> int:
    """Add layers held..layers-1 to a run that holds layers 0..held-1 (held >= 1); the rest as `decode_run`."""
    positions = np.zeros(lay.STREAMS, np.int64)
    temporary = work[VALUES : VALUES + 16].reshape(-1)
    lows = work[LOWS : LOWS + 16].reshape(-1).view(np.uint16)
    blocks = (count + lay.BLOCK - 1) // lay.BLOCK
    begin, end = stream_end(held), stream_end(layers)
    planes_end = min(layers, lay.TAIL)
    tail = held <= lay.TAIL < layers
    if held >= lay.TAIL and not tail:
        _merge_low_bits(out, count, addresses)
        return 0
    for block in range(blocks):
        bad = streams.streams_begin(offsets, lengths, block, begin, end, positions)
        if bad:
            return bad
        first = block * _GROUPS
        for group in range(first, min(first + _GROUPS, (count + _GROUP - 1) // _GROUP)):
            start = group * _GROUP
            size = min(_GROUP, count - start)
            direct = kind == BF16 and size == _GROUP
            values = temporary.view(np.uint16)
            if direct:
                values = out[start : start + _GROUP]
            else:
                _load(out, start, size, kind, values, lows)
            if held < planes_end:
                _refine_group(
                    values, group, held, planes_end, threshold, top, tail_cut, addresses, lengths, positions, work,
                    hardware,
                )  # fmt: skip
            if tail:
                _complete_group(values, threshold, top, tail_cut, addresses, lengths, positions, work, hardware)
            if kind == F16:
                if tail:
                    _add_lows(group, addresses, lows, work)
                words.halves_from_words(values, lows)
            if tail and _records(
                values, size, kind, threshold + tail_cut - 1, addresses, lengths, positions, work
            ):
                return _BAD_RECORDS
            if not direct:
                _store(values, out, start, size, kind, layers > lay.LOW, addresses, work)
        bad = streams.streams_end(offsets, lengths, block, blocks, begin, end, positions)
        if bad:
            return bad
    return 0


@njit(nogil=True, cache=True)
def _digits(group: int, layers: int, top: int, tail_cut: int, tail: bool, addresses: Any, work: Any) -> None:
    """Load the planes of a group below the place of the tail's, and mark in REACHED what is significant by each."""
    planes = layer_end(layers - 1, top, tail_cut)
    last = planes - 1 + (lay.TAIL_PLANES if tail else 0)
    for p in range(planes):
        row, reached = work[DIGITS + last - p], work[REACHED + p]
        load_plane(addresses[lay.PLANE + p] + group * lay.PLANE_BYTES, row)
        if p == 0:
            for i in range(64):
                reached[i] = row[i]
        else:
            before = work[REACHED + p - 1]
            for i in range(64):
                reached[i] = row[i] | before[i]
    significant, reached = work[SIGNIFICANT], work[REACHED + planes - 1]
    for i in range(64):
        significant[i] = reached[i]


@njit(nogil=True, cache=True)
def _signs(
    held: int,
    layers: int,
    top: int,
    tail_cut: int,
    addresses: Any,
    lengths: Any,
    positions: Any,
    work: Any,
    hardware: bool,
) -> None:
    """NEGATIVE = the signs of the weights that become significant in layers held..layers-1 (REACHED must be set)."""
    mask, taken, negative = work[MASK], work[TAKEN], work[NEGATIVE]
    for layer in range(held, layers):
        upper = work[REACHED + layer_end(layer, top, tail_cut) - 1]
        if layer == 0:
            for i in range(64):
                mask[i] = upper[i]
        else:
            lower = work[REACHED + layer_end(layer - 1, top, tail_cut) - 1]
            for i in range(64):
                mask[i] = upper[i] & ~lower[i]
        stream = layer + 1 if layer else 0
        section = lay.SIGNS + layer
        target = negative if layer == held else taken
        positions[stream] = deposit_stream(
            addresses[section], lengths[section], positions[stream], mask, target, work, hardware
        )
        if layer != held:
            for i in range(64):
                negative[i] |= taken[i]


@njit(nogil=True, cache=True)
def _convert(
    values: Any,
    layers: int,
    threshold: int,
    top: int,
    tail_cut: int,
    addresses: Any,
    lengths: Any,
    positions: Any,
    work: Any,
    hardware: bool,
) -> None:
    """Turn the digits loaded, and those of the tail if there is one, into words."""
    planes = layer_end(min(layers, lay.TAIL) - 1, top, tail_cut)
    tail = layers > lay.TAIL
    if tail:
        _tail_planes(planes, addresses, lengths, positions, work, hardware)
        exponent = tail_cut - lay.TAIL_PLANES
        planes += lay.TAIL_PLANES
    else:
        exponent = -layers if layers < lay.TAIL else tail_cut
    at = words.planes_to_words(work, planes)
    digits = work[at : at + 16].reshape(-1).view(np.uint16)
    negative = work[NEGATIVE].view(np.uint16)
    if tail:
        words.digits_to_values(digits, negative, values, threshold + exponent, False)
    else:
        words.digits_to_values(digits, negative, values, threshold + exponent, True)


@njit(nogil=True, cache=True)
def _tail_planes(
    planes: int, addresses: Any, lengths: Any, positions: Any, work: Any, hardware: bool
) -> None:
    """Place the tail's digits below those of the planes; takers are the significant with fewer than 7 known."""
    mask, significant = work[MASK], work[SIGNIFICANT]
    for r in range(1, lay.TAIL_PLANES + 1):
        known = planes - 9 + r
        if known >= 0:
            finished = work[REACHED + known]
            for i in range(64):
                mask[i] = significant[i] & ~finished[i]
        else:
            for i in range(64):
                mask[i] = significant[i]
        _take_tail(r, addresses, lengths, positions, mask, work[DIGITS + lay.TAIL_PLANES - r], work, hardware)


@njit(nogil=True, cache=True)
def _take_tail(
    r: int, addresses: Any, lengths: Any, positions: Any, mask: Any, row: Any, work: Any, hardware: bool
) -> None:
    section, stream = lay.TAIL_BITS + r - 1, lay.STREAM_TAIL + r - 1
    positions[stream] = deposit_stream(
        addresses[section], lengths[section], positions[stream], mask, row, work, hardware
    )


@njit(nogil=True, cache=True)
def _refine_group(
    values: Any,
    group: int,
    held: int,
    layers: int,
    threshold: int,
    top: int,
    tail_cut: int,
    addresses: Any,
    lengths: Any,
    positions: Any,
    work: Any,
    hardware: bool,
) -> None:
    """Add the planes of layers held..layers-1 (at most 5) to the words of a group."""
    begin, end = layer_end(held - 1, top, tail_cut), layer_end(layers - 1, top, tail_cut)
    before = work[REACHED + begin - 1]
    words.significant_plane(values.view(np.uint64).reshape(16, 64), before)
    for p in range(begin, end):
        row, reached = work[DIGITS + p], work[REACHED + p]
        load_plane(addresses[lay.PLANE + p] + group * lay.PLANE_BYTES, row)
        for i in range(64):
            reached[i] = row[i] | before[i]
        before = reached
    _signs(held, layers, top, tail_cut, addresses, lengths, positions, work, hardware)
    negative = work[NEGATIVE].view(np.uint16)
    for p in range(begin, end):
        words.refine(values, work[DIGITS + p].view(np.uint16), negative, threshold, top - 1 - p, top)


@njit(nogil=True, cache=True)
def _complete_group(
    values: Any,
    threshold: int,
    top: int,
    tail_cut: int,
    addresses: Any,
    lengths: Any,
    positions: Any,
    work: Any,
    hardware: bool,
) -> None:
    """Add the tail's digits to the words of a group that holds layers 0 to 4; marks SIGNIFICANT."""
    classes = work[words.WORDS : words.WORDS + 16]
    words.known_digits(values, classes.reshape(-1).view(np.uint16), threshold, top, tail_cut)
    words.words_to_planes(work, words.WORDS, 4)
    significant, known = work[SIGNIFICANT], work[DIGITS + 3]
    for i in range(64):
        significant[i] = known[i]
    # The class planes lie where the digits will: the rows REACHED are free here.
    for r in range(1, lay.TAIL_PLANES + 1):
        words.tail_mask(work, r)
        _take_tail(r, addresses, lengths, positions, work[MASK], work[REACHED + lay.TAIL_PLANES - r], work, hardware)
    work[DIGITS : DIGITS + lay.TAIL_PLANES] = work[REACHED : REACHED + lay.TAIL_PLANES]
    at = words.planes_to_words(work, lay.TAIL_PLANES)
    words.complete(values, work[at : at + 16].reshape(-1).view(np.uint16), threshold, top, tail_cut)


@njit(nogil=True, cache=True)
def _add_lows(group: int, addresses: Any, lows: Any, work: Any) -> None:
    """OR the three low mantissa bits of a float16 group into `lows`."""
    for p in range(lay.HALF_PLANES):
        row = work[DIGITS + lay.HALF_PLANES - 1 - p]
        load_plane(addresses[lay.HALF_PLANE + p] + group * lay.PLANE_BYTES, row)
    at = words.planes_to_words(work, lay.HALF_PLANES)
    bits = work[at : at + 16].reshape(-1).view(np.uint16)
    for k in range(_GROUP):
        lows[k] |= np.uint16(bits[k] & np.uint16(7))


@njit(nogil=True, cache=True)
def _records(
    values: Any, size: int, kind: int, exponent: int, addresses: Any, lengths: Any, positions: Any, work: Any
) -> Any:
    """Write the weights below the tail cut; SIGNIFICANT must mark all others."""
    if size < _GROUP:
        padding = work[SIGNIFICANT].view(np.uint16)
        for k in range(size, _GROUP):
            padding[k & 255] |= np.uint16(1 << (k >> 8))
    places = work[PLACES : PLACES + 17].reshape(-1).view(np.uint16)
    count = streams.places_below(work, places)
    return streams.read_records(values, places, count, addresses, lengths, positions, exponent, kind == F16)


@njit(nogil=True, cache=True)
def _load(out: Any, start: int, size: int, kind: int, values: Any, lows: Any) -> None:
    """Read the words of a group from the output into `values`, zeros behind them."""
    if kind == F32:
        for k in range(size):
            values[k] = out[2 * (start + k) + 1]
    elif kind == F16:
        words.words_from_halves(out[start : start + size], values, lows)
    else:
        for k in range(size):
            values[k] = out[start + k]
    for k in range(size, _GROUP):
        values[k] = np.uint16(0)
        lows[k] = np.uint16(0)


@njit(nogil=True, cache=True)
def _store(
    values: Any, out: Any, start: int, size: int, kind: int, low: bool, addresses: Any, work: Any
) -> None:
    """Write the first `size` words of a group to the output, for F32 with the low bits or zeros below them."""
    if kind != F32:
        for k in range(size):
            out[start + k] = values[k]
        return
    full = out[2 * start : 2 * (start + size)].view(np.uint32)
    if low:
        bits = _low_bits(addresses[lay.LOW_BITS] + 2 * start, size, work)
        for k in range(size):
            full[k] = (np.uint32(values[k]) << np.uint32(16)) | np.uint32(bits[k])
    else:
        for k in range(size):
            full[k] = np.uint32(values[k]) << np.uint32(16)


@njit(nogil=True, cache=True)
def _low_bits(address: int, size: int, work: Any) -> Any:
    """`size` <= 4096 low halves copied from an unaligned address (uint16[4352])."""
    target = work[PLACES : PLACES + 17].reshape(-1).view(np.uint8)
    source = array_at(address, 2 * size)
    for i in range(2 * size):
        target[i] = source[i]
    return target.view(np.uint16)


@njit(nogil=True, cache=True)
def _merge_low_bits(out: Any, count: int, addresses: Any) -> None:
    """Write the low halves of an F32 run whose words are complete."""
    bytes_out = out.view(np.uint8)
    source = array_at(addresses[lay.LOW_BITS], 2 * count)
    for k in range(count):
        bytes_out[4 * k] = source[2 * k]
        bytes_out[4 * k + 1] = source[2 * k + 1]


