"""Reading the compacted streams of a group: bits by a mask, 12-bit records, outliers.

Sections are addresses and lengths into memory that the caller keeps alive. No read leaves a section, whatever its bytes
say; whether a stream had as many entries as it should is checked once a block, by `streams_end`.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import njit

from holoray.codecs import planes_layout as lay
from holoray.kernels.bits import (
    address_of,
    array_at,
    hardware_deposit,
    load_u8,
    load_u16,
    load_u64,
    popcount,
    table_deposit,
    trailing_zeros,
    words_from,
)
from holoray.kernels.planes_words import HALF_BIAS, SIGNIFICANT, SPARE, U

READ_AHEAD_BITS: Final = 4096 + 80
"""How far `deposit_stream` may read behind its position: a bit for every weight, and the slack of its loads."""
FAILED: Final = -1
_SURE_BITS: Final = 57
"""How many bits a load of 8 bytes has from any bit of its first byte on."""


@njit(nogil=True, cache=True)
def load_plane(address: int, row: Any) -> None:
    """Copy a plane of one group (512 bytes) into a row."""
    source, target = array_at(address, 512), row.view(np.uint8)
    for i in range(512):
        target[i] = source[i]


@njit(nogil=True, cache=True)
def deposit_stream(
    address: int, nbytes: int, position: int, upper: Any, lower: Any, out: Any, work: Any, dense: bool, hardware: bool
) -> Any:
    """OR the next bits of a stream into `out` at the places of `upper & ~lower`; returns the position behind them.

    All three are rows. `dense` tells that most words have a bit for nearly every place: whether a load of 57 bits is
    enough would then be guessed wrong too often. Everything is done in one loop of 8-byte accesses: wide loads of what
    narrow stores have just written would wait for them.
    """
    bit = position
    if position > 8 * nbytes - READ_AHEAD_BITS:
        address = _copy_end(address, nbytes, position >> 3, work)
        bit = position & 7
    start = bit
    if not hardware:
        for i in range(64):
            wanted = upper[i] & ~lower[i]
            out[i] |= table_deposit(_peek(address, bit), wanted)
            bit += popcount(wanted)
    elif dense:
        for i in range(64):
            wanted = upper[i] & ~lower[i]
            out[i] |= hardware_deposit(_peek(address, bit), wanted)
            bit += popcount(wanted)
    else:
        for i in range(64):
            wanted = upper[i] & ~lower[i]
            count, at, shift = popcount(wanted), address + (bit >> 3), U(bit & 7)
            bits = load_u64(at) >> shift
            if count > _SURE_BITS:
                bits |= (U(load_u8(at + 8)) << U(1)) << (U(63) - shift)
            out[i] |= hardware_deposit(bits, wanted)
            bit += count
    return position + bit - start


@njit(nogil=True, cache=True, inline="always")
def _peek(address: int, bit: int) -> Any:
    """The 64 bits at a bit position; reads 9 bytes."""
    at, shift = address + (bit >> 3), U(bit & 7)
    return (load_u64(at) >> shift) | ((U(load_u8(at + 8)) << U(1)) << (U(63) - shift))


@njit(nogil=True, cache=True)
def _copy_end(address: int, nbytes: int, skip: int, work: Any) -> Any:
    """Copy what a section has from byte `skip` on in front of zeros, and give the address of that."""
    spare = words_from(work, SPARE, 3).view(np.uint8)
    for i in range(1536):
        spare[i] = np.uint8(0)
    left = min(max(nbytes - skip, 0), READ_AHEAD_BITS // 8 + 1)
    source = array_at(address + skip, left)
    for i in range(left):
        spare[i] = source[i]
    return address_of(spare)


@njit(nogil=True, cache=True)
def ranks_below(work: Any, ranks: Any) -> Any:
    """List the ranks of the weights not marked in SIGNIFICANT (uint16[4352]); returns their number."""
    significant = work[SIGNIFICANT]
    count = 0
    for q in range(64):
        mask = ~significant[q]
        at, left = count, popcount(mask)
        count += left
        # Most words have few such weights: four unconditional writes cost less than one branch guessed wrong.
        while True:
            for _ in range(4):
                ranks[at] = np.uint16(64 * q + trailing_zeros(mask))
                mask &= mask - U(1)
                at += 1
            left -= 4
            if left <= 0:
                break
    return count


@njit(nogil=True, cache=True)
def read_records(
    values: Any,
    ranks: Any,
    count: int,
    addresses: Any,
    lengths: Any,
    positions: Any,
    exponent: int,
    half: bool,
) -> Any:
    """Write the words of the `count` weights below the tail cut; returns 0, or FAILED where a stream is too short.

    `exponent` is the exponent field of the largest of them. With `half` they are written as float16 on top of the low
    bits already there.
    """
    record, escape = positions[lay.STREAM_RECORDS], positions[lay.STREAM_ESCAPES]
    if (record + count) * lay.RECORD_BITS > 8 * lengths[lay.RECORDS]:
        return FAILED
    source, escapes = addresses[lay.RECORDS], addresses[lay.ESCAPES]
    escapes_end = lengths[lay.ESCAPES] // 2
    bit = record * lay.RECORD_BITS
    for n in range(count):
        bits = np.int64(load_u16(source + (bit >> 3))) >> (bit & 7)
        bit += lay.RECORD_BITS
        distance, rank = bits & 15, np.int64(ranks[n])
        place = (rank & 15) * 256 + (rank >> 4)
        if distance == lay.ESCAPE:
            if escape >= escapes_end:
                return FAILED
            values[place] = load_u16(escapes + 2 * escape)
            escape += 1
        else:
            magnitude = ((exponent - distance) << 7 | (bits >> 4 & 127)) & 0x7FFF
            if half:
                magnitude = ((magnitude - HALF_BIAS) << 3 & 0x7FFF) | (values[place] & 7)
            values[place] = np.uint16((bits >> 11 & 1) << 15 | magnitude)
    positions[lay.STREAM_RECORDS] = record + count
    positions[lay.STREAM_ESCAPES] = escape
    return 0


@njit(nogil=True, cache=True)
def patch_outliers(values: Any, group: int, count: int, addresses: Any, end: int, positions: Any, work: Any) -> Any:
    """Write the outliers of group 0..15 of a block (it has `count` weights); returns 0 or FAILED."""
    at = positions[lay.STREAM_OUTLIERS]
    significant = work[SIGNIFICANT].view(np.uint16)
    while at < end:
        place = np.int64(load_u16(addresses[lay.OUTLIER_PLACES] + 2 * at))
        if place >> 12 != group:
            break
        place &= 4095
        if place >= count:
            return FAILED
        values[place] = load_u16(addresses[lay.OUTLIER_VALUES] + 2 * at)
        significant[place & 255] |= np.uint16(1 << (place >> 8))
        at += 1
    positions[lay.STREAM_OUTLIERS] = at
    return 0


@njit(nogil=True, cache=True)
def stream_capacity(stream: int, lengths: Any) -> Any:
    """How many entries a stream can have, by the length of its section."""
    if stream == lay.STREAM_OUTLIERS:
        return min(lengths[lay.OUTLIER_PLACES], lengths[lay.OUTLIER_VALUES]) // 2
    if stream == lay.STREAM_RECORDS:
        return 8 * lengths[lay.RECORDS] // lay.RECORD_BITS
    if stream == lay.STREAM_ESCAPES:
        return lengths[lay.ESCAPES] // 2
    return 8 * lengths[stream_section(stream)]


@njit(nogil=True, cache=True)
def stream_section(stream: int) -> int:
    """The section of a compacted stream of bits."""
    if stream >= lay.STREAM_TAIL:
        return lay.TAIL_BITS + stream - lay.STREAM_TAIL
    return lay.SIGNS + (stream - 1 if stream > 0 else 0)


@njit(nogil=True, cache=True)
def streams_begin(offsets: Any, lengths: Any, block: int, first: int, end: int, positions: Any) -> int:
    """Set the positions of streams first..end-1 to the start of a block; returns 0, or the bad stream + 1."""
    for stream in range(first, end):
        start = np.int64(offsets[stream, block])
        if start > stream_capacity(stream, lengths) or (block == 0 and start != 0):
            return stream + 1
        positions[stream] = start
    return 0


@njit(nogil=True, cache=True)
def streams_end(offsets: Any, lengths: Any, block: int, blocks: int, first: int, end: int, positions: Any) -> int:
    """0 if streams first..end-1 stand where the block's offsets say, else the first bad stream + 1."""
    for stream in range(first, end):
        if positions[stream] != np.int64(offsets[stream, block + 1]):
            return stream + 1
        if block + 1 == blocks and not _is_whole(stream, positions[stream], lengths):
            return stream + 1
    return 0


@njit(nogil=True, cache=True)
def _is_whole(stream: int, position: int, lengths: Any) -> Any:
    """Whether a section is exactly as long as `position` entries of its stream."""
    if stream == lay.STREAM_OUTLIERS:
        return lengths[lay.OUTLIER_PLACES] == 2 * position and lengths[lay.OUTLIER_VALUES] == 2 * position
    if stream == lay.STREAM_RECORDS:
        return lengths[lay.RECORDS] == (position * lay.RECORD_BITS + 7) // 8
    if stream == lay.STREAM_ESCAPES:
        return lengths[lay.ESCAPES] == 2 * position
    return lengths[stream_section(stream)] == (position + 7) // 8
