"""What happens to the words of one group of 4,096 weights: bits to digits, digits to words, words refined in place.

Working memory is `work`, uint64[ROWS, 64]: a row holds one bit plane of a group, or a quarter of its words. Seen as
uint16, bit j of element i of a plane belongs to weight j * 256 + i, so that every inner loop runs over neighbours with
one constant shift; as uint64, four such elements are worked on at a time.

Everything here is arithmetic on the bits of a word. Between layers a word carries its own state: a weight whose digits
end at exponent t reads (digits + 1/2) * 2^t, so its lowest set bit marks how far it is known.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import njit

from holoray.kernels.bits import float_bits

U: Final = np.uint64
LANES: Final = np.uint64(0x0001000100010001)

# Rows of the working memory.
DIGITS: Final = 0
"""16 rows, transposed in place between planes and words."""
WORDS: Final = 16
"""16 rows = uint16[4096]: the digits of every weight. `assemble` reads one row of digits more than DIGITS has."""
REACHED: Final = 32
"""16 rows: row p marks the weights significant by plane p."""
SIGNIFICANT: Final = 48
NEGATIVE: Final = 49
MASK: Final = 50
LONE: Final = 51
"""Weights of which nothing but a leading digit in the last place is known."""
SPARE: Final = 52
"""3 rows: the end of a stream, followed by zeros."""
ZEROS: Final = 55
"""A row that is always 0."""
VALUES: Final = 56
"""16 rows = uint16[4096]: resident words, where the output holds something else."""
LOWS: Final = 72
"""16 rows = uint16[4096]: the mantissa bits of float16 that words lack."""
RANKS: Final = 88
"""17 rows = uint16[4352]: ranks of the weights below the tail cut."""
ROWS: Final = 105

LONE_DIGIT: Final = 1.4609375
"""What a lone leading digit reads: the centroid of a Laplacian's [1, 2)."""
ONE_MANTISSA: Final = 59
"""The mantissa of that."""
HALF_MANTISSA: Final = 64
HALF_BIAS: Final = 112 << 7


@njit(nogil=True, cache=True)
def clear(row: Any) -> None:
    """Make a row zero (plain loops compile in a fraction of the time that slices take)."""
    for i in range(64):
        row[i] = U(0)


@njit(nogil=True, cache=True)
def _exchange(a: Any, b: Any, shift: Any, keep: Any) -> None:
    """Exchange the bits of `a` that lie `shift` above `keep` with the bits of `b` at `keep`."""
    for i in range(64):
        x, y = a[i], b[i]
        t = ((x >> shift) ^ y) & keep
        b[i] = y ^ t
        a[i] = x ^ (t << shift)


@njit(nogil=True, cache=True)
def _exchange4(a: Any, b: Any, c: Any, d: Any, shift: Any, keep: Any, keep2: Any) -> None:
    """`_exchange` of (a, b) and (c, d) by `shift`, then of (a, c) and (b, d) by twice that: half the memory traffic."""
    twice = shift + shift
    for i in range(64):
        p, q, r, s = a[i], b[i], c[i], d[i]
        t = ((p >> shift) ^ q) & keep
        q ^= t
        p ^= t << shift
        t = ((r >> shift) ^ s) & keep
        s ^= t
        r ^= t << shift
        t = ((p >> twice) ^ r) & keep2
        c[i] = r ^ t
        a[i] = p ^ (t << twice)
        t = ((q >> twice) ^ s) & keep2
        d[i] = s ^ t
        b[i] = q ^ (t << twice)


@njit(nogil=True, cache=True)
def transpose(work: Any, base: int, size: int) -> None:
    """Transpose the size x size bit matrices in rows base..base+size-1 (size 1, 2, 4, 8 or 16).

    Row b, bit j moves to row j, bit b within each aligned stretch of `size` bits.
    """
    if size == 2:
        _exchange(work[base], work[base + 1], U(1), U(0x5555555555555555))
    if size >= 4:
        for b in range(base, base + size, 4):
            keep, keep2 = U(0x5555555555555555), U(0x3333333333333333)
            _exchange4(work[b], work[b + 1], work[b + 2], work[b + 3], U(1), keep, keep2)
    if size == 8:
        for b in range(base, base + 4):
            _exchange(work[b], work[b + 4], U(4), U(0x0F0F0F0F0F0F0F0F))
    if size == 16:
        for b in range(base, base + 4):
            keep, keep2 = U(0x0F0F0F0F0F0F0F0F), U(0x00FF00FF00FF00FF)
            _exchange4(work[b], work[b + 4], work[b + 8], work[b + 12], U(4), keep, keep2)


@njit(nogil=True, cache=True)
def matrix_size(planes: int) -> int:
    """The smallest matrix that `transpose` knows with room for so many planes."""
    size = 1
    while size < planes:
        size *= 2
    return size


@njit(nogil=True, cache=True)
def planes_to_words(work: Any, planes: int) -> int:
    """Turn `planes` rows from DIGITS on (least significant first) into words; returns the row where they begin."""
    size = matrix_size(planes)
    for b in range(planes, size):
        clear(work[DIGITS + b])
    transpose(work, DIGITS, size)
    if size == 16:
        return DIGITS
    lanes = LANES * U((1 << size) - 1)
    for j in range(16):
        source, target = work[DIGITS + (j & (size - 1))], work[WORDS + j]
        shift = U(j & ~(size - 1))
        for i in range(64):
            target[i] = (source[i] >> shift) & lanes
    return WORDS


@njit(nogil=True, cache=True)
def words_to_planes(work: Any, words: int, size: int) -> None:
    """Turn words of `size` bits in the 16 rows from `words` on into `size` plane rows from DIGITS on."""
    if size < 16:
        for b in range(size):
            target = work[DIGITS + b]
            clear(target)
            for j in range(b, 16, size):
                source = work[words + j]
                for i in range(64):
                    target[i] |= source[i] << U(j - b)
    elif words != DIGITS:
        for b in range(16):
            source, target = work[words + b], work[DIGITS + b]
            for i in range(64):
                target[i] = source[i]
    transpose(work, DIGITS, size)


@njit(nogil=True, cache=True, inline="always")
def digits_word(digits: Any, one: Any, fill: Any, lone: Any, bias: Any) -> Any:
    """The top 16 bits of float32(digits + fill) plus `bias`; of `lone` where digits == one, 0 where they are 0."""
    value = np.float32(digits) + fill
    value = lone if digits == one else value
    word = np.uint16(np.uint16(float_bits(value) >> np.uint32(16)) + bias)
    return np.uint16(0) if digits == 0 else word


@njit(nogil=True, cache=True)
def significant_plane(values: Any, plane: Any) -> None:
    """Mark in `plane` (uint64[64]) the words that are not zero (`values` is uint64[1024])."""
    low, high = U(0x7FFF7FFF7FFF7FFF), U(0x8000800080008000)
    clear(plane)
    for j in range(16):
        row, shift = values[64 * j : 64 * (j + 1)], U(15 - j)
        for i in range(64):
            plane[i] |= ((((row[i] & low) + low) | row[i]) & high) >> shift


@njit(nogil=True, cache=True)
def refine(values: Any, plane: Any, negative: Any, threshold: int, exponent: int, top: int) -> None:
    """Add one more digit, at `exponent` relative to the threshold, to resident words (uint16[4096]) in place.

    The known digits of a word end in its lowest set bit, the fill 1/2. The next digit 1 keeps that bit, 0 clears it,
    and the new fill is the bit below. A weight not yet significant becomes so where its digit is 1.
    """
    previous = threshold + exponent + 1
    limit = np.uint16((threshold + min(top, exponent + 8)) << 7)
    lone, half = np.uint16(previous << 7 | ONE_MANTISSA), np.uint16(previous << 7 | HALF_MANTISSA)
    newly = np.uint16((previous - 1) << 7 | ONE_MANTISSA)
    for j in range(16):
        target = values[j * 256 : (j + 1) * 256]
        for i in range(256):
            # Shifts by a constant keep 16-bit lanes; 16 rotations bring the planes back.
            word, bits, signs = target[i], plane[i], negative[i]
            sign = np.uint16(signs << np.uint16(15))
            digit = np.uint16(bits & np.uint16(1))
            plane[i] = np.uint16(np.uint16(bits >> np.uint16(1)) | np.uint16(bits << np.uint16(15)))
            negative[i] = np.uint16(np.uint16(signs >> np.uint16(1)) | sign)
            magnitude = np.uint16(word & np.uint16(0x7FFF))
            known = half if magnitude == lone else magnitude
            fill = np.uint16(known & np.uint16(-known))
            cleared = np.uint16(0) if digit != 0 else fill
            refined = np.uint16(known + np.uint16(fill >> np.uint16(1)) - cleared)
            refined = np.uint16(refined | np.uint16(word & np.uint16(0x8000)))
            fresh = np.uint16(newly | sign) if digit != 0 else np.uint16(0)
            refined = fresh if magnitude == 0 else refined
            target[i] = word if magnitude >= limit else refined


@njit(nogil=True, cache=True)
def known_digits(values: Any, classes: Any, threshold: int, top: int, tail_cut: int) -> None:
    """classes[k] = 8 + the number of digits known after the leading one (7: complete), 0 for zero (uint16[4096])."""
    base = np.uint16(threshold + tail_cut)
    limit = np.uint16((threshold + min(top, tail_cut + 7)) << 7)
    for k in range(4096):
        magnitude = np.uint16(values[k] & np.uint16(0x7FFF))
        digits = np.uint16(np.uint16(magnitude >> np.uint16(7)) - base)
        digits = np.uint16(7) if magnitude >= limit else digits
        classes[k] = np.uint16(0) if magnitude == 0 else np.uint16((digits & np.uint16(7)) | np.uint16(8))


@njit(nogil=True, cache=True)
def tail_mask(work: Any, r: int) -> None:
    """MASK = the weights that have a digit r below the tail cut, from the planes of `known_digits` (r = 1..7)."""
    k0, k1, k2, known = work[DIGITS], work[DIGITS + 1], work[DIGITS + 2], work[DIGITS + 3]
    mask = work[MASK]
    most = 7 - r
    a = U(0) - U(most & 1)
    b = U(0) - U(most >> 1 & 1)
    c = U(0) - U(most >> 2 & 1)
    for i in range(64):
        # k <= most, compared bit by bit from the highest.
        equal2 = ~(k2[i] ^ c)
        equal1 = ~(k1[i] ^ b)
        below = (~k2[i] & c) | (equal2 & ((~k1[i] & b) | (equal1 & (~k0[i] | a))))
        mask[i] = below & known[i]


@njit(nogil=True, cache=True)
def complete(values: Any, digits: Any, threshold: int, top: int, tail_cut: int) -> None:
    """Replace the fill of resident words by their last mantissa digits (`digits`, 7 bits below the tail cut)."""
    base = threshold + tail_cut
    limit = np.uint16((threshold + min(top, tail_cut + 7)) << 7)
    lone, half = np.uint16(base << 7 | ONE_MANTISSA), np.uint16(base << 7 | HALF_MANTISSA)
    for k in range(4096):
        word = values[k]
        magnitude = np.uint16(word & np.uint16(0x7FFF))
        known = half if magnitude == lone else magnitude
        fill = np.uint16(known & np.uint16(-known))
        # The fill is 2^(6 - k) where k digits are known: multiplying by it shifts the digits into their place.
        mantissa = np.uint16(np.uint16(np.uint16(digits[k]) * fill) >> np.uint16(6))
        done = np.uint16(np.uint16(np.uint16(known - fill) + mantissa) | np.uint16(word & np.uint16(0x8000)))
        target = word if magnitude >= limit else done
        values[k] = target


@njit(nogil=True, cache=True)
def words_from_halves(halves: Any, values: Any, lows: Any) -> None:
    """Split float16 bits (normal numbers and zeros; uint16[n]) into words and the three bits that words lack."""
    for k in range(halves.size):
        half = halves[k]
        magnitude = np.uint16(half & np.uint16(0x7FFF))
        word = np.uint16((magnitude >> np.uint16(3)) + np.uint16(HALF_BIAS)) | np.uint16(half & np.uint16(0x8000))
        values[k] = np.uint16(0) if magnitude == 0 else np.uint16(word)
        lows[k] = np.uint16(half & np.uint16(7))


@njit(nogil=True, cache=True)
def halves_from_words(values: Any, lows: Any) -> None:
    """Turn words into float16 bits in place, with their three lowest bits."""
    for k in range(4096):
        word = values[k]
        magnitude = np.uint16(word & np.uint16(0x7FFF))
        half = np.uint16((magnitude - np.uint16(HALF_BIAS)) << np.uint16(3)) | np.uint16(word & np.uint16(0x8000))
        values[k] = np.uint16((np.uint16(0) if magnitude == 0 else np.uint16(half)) | lows[k])
