"""Digits of a group to finished words, plane by plane: 256 weights an instruction where vectors have 256 bits."""

from __future__ import annotations

from typing import Any

from numba import njit

from holoray.kernels.planes_words import LONE, NEGATIVE, U


@njit(nogil=True, cache=True)
def assemble(work: Any, leading: int) -> None:
    """Turn rows of digits into rows of words' bits (row b from DIGITS on = bit b), all weights of a row at once.

    `work` is the flat working memory (rows at constant distances are what lets the compiler use vectors). Rows DIGITS
    to DIGITS + 16 are the digits, the first one that of the exponent field `leading`; NEGATIVE is the signs.

    A weight's digits are shifted up until the first is a 1, by 8, 4, 2 and 1 places where it has to be: those four
    decisions are the binary distance of its exponent from `leading`. What follows that 1 is the mantissa.
    """
    k0, k1, k2, k3 = _spread(leading, 0), _spread(leading, 1), _spread(leading, 2), _spread(leading, 3)
    k4, k5, k6, k7 = _spread(leading, 4), _spread(leading, 5), _spread(leading, 6), _spread(leading, 7)
    for i in range(64):
        d0, d1, d2, d3 = work[i], work[64 + i], work[128 + i], work[192 + i]
        d4, d5, d6, d7 = work[256 + i], work[320 + i], work[384 + i], work[448 + i]
        d8, d9, d10, d11 = work[512 + i], work[576 + i], work[640 + i], work[704 + i]
        d12, d13, d14, d15 = work[768 + i], work[832 + i], work[896 + i], work[960 + i]
        d16 = work[1024 + i]
        by8 = ~(d0 | d1 | d2 | d3 | d4 | d5 | d6 | d7)
        d0 |= by8 & d8
        d1 |= by8 & d9
        d2 |= by8 & d10
        d3 |= by8 & d11
        d4 |= by8 & d12
        d5 |= by8 & d13
        d6 |= by8 & d14
        d7 |= by8 & d15
        d8 ^= by8 & (d8 ^ d16)
        d9 &= ~by8
        d10 &= ~by8
        d11 &= ~by8
        d12 &= ~by8
        d13 &= ~by8
        d14 &= ~by8
        by4 = ~(d0 | d1 | d2 | d3)
        d0 |= by4 & d4
        d1 |= by4 & d5
        d2 |= by4 & d6
        d3 |= by4 & d7
        d4 ^= by4 & (d4 ^ d8)
        d5 ^= by4 & (d5 ^ d9)
        d6 ^= by4 & (d6 ^ d10)
        d7 ^= by4 & (d7 ^ d11)
        d8 ^= by4 & (d8 ^ d12)
        d9 ^= by4 & (d9 ^ d13)
        d10 ^= by4 & (d10 ^ d14)
        by2 = ~(d0 | d1)
        d0 |= by2 & d2
        d1 |= by2 & d3
        d2 ^= by2 & (d2 ^ d4)
        d3 ^= by2 & (d3 ^ d5)
        d4 ^= by2 & (d4 ^ d6)
        d5 ^= by2 & (d5 ^ d7)
        d6 ^= by2 & (d6 ^ d8)
        d7 ^= by2 & (d7 ^ d9)
        d8 ^= by2 & (d8 ^ d10)
        by1 = ~d0
        d0 |= by1 & d1
        d1 ^= by1 & (d1 ^ d2)
        d2 ^= by1 & (d2 ^ d3)
        d3 ^= by1 & (d3 ^ d4)
        d4 ^= by1 & (d4 ^ d5)
        d5 ^= by1 & (d5 ^ d6)
        d6 ^= by1 & (d6 ^ d7)
        d7 ^= by1 & (d7 ^ d8)
        lone = work[64 * LONE + i]
        work[i], work[64 + i] = d7 | lone, d6 | lone
        work[128 + i], work[192 + i] = d5, d4 | lone
        work[256 + i], work[320 + i] = d3 | lone, d2 | lone
        work[384 + i] = d1 & ~lone
        # The exponent: leading - (8 by8 + 4 by4 + 2 by2 + by1), a subtraction with borrows; 0 for what has no digit.
        work[448 + i] = d0 & (k0 ^ by1)
        borrow = by1 & ~k0
        work[512 + i] = d0 & (k1 ^ by2 ^ borrow)
        borrow = (~k1 & (by2 | borrow)) | (by2 & borrow)
        work[576 + i] = d0 & (k2 ^ by4 ^ borrow)
        borrow = (~k2 & (by4 | borrow)) | (by4 & borrow)
        work[640 + i] = d0 & (k3 ^ by8 ^ borrow)
        borrow = (~k3 & (by8 | borrow)) | (by8 & borrow)
        work[704 + i] = d0 & (k4 ^ borrow)
        borrow &= ~k4
        work[768 + i] = d0 & (k5 ^ borrow)
        borrow &= ~k5
        work[832 + i] = d0 & (k6 ^ borrow)
        borrow &= ~k6
        work[896 + i] = d0 & (k7 ^ borrow)
        work[960 + i] = work[64 * NEGATIVE + i]


@njit(nogil=True, cache=True)
def words_from_bits(work: Any) -> None:
    """Turn the bits of words in the 16 rows from DIGITS on into words: a transposition of 16 x 16 bits, in registers.

    `work` is the flat working memory. In place: sixteen places written in turns would cost several times as much in
    memory that is not in the cache.
    """
    for i in range(64):
        b0, b1, b2, b3 = work[i], work[64 + i], work[128 + i], work[192 + i]
        b4, b5, b6, b7 = work[256 + i], work[320 + i], work[384 + i], work[448 + i]
        b8, b9, b10, b11 = work[512 + i], work[576 + i], work[640 + i], work[704 + i]
        b12, b13, b14, b15 = work[768 + i], work[832 + i], work[896 + i], work[960 + i]
        b0, b1 = _exchanged(b0, b1, U(1), U(0x5555555555555555))
        b2, b3 = _exchanged(b2, b3, U(1), U(0x5555555555555555))
        b4, b5 = _exchanged(b4, b5, U(1), U(0x5555555555555555))
        b6, b7 = _exchanged(b6, b7, U(1), U(0x5555555555555555))
        b8, b9 = _exchanged(b8, b9, U(1), U(0x5555555555555555))
        b10, b11 = _exchanged(b10, b11, U(1), U(0x5555555555555555))
        b12, b13 = _exchanged(b12, b13, U(1), U(0x5555555555555555))
        b14, b15 = _exchanged(b14, b15, U(1), U(0x5555555555555555))
        b0, b2 = _exchanged(b0, b2, U(2), U(0x3333333333333333))
        b1, b3 = _exchanged(b1, b3, U(2), U(0x3333333333333333))
        b4, b6 = _exchanged(b4, b6, U(2), U(0x3333333333333333))
        b5, b7 = _exchanged(b5, b7, U(2), U(0x3333333333333333))
        b8, b10 = _exchanged(b8, b10, U(2), U(0x3333333333333333))
        b9, b11 = _exchanged(b9, b11, U(2), U(0x3333333333333333))
        b12, b14 = _exchanged(b12, b14, U(2), U(0x3333333333333333))
        b13, b15 = _exchanged(b13, b15, U(2), U(0x3333333333333333))
        b0, b4 = _exchanged(b0, b4, U(4), U(0x0F0F0F0F0F0F0F0F))
        b1, b5 = _exchanged(b1, b5, U(4), U(0x0F0F0F0F0F0F0F0F))
        b2, b6 = _exchanged(b2, b6, U(4), U(0x0F0F0F0F0F0F0F0F))
        b3, b7 = _exchanged(b3, b7, U(4), U(0x0F0F0F0F0F0F0F0F))
        b8, b12 = _exchanged(b8, b12, U(4), U(0x0F0F0F0F0F0F0F0F))
        b9, b13 = _exchanged(b9, b13, U(4), U(0x0F0F0F0F0F0F0F0F))
        b10, b14 = _exchanged(b10, b14, U(4), U(0x0F0F0F0F0F0F0F0F))
        b11, b15 = _exchanged(b11, b15, U(4), U(0x0F0F0F0F0F0F0F0F))
        b0, b8 = _exchanged(b0, b8, U(8), U(0x00FF00FF00FF00FF))
        b1, b9 = _exchanged(b1, b9, U(8), U(0x00FF00FF00FF00FF))
        b2, b10 = _exchanged(b2, b10, U(8), U(0x00FF00FF00FF00FF))
        b3, b11 = _exchanged(b3, b11, U(8), U(0x00FF00FF00FF00FF))
        b4, b12 = _exchanged(b4, b12, U(8), U(0x00FF00FF00FF00FF))
        b5, b13 = _exchanged(b5, b13, U(8), U(0x00FF00FF00FF00FF))
        b6, b14 = _exchanged(b6, b14, U(8), U(0x00FF00FF00FF00FF))
        b7, b15 = _exchanged(b7, b15, U(8), U(0x00FF00FF00FF00FF))
        work[i], work[64 + i], work[128 + i], work[192 + i] = b0, b1, b2, b3
        work[256 + i], work[320 + i], work[384 + i], work[448 + i] = b4, b5, b6, b7
        work[512 + i], work[576 + i], work[640 + i], work[704 + i] = b8, b9, b10, b11
        work[768 + i], work[832 + i], work[896 + i], work[960 + i] = b12, b13, b14, b15


@njit(nogil=True, cache=True, inline="always")
def _exchanged(a: Any, b: Any, shift: Any, keep: Any) -> Any:
    """`a` and `b` with the bits of `a` that lie `shift` above `keep` and the bits of `b` at `keep` exchanged."""
    t = ((a >> shift) ^ b) & keep
    return a ^ (t << shift), b ^ t


@njit(nogil=True, cache=True, inline="always")
def _spread(number: int, bit: int) -> Any:
    """All ones if that bit of the number is set, else 0."""
    return U(0) - U(number >> bit & 1)
