"""The entropy code of bit planes: static Huffman codes for bytes whose bits are 1 with a known probability.

The bits of a plane are nearly independent, and how many of them are 1 says all that a code for its bytes has to know.
So no table travels: code k (1 to 52) is Huffman's for bytes of independent bits that are 1 with probability k/128, with
no codeword beyond 11 bits, canonical, least significant bit first. Decoders keep their tables for good.

A coded section is cut into chunks of 8 KiB of raw bytes (the last one shorter). A chunk begins with the number of its
code (u8); 0 means that its raw bytes follow as they are. Otherwise come the lengths in bytes of four streams
(little-endian u16) and the streams, each of which codes a quarter of the chunk (rounded up) and ends in zero bits.
"""

from __future__ import annotations

import struct
from collections import deque
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from holoray.errors import FormatError

CODES: Final = 52
DENSITY_UNIT: Final = 128
"""Code k is for a density of ones of k / DENSITY_UNIT."""
MAX_BITS: Final = 11
CHUNK: Final = 8192
STREAMS: Final = 4
STORED: Final = 0
HEAD: Final = struct.Struct(f"<{STREAMS}H")
CHUNK_HEAD_BYTES: Final = 1 + HEAD.size

_WEIGHT_BITS: Final = 40


@cache
def code_lengths() -> npt.NDArray[np.uint8]:
    """uint8[CODES + 1, 256]: codeword lengths by code and byte (row 0 is unused).

    Integers throughout, so that every machine finds the same code.
    """
    table = np.zeros((CODES + 1, 256), np.uint8)
    for code in range(1, CODES + 1):
        table[code] = _limited_lengths(code)
    return table


@cache
def codewords() -> npt.NDArray[np.uint16]:
    """uint16[CODES + 1, 256]: canonical codewords, first bit lowest."""
    table = np.zeros((CODES + 1, 256), np.uint16)
    for code in range(1, CODES + 1):
        word, before = 0, 0
        lengths = code_lengths()[code].tolist()
        for byte in sorted(range(256), key=lambda b: (lengths[b], b)):
            word <<= lengths[byte] - before
            before = lengths[byte]
            table[code, byte] = int(f"{word:0{before}b}"[::-1], 2)
            word += 1
    return table


@cache
def lookup() -> npt.NDArray[np.uint16]:
    """uint16[CODES + 1, 2^MAX_BITS]: byte << 8 | length of the codeword that the next MAX_BITS bits begin with."""
    table = np.zeros((CODES + 1, 1 << MAX_BITS), np.uint16)
    for code in range(1, CODES + 1):
        for byte, (word, length) in enumerate(zip(codewords()[code], code_lengths()[code], strict=True)):
            table[code, int(word) :: 1 << int(length)] = byte << 8 | int(length)
    return table


def stream_counts(count: int) -> tuple[int, ...]:
    """How many of the `count` bytes of a chunk each stream codes."""
    share = -(-count // STREAMS)
    return tuple(max(0, min(share, count - k * share)) for k in range(STREAMS))


def decode(data: Any, raw_bytes: int) -> bytes:
    """The raw bytes of a coded section: plain and slow. Raises FormatError where it is malformed."""
    view, out = memoryview(data).cast("B"), bytearray()
    position = 0
    while len(out) < raw_bytes:
        count = min(CHUNK, raw_bytes - len(out))
        code = view[position] if position < view.nbytes else CODES + 1
        if code == STORED:
            out += view[position + 1 : position + 1 + count]
            position += 1 + count
        elif code <= CODES and position + CHUNK_HEAD_BYTES <= view.nbytes:
            lengths = HEAD.unpack_from(view, position + 1)
            position += CHUNK_HEAD_BYTES
            for length, share in zip(lengths, stream_counts(count), strict=True):
                out += _decode_stream(code, view[position : position + length], length, share)
                position += length
        else:
            raise FormatError("a coded plane ends too early or names no code")
    if position != view.nbytes or len(out) != raw_bytes:
        raise FormatError(f"a coded plane has {view.nbytes} bytes instead of {position}")
    return bytes(out)


def _decode_stream(code: int, stream: memoryview, length: int, count: int) -> bytes:
    table, bits, position = lookup()[code], int.from_bytes(stream, "little"), 0
    out = bytearray()
    for _ in range(count):
        entry = int(table[bits >> position & (1 << MAX_BITS) - 1])
        out.append(entry >> 8)
        position += entry & 255
    if len(stream) != length or -(-position // 8) != length or bits >> position:
        raise FormatError("a stream of a coded plane is longer or shorter than its bytes")
    return bytes(out)


def _limited_lengths(code: int) -> list[int]:
    """Huffman's lengths; rare bytes count for more until no codeword is longer than MAX_BITS."""
    ones = [bin(byte).count("1") for byte in range(256)]
    exact = [code**n * (DENSITY_UNIT - code) ** (8 - n) for n in ones]
    scaled = [(weight << _WEIGHT_BITS) // DENSITY_UNIT**8 for weight in exact]
    floor = 1 << _WEIGHT_BITS - MAX_BITS - 2
    while True:
        lengths = _huffman_lengths([max(weight, floor) for weight in scaled])
        if max(lengths) <= MAX_BITS:
            return lengths
        floor *= 2


def _huffman_lengths(weights: list[int]) -> list[int]:
    """Huffman's algorithm with two queues; of equal weights the one that came first is joined first."""
    count = len(weights)
    order = sorted(range(count), key=lambda leaf: weights[leaf])
    queues = [deque((weights[leaf], leaf) for leaf in order), deque[tuple[int, int]]()]
    parents = [0] * (2 * count - 1)
    for node in range(count, 2 * count - 1):
        joined = 0
        for _ in range(2):
            leaves, joints = queues
            weight, child = (leaves if leaves and (not joints or leaves[0] <= joints[0]) else joints).popleft()
            joined += weight
            parents[child] = node
        queues[1].append((joined, node))
    depths = [0] * (2 * count - 1)
    for node in range(2 * count - 3, -1, -1):
        depths[node] = depths[parents[node]] + 1
    return depths[:count]
