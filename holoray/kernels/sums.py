"""Sums of squares in float64 and in a fixed order, a cache-resident block at a time (Numba)."""

from __future__ import annotations

import numpy as np
from numba import njit

from holoray.quality import widened
from holoray.tensor import Array

_BLOCK = 1 << 15
_LANES = 8  # sums that do not wait for each other


def squared_distance(a: Array, b: Array) -> float:
    """||a - b||^2 of two finite floating arrays of one shape, of at most 32 bits an element."""
    first, second = a.reshape(-1), b.reshape(-1)
    blocks = (slice(at, at + _BLOCK) for at in range(0, first.size, _BLOCK))
    return float(sum(_squared_distance(widened(first[block]), widened(second[block])) for block in blocks))


def moments(array: Array) -> tuple[float, float]:
    """Sums of the second and of the fourth powers, of a finite floating array of at most 32 bits an element."""
    flat, second, fourth = array.reshape(-1), 0.0, 0.0
    for at in range(0, flat.size, _BLOCK):
        squares, fourths = _moments(widened(flat[at : at + _BLOCK]))
        second, fourth = second + squares, fourth + fourths
    return second, fourth


@njit(nogil=True, cache=True)
def _squared_distance(a, b):  # type: ignore[no-untyped-def]
    sums = np.zeros(_LANES)
    whole = a.size - a.size % _LANES
    for at in range(0, whole, _LANES):
        for lane in range(_LANES):
            difference = np.float64(a[at + lane]) - np.float64(b[at + lane])
            sums[lane] += difference * difference
    for i in range(whole, a.size):
        difference = np.float64(a[i]) - np.float64(b[i])
        sums[0] += difference * difference
    return sums.sum()


@njit(nogil=True, cache=True)
def _moments(a):  # type: ignore[no-untyped-def]
    second, fourth = np.zeros(_LANES), np.zeros(_LANES)
    whole = a.size - a.size % _LANES
    for at in range(0, whole, _LANES):
        for lane in range(_LANES):
            square = np.float64(a[at + lane]) * np.float64(a[at + lane])
            second[lane] += square
            fourth[lane] += square * square
    for i in range(whole, a.size):
        square = np.float64(a[i]) * np.float64(a[i])
        second[0] += square
        fourth[0] += square * square
    return second.sum(), fourth.sum()
