"""Decoding one group of a run: planes and streams in, words out.

Sections are addresses and lengths (int64[SECTIONS]), streams have positions (int64[STREAMS]); `work` is the working
memory of `planes_words`.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import njit

from holoray.codecs import planes_layout as lay
from holoray.kernels import planes_streams as streams
from holoray.kernels import planes_words as words
from holoray.kernels.bits import array_at, words_from
from holoray.kernels.planes_assemble import assemble, words_from_bits
from holoray.kernels.planes_streams import deposit_stream, load_plane
from holoray.kernels.planes_words import DIGITS, LONE, MASK, NEGATIVE, RANKS, REACHED, SIGNIFICANT, ZEROS, clear

BF16: Final = 0
F16: Final = 1
F32: Final = 2
KINDS: Final = {"BF16": BF16, "F16": F16, "F32": F32}


@njit(nogil=True, cache=True)
def layer_end(layer: int, top: int, tail_cut: int) -> int:
    """The first plane that layers 0..layer (0 to 4) do not have."""
    return top + 1 + layer if layer < 4 else top - tail_cut


@njit(nogil=True, cache=True)
def digits(group: int, layers: int, top: int, tail_cut: int, addresses: Any, work: Any) -> None:
    """Load the planes of a group, the highest first, and mark in REACHED what is significant by each."""
    planes = layer_end(layers - 1, top, tail_cut)
    for p in range(planes):
        row, reached = work[DIGITS + p], work[REACHED + p]
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
def signs(
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
    negative = work[NEGATIVE]
    clear(negative)
    for layer in range(held, layers):
        upper = work[REACHED + layer_end(layer, top, tail_cut) - 1]
        lower = work[REACHED + layer_end(layer - 1, top, tail_cut) - 1] if layer else work[ZEROS]
        section, stream = lay.SIGNS + layer, layer + 1 if layer else 0
        positions[stream] = deposit_stream(
            addresses[section], lengths[section], positions[stream], upper, lower, negative, work, False, hardware
        )


@njit(nogil=True, cache=True)
def convert(
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
    """Turn the digits loaded, and those of the tail if there is one, into words (uint16[4096])."""
    planes = layer_end(min(layers, lay.TAIL) - 1, top, tail_cut)
    lone = work[LONE]
    clear(lone)
    if layers > lay.TAIL:
        _tail_planes(planes, addresses, lengths, positions, work, hardware)
        planes += lay.TAIL_PLANES
    else:
        # The fill: one more digit, a 1, below those of each significant weight.
        before = work[REACHED + planes - 2] if planes > 1 else work[ZEROS]
        fill, significant = work[DIGITS + planes], work[SIGNIFICANT]
        for i in range(64):
            fill[i] = significant[i]
            lone[i] = significant[i] & ~before[i]
        planes += 1
    for p in range(planes, lay.WORD_BITS + 1):
        clear(work[DIGITS + p])
    flat = work.reshape(-1)
    assemble(flat, threshold + top - 1)
    words_from_bits(flat)
    source = words_from(work, DIGITS, 16)
    for k in range(lay.GROUP):
        values[k] = source[k]


@njit(nogil=True, cache=True)
def _tail_planes(planes: int, addresses: Any, lengths: Any, positions: Any, work: Any, hardware: bool) -> None:
    """Place the tail's digits below those of the planes; takers are the significant with fewer than 7 known."""
    for r in range(1, lay.TAIL_PLANES + 1):
        known = planes - 9 + r
        finished = work[REACHED + known] if known >= 0 else work[ZEROS]
        row = work[DIGITS + planes + r - 1]
        _take_tail(r, addresses, lengths, positions, work[SIGNIFICANT], finished, row, work, hardware)


@njit(nogil=True, cache=True)
def _take_tail(
    r: int,
    addresses: Any,
    lengths: Any,
    positions: Any,
    upper: Any,
    lower: Any,
    row: Any,
    work: Any,
    hardware: bool,
) -> None:
    section, stream = lay.TAIL_BITS + r - 1, lay.STREAM_TAIL + r - 1
    clear(row)
    positions[stream] = deposit_stream(
        addresses[section], lengths[section], positions[stream], upper, lower, row, work, r == 1, hardware
    )


@njit(nogil=True, cache=True)
def refine_group(
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
    words.significant_plane(values.view(np.uint64), before)
    for p in range(begin, end):
        row, reached = work[DIGITS + p], work[REACHED + p]
        load_plane(addresses[lay.PLANE + p] + group * lay.PLANE_BYTES, row)
        for i in range(64):
            reached[i] = row[i] | before[i]
        before = reached
    signs(held, layers, top, tail_cut, addresses, lengths, positions, work, hardware)
    negative = work[NEGATIVE].view(np.uint16)
    for p in range(begin, end):
        words.refine(values, work[DIGITS + p].view(np.uint16), negative, threshold, top - 1 - p, top)


@njit(nogil=True, cache=True)
def complete_group(
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
    words.known_digits(values, words_from(work, words.WORDS, 16), threshold, top, tail_cut)
    words.words_to_planes(work, words.WORDS, 4)
    significant, known = work[SIGNIFICANT], work[DIGITS + 3]
    for i in range(64):
        significant[i] = known[i]
    # The class planes lie where the digits will: the rows REACHED are free here.
    for r in range(1, lay.TAIL_PLANES + 1):
        words.tail_mask(work, r)
        row = work[REACHED + lay.TAIL_PLANES - r]
        _take_tail(r, addresses, lengths, positions, work[MASK], work[ZEROS], row, work, hardware)
    for b in range(lay.TAIL_PLANES):
        source, target = work[REACHED + b], work[DIGITS + b]
        for i in range(64):
            target[i] = source[i]
    at = words.planes_to_words(work, lay.TAIL_PLANES)
    words.complete(values, words_from(work, at, 16), threshold, top, tail_cut)


@njit(nogil=True, cache=True)
def add_lows(group: int, addresses: Any, lows: Any, work: Any) -> None:
    """OR the three low mantissa bits of a float16 group into `lows`."""
    for p in range(lay.HALF_PLANES):
        row = work[DIGITS + lay.HALF_PLANES - 1 - p]
        load_plane(addresses[lay.HALF_PLANE + p] + group * lay.PLANE_BYTES, row)
    at = words.planes_to_words(work, lay.HALF_PLANES)
    bits = words_from(work, at, 16)
    for k in range(lay.GROUP):
        lows[k] |= np.uint16(bits[k] & np.uint16(7))


@njit(nogil=True, cache=True)
def records(
    values: Any, size: int, kind: int, exponent: int, addresses: Any, lengths: Any, positions: Any, work: Any
) -> Any:
    """Write the weights below the tail cut; SIGNIFICANT must mark all others."""
    if size < lay.GROUP:
        padding = work[SIGNIFICANT].view(np.uint16)
        for k in range(size, lay.GROUP):
            padding[k & 255] |= np.uint16(1 << (k >> 8))
    ranks = words_from(work, RANKS, 17)
    count = streams.ranks_below(work, ranks)
    return streams.read_records(values, ranks, count, addresses, lengths, positions, exponent, kind == F16)


@njit(nogil=True, cache=True)
def load(out: Any, start: int, size: int, kind: int, values: Any, lows: Any) -> None:
    """Read the words of a group from the output into `values`, zeros behind them."""
    if kind == F32:
        for k in range(size):
            values[k] = out[2 * (start + k) + 1]
    elif kind == F16:
        words.words_from_halves(out[start : start + size], values, lows)
    else:
        for k in range(size):
            values[k] = out[start + k]
    for k in range(size, lay.GROUP):
        values[k] = np.uint16(0)
        lows[k] = np.uint16(0)


@njit(nogil=True, cache=True)
def store(values: Any, out: Any, start: int, size: int, kind: int, low: bool, addresses: Any, work: Any) -> None:
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
    target = words_from(work, RANKS, 17).view(np.uint8)
    source = array_at(address, 2 * size)
    for i in range(2 * size):
        target[i] = source[i]
    return target.view(np.uint16)


@njit(nogil=True, cache=True)
def merge_low_bits(out: Any, count: int, addresses: Any) -> None:
    """Write the low halves of an F32 run whose words are complete."""
    bytes_out = out.view(np.uint8)
    source = array_at(addresses[lay.LOW_BITS], 2 * count)
    for k in range(count):
        bytes_out[4 * k] = source[2 * k]
        bytes_out[4 * k + 1] = source[2 * k + 1]
