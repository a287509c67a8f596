"""Encoding one run of `planes`: words to planes and compacted streams, and the error that each layer leaves."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import njit

from holoray.codecs import planes_layout as lay
from holoray.kernels import planes_words as words
from holoray.kernels.bits import (
    address_of,
    bits_float,
    floats_from,
    hardware_extract,
    load_u64,
    popcount,
    store_u8,
    store_u64,
    table_extract,
    unowned_rows,
    words_from,
)
from holoray.kernels.planes_groups import F16, F32, layer_end
from holoray.kernels.planes_streams import ranks_below
from holoray.kernels.planes_words import (
    DIGITS,
    LOWS,
    RANKS,
    REACHED,
    SIGNIFICANT,
    VALUES,
    WORDS,
    ZEROS,
    U,
    clear,
)

ERRORS: Final = 7
"""Rows of errors: of the zero tensor, after layers 0 to 4, and of the words alone."""
LANES: Final = 256
MAGNITUDES: Final = 1 << 15
"""Of a 16-bit float without its sign."""
SLACK: Final = 16
"""Bytes behind a stream that writing may touch."""

# Rows of the working memory behind those of the decoder.
_FIELDS: Final = words.ROWS
_TRUE: Final = _FIELDS + 16
_COARSE: Final = _TRUE + 32
_READ: Final = _COARSE + 32
_SEEN: Final = _READ + 32
ENCODE_ROWS: Final = _SEEN + 16
_TAIL_ROWS: Final = LOWS
_GROUP: Final = lay.GROUP
_SIGN: Final = lay.TAIL_PLANES
_OUTLIER: Final = lay.TAIL_PLANES + 1


@njit(nogil=True, cache=True)
def exponent_histogram(bits: Any, kind: int, counts: Any) -> None:
    """Count exponent fields of words (int64[256]); `bits` is the tensor as uint16 (F16, BF16) or uint32 (F32)."""
    parts = np.zeros((4, 256), np.int64)
    if kind == F32:
        for k in range(bits.size):
            parts[k & 3, (np.int64(bits[k]) >> 23) & 255] += 1
    elif kind == F16:
        for k in range(bits.size):
            field = (np.int64(bits[k]) >> 10) & 31
            parts[k & 3, field + 112 if field else 0] += 1
    else:
        for k in range(bits.size):
            parts[k & 3, (np.int64(bits[k]) >> 7) & 255] += 1
    for k in range(256):
        counts[k] = parts[0, k] + parts[1, k] + parts[2, k] + parts[3, k]


@njit(nogil=True, cache=True)
def encode_run(
    bits: Any,
    kind: int,
    threshold: int,
    top: int,
    tail_cut: int,
    planes: Any,
    signs: Any,
    tail: Any,
    records: Any,
    escapes: Any,
    outlier_places: Any,
    outlier_values: Any,
    offsets: Any,
    errors: Any,
    work: Any,
    hardware: bool,
) -> None:
    """Encode a run of `bits` (uint16, or uint32 for F32).

    Writes rows into `planes` (uint64[(top - tail_cut + 3) * groups, 64]), bits into `signs` (uint8[5, bytes]),
    `tail` (uint8[7, bytes]) and `records` (uint8), which must be zero, entries into the others, and the offset rows
    (int64[STREAMS, blocks + 1]). For F32 `errors` (float64[ERRORS, LANES]) takes sums of squares, by lane: there is
    more to an F32 weight than its word. Others are measured by `error_sums`.
    """
    count = bits.size
    work, planes = unowned_rows(work), unowned_rows(planes)
    clear(work[ZEROS])
    positions = np.zeros(lay.STREAMS, np.int64)
    group_bits = words_from(work, VALUES, 16)
    digits = words_from(work, WORDS, 16)
    lows = words_from(work, _TAIL_ROWS, 16)
    ranks = words_from(work, RANKS, 17)
    fields = words_from(work, _FIELDS, 16)
    true, coarse = floats_from(work, _TRUE, 32), floats_from(work, _COARSE, 32)
    read, seen = floats_from(work, _READ, 32), words_from(work, _SEEN, 16)
    groups = (count + _GROUP - 1) // _GROUP
    for group in range(groups):
        start = group * _GROUP
        size = min(_GROUP, count - start)
        if group % (lay.BLOCK // _GROUP) == 0:
            for stream in range(lay.STREAMS):
                offsets[stream, group // (lay.BLOCK // _GROUP)] = positions[stream]
        _read(bits, start, size, kind, group_bits)
        _words(group_bits, kind, fields)
        _split(fields, threshold, top, tail_cut, digits, lows)
        if kind == F32:
            _values(bits, start, size, group_bits, true, coarse)
            _measure(fields, digits, lows, true, coarse, read, seen, threshold, tail_cut, errors)
        words.words_to_planes(work, WORDS, 16)
        _digit_planes(work, top - tail_cut, planes, group, groups)
        words.words_to_planes(work, _TAIL_ROWS, 16)
        _pack_signs(work, top, tail_cut, address_of(signs), signs.shape[1], positions, hardware)
        _pack_tail(work, top - tail_cut, address_of(tail), tail.shape[1], positions, hardware)
        _pack_outliers(work, group, group_bits, outlier_places, outlier_values, positions)
        _pack_records(work, size, group_bits, fields, threshold + tail_cut - 1, ranks, records, escapes, positions)
        if kind == F16:
            _half_planes(work, group_bits, fields, threshold + top, planes, top - tail_cut, group, groups)
    for stream in range(lay.STREAMS):
        offsets[stream, offsets.shape[1] - 1] = positions[stream]


@njit(nogil=True, cache=True)
def error_table(values: Any, kind: int, threshold: int, top: int, tail_cut: int, table: Any, work: Any) -> None:
    """table[row, m] = the squared error of a weight of magnitude bits m after the layers of a row (F16 and BF16).

    `table` is float64[ERRORS - 1, MAGNITUDES], `values` the magnitudes themselves (float32, 0 for NaN and infinity).
    """
    work = unowned_rows(work)
    group_bits, fields = words_from(work, VALUES, 16), words_from(work, _FIELDS, 16)
    digits, lows = words_from(work, WORDS, 16), words_from(work, _TAIL_ROWS, 16)
    read, seen = floats_from(work, _READ, 32), words_from(work, _SEEN, 16)
    for start in range(0, MAGNITUDES, _GROUP):
        true = values[start : start + _GROUP]
        for k in range(_GROUP):
            group_bits[k] = np.uint16(start + k)
        _words(group_bits, kind, fields)
        _split(fields, threshold, top, tail_cut, digits, lows)
        for k in range(_GROUP):
            table[0, start + k] = np.float64(true[k]) * np.float64(true[k])
        for layer in range(lay.TAIL):
            _layer_values(layer, fields, digits, lows, true, read, seen, threshold, tail_cut)
            for k in range(_GROUP):
                error = np.float64(true[k]) - np.float64(read[k])
                table[layer + 1, start + k] = error * error


@njit(nogil=True, cache=True)
def error_sums(bits: Any, table: Any, sums: Any) -> None:
    """sums[row] = the squared errors of all weights of a run (uint16[n]), by how often each magnitude occurs."""
    counts = np.zeros((4, MAGNITUDES), np.uint32)
    for k in range(bits.size):
        counts[k & 3, bits[k] & 0x7FFF] += np.uint32(1)
    for m in range(MAGNITUDES):
        count = np.float64(counts[0, m] + counts[1, m] + counts[2, m] + counts[3, m])
        if count != 0.0:
            for row in range(table.shape[0]):
                sums[row] += count * table[row, m]


@njit(nogil=True, cache=True)
def _read(bits: Any, start: int, size: int, kind: int, group_bits: Any) -> None:
    """The group's stored 16 bits, zeros behind them."""
    source = bits[start : start + size]
    if kind == F32:
        for k in range(size):
            group_bits[k] = np.uint16(source[k] >> np.uint32(16))
    else:
        for k in range(size):
            group_bits[k] = np.uint16(source[k])
    for k in range(size, _GROUP):
        group_bits[k] = np.uint16(0)


@njit(nogil=True, cache=True)
def _words(group_bits: Any, kind: int, fields: Any) -> None:
    """The group's words (0 where a float16 exponent field is 0)."""
    if kind == F16:
        for k in range(_GROUP):
            half = group_bits[k]
            magnitude = np.uint16(half & np.uint16(0x7FFF))
            word = np.uint16(np.uint16(magnitude >> np.uint16(3)) + np.uint16(words.HALF_BIAS))
            word = np.uint16(word | np.uint16(half & np.uint16(0x8000)))
            fields[k] = word if magnitude >= 0x400 else np.uint16(0)
    else:
        for k in range(_GROUP):
            fields[k] = group_bits[k]


@njit(nogil=True, cache=True)
def _values(bits: Any, start: int, size: int, group_bits: Any, true: Any, coarse: Any) -> None:
    """An F32 group's true values, and those of its words; NaN and infinities count as zeros in both."""
    source = bits[start : start + size]
    for k in range(size):
        true[k] = _finite(np.uint32(source[k]))
    for k in range(size, _GROUP):
        true[k] = np.float32(0)
    for k in range(_GROUP):
        coarse[k] = _finite(np.uint32(np.uint32(group_bits[k]) << np.uint32(16)))


@njit(nogil=True, cache=True, inline="always")
def _finite(word: Any) -> Any:
    """The float32 of these bits, 0 for NaN and infinities."""
    finite = (word & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
    return bits_float(word if finite else np.uint32(0))


@njit(nogil=True, cache=True)
def _split(fields: Any, threshold: int, top: int, tail_cut: int, digits: Any, lows: Any) -> None:
    """digits[k] = floor(word / 2^tail_cut) of the significant; lows[k] = 7 more digits, sign, outlier mark."""
    least, most = np.uint16(threshold + tail_cut), np.uint16(threshold + top)
    offset = np.int32(127 + 7 - threshold - tail_cut) << 23
    for k in range(_GROUP):
        word = fields[k]
        exponent = np.uint16(np.uint16(word >> np.uint16(7)) & np.uint16(255))
        significant = (exponent >= least) & (exponent < most)
        # (128 | mantissa) << (exponent - least), by way of a float: lanes of 32 bits, and no shift that varies.
        magnitude = np.int32(np.int32(word & np.uint16(0x7FFF)) << 16) + np.int32(offset)
        full = np.int32(bits_float(np.uint32(magnitude if significant else np.int32(0))))
        sign = np.uint16(np.uint16(word >> np.uint16(15)) << np.uint16(_SIGN))
        outlier = np.uint16(1 << _OUTLIER) if exponent >= most else np.uint16(0)
        digits[k] = np.uint16(full >> 7)
        lows[k] = np.uint16(np.uint16(np.uint16(full) & np.uint16(127)) | sign | outlier)


@njit(nogil=True, cache=True)
def _measure(
    fields: Any,
    digits: Any,
    lows: Any,
    true: Any,
    coarse: Any,
    read: Any,
    seen: Any,
    threshold: int,
    tail_cut: int,
    errors: Any,
) -> None:
    """Add the squared errors of the group to errors[row, k % 256], for every row; `read`, `seen`: working memory."""
    for layer in range(lay.TAIL):
        _layer_values(layer, fields, digits, lows, coarse, read, seen, threshold, tail_cut)
        _add_squares(true, read, errors[layer + 1])
    for k in range(_GROUP):
        read[k] = np.float32(0)
    _add_squares(true, read, errors[0])
    _add_squares(true, coarse, errors[ERRORS - 1])


@njit(nogil=True, cache=True)
def _layer_values(
    layer: int, fields: Any, digits: Any, lows: Any, coarse: Any, read: Any, seen: Any, threshold: int, tail_cut: int
) -> None:
    """read[k] = what a weight reads after layers 0 to `layer` (float32[4096]); `coarse` for outliers."""
    bias = np.uint16(((threshold + tail_cut - 127) << 7) & 0xFFFF)
    outlier = np.uint16(1 << _OUTLIER)
    # The layer's digits without shifting: the lower ones cleared, and one unit is 2^below.
    below = (-1 - layer if layer < 4 else tail_cut) - tail_cut
    one, kept = np.uint16(1 << below), np.uint16((0xFFFF << below) & 0xFFFF)
    fill, lone = np.float32(0.5 * (1 << below)), np.float32(words.LONE_DIGIT * (1 << below))
    _layer_words(digits, fields, seen, kept, one, fill, lone, bias)
    for k in range(_GROUP):
        stored, mark = coarse[k], np.uint16(lows[k] & outlier)  # loads inside a branch would stay branches
        value = bits_float(np.uint32(np.uint32(seen[k]) << np.uint32(16)))
        read[k] = stored if mark != 0 else value


@njit(nogil=True, cache=True)
def _layer_words(digits: Any, fields: Any, seen: Any, kept: Any, one: Any, fill: Any, lone: Any, bias: Any) -> None:
    """seen[k] = the word that a weight reads of which the digits in the mask `kept` are known (uint16[4096])."""
    for k in range(_GROUP):
        known = words.digits_word(np.uint16(digits[k] & kept), one, fill, lone, bias)
        seen[k] = np.uint16(known | np.uint16(fields[k] & np.uint16(0x8000)))


@njit(nogil=True, cache=True)
def _add_squares(true: Any, read: Any, sums: Any) -> None:
    """sums[k % 256] += (true[k] - read[k])^2 in float64."""
    for j in range(_GROUP // LANES):
        for i in range(LANES):
            error = np.float64(true[j * LANES + i]) - np.float64(read[j * LANES + i])
            sums[i] += error * error


@njit(nogil=True, cache=True)
def _digit_planes(work: Any, count: int, planes: Any, group: int, groups: int) -> None:
    """Store the digit planes of a group and mark in REACHED what is significant by each."""
    for p in range(count):
        row, target, reached = work[DIGITS + count - 1 - p], planes[p * groups + group], work[REACHED + p]
        for i in range(64):
            target[i] = row[i]
        if p == 0:
            for i in range(64):
                reached[i] = row[i]
        else:
            before = work[REACHED + p - 1]
            for i in range(64):
                reached[i] = row[i] | before[i]
    significant, all_reached = work[SIGNIFICANT], work[REACHED + count - 1]
    for i in range(64):
        significant[i] = all_reached[i]


@njit(nogil=True, cache=True)
def _extract_stream(row: Any, upper: Any, lower: Any, address: int, position: int, hardware: bool) -> Any:
    """Append the bits of `row` at `upper & ~lower` to a stream that is zero from there on; returns the new position."""
    for i in range(64):
        wanted = upper[i] & ~lower[i]
        if hardware:
            bits = hardware_extract(row[i], wanted)
        else:
            bits = table_extract(row[i], wanted)
        at, shift = address + (position >> 3), U(position & 7)
        store_u64(at, load_u64(at) | (bits << shift))
        store_u8(at + 8, np.uint8((bits >> U(1)) >> (U(63) - shift)))
        position += popcount(wanted)
    return position


@njit(nogil=True, cache=True)
def _pack_signs(work: Any, top: int, tail_cut: int, signs: int, stride: int, positions: Any, hardware: bool) -> None:
    """Append the signs of a group to the five streams that lie `stride` bytes apart from address `signs` on."""
    for layer in range(lay.TAIL):
        upper = work[REACHED + layer_end(layer, top, tail_cut) - 1]
        lower = work[REACHED + layer_end(layer - 1, top, tail_cut) - 1] if layer else work[ZEROS]
        stream = layer + 1 if layer else 0
        positions[stream] = _extract_stream(
            work[DIGITS + _SIGN], upper, lower, signs + layer * stride, positions[stream], hardware
        )


@njit(nogil=True, cache=True)
def _pack_tail(work: Any, planes: int, tail: int, stride: int, positions: Any, hardware: bool) -> None:
    """Append the digits below the tail cut to the seven streams that lie `stride` bytes apart from `tail` on."""
    for r in range(1, lay.TAIL_PLANES + 1):
        known = planes - 9 + r
        finished = work[REACHED + known] if known >= 0 else work[ZEROS]
        stream = lay.STREAM_TAIL + r - 1
        row = work[DIGITS + lay.TAIL_PLANES - r]
        positions[stream] = _extract_stream(
            row, work[SIGNIFICANT], finished, tail + (r - 1) * stride, positions[stream], hardware
        )


@njit(nogil=True, cache=True)
def _pack_outliers(
    work: Any, group: int, group_bits: Any, outlier_places: Any, outlier_values: Any, positions: Any
) -> None:
    """Append the outliers of a group, and mark them as significant."""
    outlier, significant = work[DIGITS + _OUTLIER], work[SIGNIFICANT]
    at = positions[lay.STREAM_OUTLIERS]
    base = (group % (lay.BLOCK // _GROUP)) * _GROUP
    for q in range(64):
        if outlier[q]:
            significant[q] |= outlier[q]
            for bit in range(64):
                if outlier[q] >> U(bit) & U(1):
                    place = (bit & 15) * 256 + 4 * q + (bit >> 4)
                    outlier_places[at] = np.uint16(base + place)
                    outlier_values[at] = group_bits[place]
                    at += 1
    positions[lay.STREAM_OUTLIERS] = at


@njit(nogil=True, cache=True)
def _pack_records(
    work: Any,
    size: int,
    group_bits: Any,
    fields: Any,
    exponent: int,
    ranks: Any,
    records: Any,
    escapes: Any,
    positions: Any,
) -> None:
    """Append the weights below the tail cut; `exponent` is the exponent field of the largest of them."""
    if size < _GROUP:
        padding = work[SIGNIFICANT].view(np.uint16)
        for k in range(size, _GROUP):
            padding[k & 255] |= np.uint16(1 << (k >> 8))
    record, escape = positions[lay.STREAM_RECORDS], positions[lay.STREAM_ESCAPES]
    for n in range(ranks_below(work, ranks)):
        rank = np.int64(ranks[n])
        place = (rank & 15) * 256 + (rank >> 4)
        word = np.int64(fields[place])
        field = (word >> 7) & 255
        distance = exponent - field
        if field == 0 or distance >= lay.ESCAPE:
            distance, word = np.int64(lay.ESCAPE), np.int64(0)
            escapes[escape] = group_bits[place]
            escape += 1
        bits = ((word >> 15) << 11 | (word & 127) << 4 | distance) << (4 * (record & 1))
        at = record * lay.RECORD_BITS >> 3
        records[at] |= np.uint8(bits & 255)
        records[at + 1] |= np.uint8(bits >> 8)
        record += 1
    positions[lay.STREAM_RECORDS], positions[lay.STREAM_ESCAPES] = record, escape


@njit(nogil=True, cache=True)
def _half_planes(
    work: Any, group_bits: Any, fields: Any, limit: int, planes: Any, first: int, group: int, groups: int
) -> None:
    """Store the three low mantissa bits of float16 words as planes first..first+2, zeros for outliers and escapes."""
    lows = words_from(work, WORDS, 16)
    for k in range(_GROUP):
        field = (fields[k] >> 7) & 255
        lows[k] = np.uint16(group_bits[k] & 7) if 0 < field < limit else np.uint16(0)
    words.words_to_planes(work, WORDS, 4)
    for p in range(lay.HALF_PLANES):
        row, target = work[DIGITS + lay.HALF_PLANES - 1 - p], planes[(first + p) * groups + group]
        for i in range(64):
            target[i] = row[i]
