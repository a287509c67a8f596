"""The fast Walsh-Hadamard transform of `projection`, in place on float32 vectors (Numba)."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from numba import njit, uint32, uint64

from holoray.codecs.dealing import splitmix64
from holoray.codecs.projection import SIGNS, block_size


def forward(x: npt.NDArray[np.float32], seed: int) -> None:
    """Turn float32[n] weights into coefficients: signs, then Hadamard, block by block; then the window at the end."""
    block = block_size(x.size)
    whole = x.size - x.size % block
    _signs_then_hadamard(x[:whole], block, splitmix64(seed ^ SIGNS[0], 0, -(-whole // 64)))
    if whole < x.size:
        _signs_then_hadamard(x[x.size - block :], block, splitmix64(seed ^ SIGNS[1], 0, -(-block // 64)))


def inverse(x: npt.NDArray[np.float32], seed: int) -> None:
    """Undo `forward`: the transposes of its steps in reverse order."""
    block = block_size(x.size)
    whole = x.size - x.size % block
    if whole < x.size:
        _hadamard_then_signs(x[x.size - block :], block, splitmix64(seed ^ SIGNS[1], 0, -(-block // 64)))
    _hadamard_then_signs(x[:whole], block, splitmix64(seed ^ SIGNS[0], 0, -(-whole // 64)))


@njit(nogil=True, cache=True)
def _signs_then_hadamard(x, block, words):  # type: ignore[no-untyped-def]
    for at in range(0, x.size, block):
        _apply_signs(x, at, block, words)
        _butterflies(x[at : at + block])


@njit(nogil=True, cache=True)
def _hadamard_then_signs(x, block, words):  # type: ignore[no-untyped-def]
    for at in range(0, x.size, block):
        _butterflies(x[at : at + block])
        _apply_signs(x, at, block, words)


@njit(nogil=True, cache=True)
def _apply_signs(x, start, block, words):  # type: ignore[no-untyped-def]
    """Multiply a block by its signs and by the scale that makes the Hadamard matrix orthonormal."""
    scale = np.float32(1 / math.sqrt(block))
    bits = x.view(np.uint32)
    run = min(block, 64)
    for at in range(start, start + block, run):
        word = words[at // 64] >> uint64(at % 64)
        for i in range(run):
            x[at + i] *= scale
            bits[at + i] ^= uint32((word >> uint64(i)) & uint64(1)) << uint32(31)


@njit(nogil=True, cache=True)
def _butterflies(x):  # type: ignore[no-untyped-def]
    """The Hadamard matrix without its scale; the first three steps in registers, where vectors cannot help."""
    half = 1
    if x.size >= 8:
        for i in range(0, x.size, 8):
            _eight(x[i : i + 8])
        half = 8
    while half < x.size:
        for at in range(0, x.size, 2 * half):
            _butterfly(x[at : at + half], x[at + half : at + 2 * half])
        half *= 2


@njit(nogil=True, cache=True, inline="always")
def _butterfly(first, second):  # type: ignore[no-untyped-def]
    for i in range(first.size):
        a, b = first[i], second[i]
        first[i] = a + b
        second[i] = a - b


@njit(nogil=True, cache=True, inline="always")
def _eight(x):  # type: ignore[no-untyped-def]
    a0, a1, a2, a3 = x[0] + x[1], x[0] - x[1], x[2] + x[3], x[2] - x[3]
    a4, a5, a6, a7 = x[4] + x[5], x[4] - x[5], x[6] + x[7], x[6] - x[7]
    b0, b1, b2, b3 = a0 + a2, a1 + a3, a0 - a2, a1 - a3
    b4, b5, b6, b7 = a4 + a6, a5 + a7, a4 - a6, a5 - a7
    x[0], x[1], x[2], x[3] = b0 + b4, b1 + b5, b2 + b6, b3 + b7
    x[4], x[5], x[6], x[7] = b0 - b4, b1 - b5, b2 - b6, b3 - b7


def warm() -> None:
    """Compile what decoding needs."""
    inverse(np.zeros(9, np.float32), 0)
