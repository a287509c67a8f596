"""The entropy code of planes, fast: four streams at a time, several bytes a step where the code is short.

Sections are addresses and lengths into memory that the caller keeps alive; nothing outside them is read or written.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from numba import njit

from holoray.codecs.planes_density import (
    CHUNK,
    CHUNK_HEAD_BYTES,
    CODES,
    DENSITY_UNIT,
    MAX_BITS,
    STORED,
    STREAMS,
    code_lengths,
    codewords,
    lookup,
)
from holoray.kernels.bits import address_of, load_u8, load_u16, load_u64, popcount, store_u8, store_u64
from holoray.kernels.planes_words import U

SLACK: Final = 8
"""Bytes behind a decoded section that writing may touch."""
MALFORMED: Final = -1
TOO_LARGE: Final = -1

_INDEX: Final = np.uint64((1 << MAX_BITS) - 1)
_STEPS: Final = 57 // MAX_BITS
"""Lookups that one load of 57 bits serves."""
_PACKED: Final = 6
"""The most bytes that one lookup of several gives."""
_FLUSH_BITS: Final = 64 - MAX_BITS
"""How full a word may be with one more codeword to come."""
_SHORT_CODES: Final = 26
"""Codes up to this one are short enough for lookups of several bytes to pay."""


@cache
def tables() -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint64]]:
    """Lookups of one byte (uint16[CODES + 1, 2^MAX_BITS]) and of several (uint64[_SHORT_CODES + 1, 2^MAX_BITS]).

    An entry of several has up to 6 bytes, their number << 48 and their bits << 56.
    """
    singles = lookup()
    several = np.zeros((_SHORT_CODES + 1, 1 << MAX_BITS), np.uint64)
    _pack_lookups(singles, several)
    return singles, several


@cache
def encoding_tables() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16]]:
    """Lengths and codewords by code and byte."""
    return code_lengths(), codewords()


@njit(nogil=True, cache=True)
def _pack_lookups(singles: Any, several: Any) -> None:
    for code in range(1, several.shape[0]):
        for index in range(several.shape[1]):
            entry, used, count = U(0), np.int64(0), 0
            while count < _PACKED:
                single = np.int64(singles[code, index >> used])
                if used + (single & 255) > MAX_BITS:
                    break
                entry |= U(single >> 8) << U(8 * count)
                used += single & 255
                count += 1
            several[code, index] = entry | U(count) << U(48) | U(used) << U(56)


@njit(nogil=True, cache=True)
def decode_section(source: Any, nbytes: Any, out: Any, raw_bytes: Any, singles: Any, several: Any) -> Any:
    """Decode a section to `raw_bytes` bytes at `out` (and up to SLACK behind them); returns 0 or MALFORMED."""
    end, done = source + nbytes, 0
    starts, counts = np.zeros(STREAMS, np.int64), np.zeros(STREAMS, np.int64)
    while done < raw_bytes:
        count = min(CHUNK, raw_bytes - done)
        if source >= end:
            return MALFORMED
        code = np.int64(load_u8(source))
        if code == STORED:
            if source + 1 + count > end:
                return MALFORMED
            for i in range(count):
                store_u8(out + done + i, load_u8(source + 1 + i))
            source += 1 + count
        else:
            if code > CODES or source + CHUNK_HEAD_BYTES > end:
                return MALFORMED
            position = source + CHUNK_HEAD_BYTES
            for k in range(STREAMS):
                starts[k] = position
                position += np.int64(load_u16(source + 1 + 2 * k))
            if position > end:
                return MALFORMED
            if not _decode_chunk(code, starts, position, end, out + done, count, counts, singles, several):
                return MALFORMED
            source = position
        done += count
    return 0 if source == end else MALFORMED


@njit(nogil=True, cache=True)
def _decode_chunk(
    code: Any, starts: Any, stop: Any, end: Any, out: Any, count: Any, done: Any, singles: Any, several: Any
) -> Any:
    """Decode the streams that begin at `starts` and end at `stop`; `done` (int64[STREAMS]) is working memory."""
    share = (count + STREAMS - 1) // STREAMS
    positions = np.zeros(STREAMS, np.int64)
    for k in range(STREAMS):
        positions[k] = 8 * starts[k]
        done[k] = 0
    if code <= _SHORT_CODES:
        _decode_several(several[code], positions, end, out, share, count, done)
    else:
        _decode_single(singles[code], positions, end, out, share, count, done)
    for k in range(STREAMS):
        left = max(0, min(share, count - k * share))
        position = _finish(singles[code], positions[k], end, out + k * share, done[k], left)
        after = starts[k + 1] if k + 1 < STREAMS else stop
        if (position + 7) >> 3 != after:
            return False
        if position & 7 and load_u8(position >> 3) >> np.uint8(position & 7):
            return False
    return True


@njit(nogil=True, cache=True)
def _decode_single(table: Any, positions: Any, end: Any, out: Any, share: Any, count: Any, done: Any) -> None:
    """One byte a lookup, four streams side by side, as long as all have enough bits and bytes left."""
    p0, p1, p2, p3 = positions[0], positions[1], positions[2], positions[3]
    o0, o1, o2, o3 = out, out + share, out + 2 * share, out + 3 * share
    last, low, lengths = 8 * (end - 8), U(255), U(63)
    # The last stream may be the shortest one.
    for _ in range((count - 3 * share) // _STEPS):
        if p0 > last or p1 > last or p2 > last or p3 > last:
            break
        x0, x1 = load_u64(p0 >> 3) >> U(p0 & 7), load_u64(p1 >> 3) >> U(p1 & 7)
        x2, x3 = load_u64(p2 >> 3) >> U(p2 & 7), load_u64(p3 >> 3) >> U(p3 & 7)
        a0, a1, a2, a3 = U(0), U(0), U(0), U(0)
        for step in range(_STEPS):
            t0, t1 = U(table[x0 & _INDEX]), U(table[x1 & _INDEX])
            t2, t3 = U(table[x2 & _INDEX]), U(table[x3 & _INDEX])
            store_u8(o0 + step, np.uint8(t0 >> U(8)))
            store_u8(o1 + step, np.uint8(t1 >> U(8)))
            store_u8(o2 + step, np.uint8(t2 >> U(8)))
            store_u8(o3 + step, np.uint8(t3 >> U(8)))
            x0, x1, x2, x3 = x0 >> (t0 & lengths), x1 >> (t1 & lengths), x2 >> (t2 & lengths), x3 >> (t3 & lengths)
            a0, a1, a2, a3 = a0 + t0, a1 + t1, a2 + t2, a3 + t3
        o0, o1, o2, o3 = o0 + _STEPS, o1 + _STEPS, o2 + _STEPS, o3 + _STEPS
        # Lengths are summed in the low byte: five times 11 do not overflow it.
        p0, p1 = p0 + np.int64(a0 & low), p1 + np.int64(a1 & low)
        p2, p3 = p2 + np.int64(a2 & low), p3 + np.int64(a3 & low)
    for k in range(STREAMS):
        done[k] = o0 - out
    positions[0], positions[1], positions[2], positions[3] = p0, p1, p2, p3


@njit(nogil=True, cache=True)
def _decode_several(table: Any, positions: Any, end: Any, out: Any, share: Any, count: Any, done: Any) -> None:
    """Up to six bytes a lookup, four streams side by side, as long as all have enough bits and bytes left."""
    p0, p1, p2, p3 = positions[0], positions[1], positions[2], positions[3]
    o0, o1, o2, o3 = out, out + share, out + 2 * share, out + 3 * share
    last, number = 8 * (end - 8), U(15)
    # A step writes 8 bytes and keeps at most 6: room for all steps, and nothing of the next stream is overwritten.
    room = _PACKED * (_STEPS - 1) + 8
    e0, e1, e2, e3 = o1 - room, o2 - room, o3 - room, out + count - room
    while o0 <= e0 and o1 <= e1 and o2 <= e2 and o3 <= e3:
        if p0 > last or p1 > last or p2 > last or p3 > last:
            break
        x0, x1 = load_u64(p0 >> 3) >> U(p0 & 7), load_u64(p1 >> 3) >> U(p1 & 7)
        x2, x3 = load_u64(p2 >> 3) >> U(p2 & 7), load_u64(p3 >> 3) >> U(p3 & 7)
        for _ in range(_STEPS):
            t0, t1, t2, t3 = table[x0 & _INDEX], table[x1 & _INDEX], table[x2 & _INDEX], table[x3 & _INDEX]
            store_u64(o0, t0)
            store_u64(o1, t1)
            store_u64(o2, t2)
            store_u64(o3, t3)
            n0, n1, n2, n3 = t0 >> U(56), t1 >> U(56), t2 >> U(56), t3 >> U(56)
            x0, x1, x2, x3 = x0 >> n0, x1 >> n1, x2 >> n2, x3 >> n3
            p0, p1, p2, p3 = p0 + np.int64(n0), p1 + np.int64(n1), p2 + np.int64(n2), p3 + np.int64(n3)
            o0 += np.int64(t0 >> U(48) & number)
            o1 += np.int64(t1 >> U(48) & number)
            o2 += np.int64(t2 >> U(48) & number)
            o3 += np.int64(t3 >> U(48) & number)
    done[0], done[1], done[2], done[3] = o0 - out, o1 - out - share, o2 - out - 2 * share, o3 - out - 3 * share
    positions[0], positions[1], positions[2], positions[3] = p0, p1, p2, p3


@njit(nogil=True, cache=True)
def _finish(table: Any, position: Any, end: Any, out: Any, done: Any, count: Any) -> Any:
    """Decode the rest of a stream byte by byte; returns the bit position behind it, at most a word beyond `end`."""
    for i in range(done, count):
        at = position >> 3
        bits = U(0)
        if at + 8 <= end:
            bits = load_u64(at) >> U(position & 7)
        else:
            for k in range(max(end - at, 0)):
                bits |= U(load_u8(at + k)) << U(8 * k)
            bits >>= U(position & 7)
        entry = np.int64(table[bits & _INDEX])
        store_u8(out + i, np.uint8(entry >> 8))
        position += entry & 255
        if position > 8 * end:
            return 8 * (end + 8)
    return position


@njit(nogil=True, cache=True)
def density(words: Any) -> Any:
    """The code that suits the bits of a plane (uint64[n]) on the whole: their density, rounded."""
    ones = 0
    for i in range(words.size):
        ones += popcount(words[i])
    return (ones * DENSITY_UNIT + 32 * words.size) // (64 * words.size)


@njit(nogil=True, cache=True)
def encode_section(source: Any, out: Any, limit: Any, lengths: Any, codes: Any) -> Any:
    """Code the bytes of `source` (uint8[n]) into `out` (uint8[limit + CHUNK + SLACK]); returns the number of bytes.

    TOO_LARGE where that is more than `limit`.
    """
    counts = np.zeros(256, np.int64)
    size = 0
    for start in range(0, source.size, CHUNK):
        chunk = source[start : start + CHUNK]
        code = _best_code(chunk, counts, lengths)
        if code == STORED:
            size = _store_chunk(chunk, out, size, limit)
        else:
            size = _encode_chunk(chunk, out, size, limit, lengths[code], codes[code], code)
        if size == TOO_LARGE:
            return TOO_LARGE
    return size


@njit(nogil=True, cache=True)
def _best_code(chunk: Any, counts: Any, lengths: Any) -> Any:
    """The code of the fewest bits for a chunk (the lowest of equal ones), STORED where none saves anything."""
    counts[:] = 0
    ones = 0
    for i in range(chunk.size):
        counts[chunk[i]] += 1
    for byte in range(256):
        ones += counts[byte] * popcount(U(byte))
    near = (ones * DENSITY_UNIT + 4 * chunk.size) // (8 * chunk.size)
    best, least = STORED, 8 * chunk.size
    for code in range(max(1, near - 2), min(CODES, near + 2) + 1):
        bits = 8 * (CHUNK_HEAD_BYTES + STREAMS)
        for byte in range(256):
            bits += counts[byte] * np.int64(lengths[code, byte])
        if bits < least:
            best, least = code, bits
    return best


@njit(nogil=True, cache=True)
def _store_chunk(chunk: Any, out: Any, size: Any, limit: Any) -> Any:
    if size + 1 + chunk.size > limit:
        return TOO_LARGE
    out[size] = STORED
    for i in range(chunk.size):
        out[size + 1 + i] = chunk[i]
    return size + 1 + chunk.size


@njit(nogil=True, cache=True)
def _encode_chunk(chunk: Any, out: Any, size: Any, limit: Any, lengths: Any, codes: Any, code: Any) -> Any:
    """Append a coded chunk; its streams are shorter than the chunk, so `out` has room for them behind `limit`."""
    out[size] = code
    share = (chunk.size + STREAMS - 1) // STREAMS
    address, at = address_of(out), size + CHUNK_HEAD_BYTES
    for k in range(STREAMS):
        first = at
        word, filled = U(0), np.int64(0)
        for i in range(min(k * share, chunk.size), min((k + 1) * share, chunk.size)):
            byte = chunk[i]
            word |= U(codes[byte]) << U(filled)
            filled += np.int64(lengths[byte])
            if filled >= _FLUSH_BITS:
                store_u64(address + at, word)
                at += filled >> 3
                word >>= U(filled & ~7)
                filled &= 7
        store_u64(address + at, word)
        at += (filled + 7) >> 3
        out[size + 1 + 2 * k] = np.uint8((at - first) & 255)
        out[size + 2 + 2 * k] = np.uint8((at - first) >> 8)
    return at if at <= limit else TOO_LARGE
