"""Decoding one run of `planes`: whole layers from scratch, or further layers into what is already there.

A call works on one thread and holds no lock. It writes only the run's own weights; it returns 0, or the number of the
first stream (plus one) that does not have as many entries as the planes ask for.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import njit

from holoray.codecs import planes_layout as lay
from holoray.kernels import planes_groups as groups
from holoray.kernels import planes_streams as streams
from holoray.kernels import planes_words as words
from holoray.kernels.bits import prefetch_words, unowned, unowned_rows, words_from
from holoray.kernels.planes_groups import BF16, F16, F32
from holoray.kernels.planes_words import LOWS, VALUES, ZEROS, clear

FUSED_PLANES: Final = 16 - lay.TAIL_PLANES
"""With so many planes or fewer the digits of the tail fit into the same word: one pass from scratch."""

_GROUP: Final = lay.GROUP
_GROUPS: Final = lay.BLOCK // lay.GROUP
_BAD_OUTLIERS: Final = lay.STREAM_OUTLIERS + 1
_BAD_RECORDS: Final = lay.STREAM_RECORDS + 1


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

    `addresses` and `lengths` (int64[SECTIONS]) are the raw sections, `offsets` uint32[STREAMS, BLOCKS + 1]. With the
    tail there may be at most `FUSED_PLANES` planes.
    """
    positions = np.zeros(lay.STREAMS, np.int64)
    out, work = unowned(out), unowned_rows(work)
    clear(work[ZEROS])
    temporary = words_from(work, VALUES, 16)
    lows = words_from(work, LOWS, 16)
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
            prefetch_words(values)
            groups.digits(group, min(layers, lay.TAIL), top, tail_cut, addresses, work)
            groups.signs(0, min(layers, lay.TAIL), top, tail_cut, addresses, lengths, positions, work, hardware)
            groups.convert(values, layers, threshold, top, tail_cut, addresses, lengths, positions, work, hardware)
            if kind == F16:
                for k in range(_GROUP):
                    lows[k] = np.uint16(0)
                if layers > lay.TAIL:
                    groups.add_lows(group, addresses, lows, work)
                words.halves_from_words(values, lows)
            if streams.patch_outliers(values, group - first, size, addresses, outliers_end, positions, work):
                return _BAD_OUTLIERS
            if layers > lay.TAIL and groups.records(
                values, size, kind, threshold + tail_cut - 1, addresses, lengths, positions, work
            ):
                return _BAD_RECORDS
            if not direct:
                groups.store(values, out, start, size, kind, layers > lay.LOW, addresses, work)
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
    out, work = unowned(out), unowned_rows(work)
    clear(work[ZEROS])
    temporary = words_from(work, VALUES, 16)
    lows = words_from(work, LOWS, 16)
    blocks = (count + lay.BLOCK - 1) // lay.BLOCK
    begin, end = stream_end(held), stream_end(layers)
    planes_end = min(layers, lay.TAIL)
    tail = held <= lay.TAIL < layers
    if held >= lay.TAIL and not tail:
        groups.merge_low_bits(out, count, addresses)
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
            values = temporary
            if direct:
                values = out[start : start + _GROUP]
            else:
                groups.load(out, start, size, kind, values, lows)
            if held < planes_end:
                groups.refine_group(
                    values, group, held, planes_end, threshold, top, tail_cut, addresses, lengths, positions, work,
                    hardware,
                )  # fmt: skip
            if tail:
                groups.complete_group(values, threshold, top, tail_cut, addresses, lengths, positions, work, hardware)
            if kind == F16:
                if tail:
                    groups.add_lows(group, addresses, lows, work)
                words.halves_from_words(values, lows)
            if tail and groups.records(
                values, size, kind, threshold + tail_cut - 1, addresses, lengths, positions, work
            ):
                return _BAD_RECORDS
            if not direct:
                groups.store(values, out, start, size, kind, layers > lay.LOW, addresses, work)
        bad = streams.streams_end(offsets, lengths, block, blocks, begin, end, positions)
        if bad:
            return bad
    return 0
