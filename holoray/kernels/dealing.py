"""Dealing coefficients to fragments so that their energies are level, and putting them back (Numba)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from holoray.codecs.dealing import Deal

_MAX_SHIFTS_TRIED = 64

Raster = npt.NDArray[np.float32]
Offsets = npt.NDArray[np.int64]


def level_shifts(exact: Raster, stored: Raster, deal: Deal) -> tuple[Offsets, npt.NDArray[np.float64]]:
    """int64[groups]: the shifts that level the fragments' gains; and those gains, float64[fragments].

    `exact` and `stored` are float32[padded]. A coefficient c that is stored as r removes (2c - r)r of squared error.
    Greedily, the most gainful group first, the shift that levels best.
    """
    n = deal.fragments
    gains = np.zeros((deal.groups, n))
    _add_gains(exact, stored, deal.rotations(), deal.strip, gains)
    tried = np.arange(min(n, _MAX_SHIFTS_TRIED))
    rolled = (np.arange(n)[None, :] - tried[:, None]) % n
    loads = np.zeros(n)
    shifts = np.zeros(deal.groups, np.int64)
    for group in np.argsort(-gains.sum(axis=1), kind="stable"):
        candidates = gains[group][rolled]
        # sum((loads + c)^2) differs between candidates only in the product: the cheapest shift is the one that
        # puts much where little is. Not by BLAS, whose sums depend on its threads.
        best = int(np.argmin((candidates * loads).sum(axis=1)))
        shifts[group] = tried[best]
        loads += candidates[best]
    return shifts, loads


def deal_all(raster: Raster, deal: Deal, offsets: Offsets) -> list[Raster]:
    """Copies of every fragment's coefficients, each in raster order."""
    counts = [deal.count((int(offsets[-1]) + i) % deal.fragments) for i in range(deal.fragments)]
    ends = np.cumsum(counts)
    values = np.empty(deal.size, np.float32)
    _deal(raster, values, offsets, deal.strip, deal.size, ends - counts)
    return np.split(values, ends[:-1])


def gather(raster: Raster, deal: Deal, offsets: Offsets, fragment: int) -> Raster:
    """A copy of one fragment's coefficients, in raster order."""
    starts = (offsets + fragment) % deal.fragments
    values = np.empty(deal.count(int(starts[-1])), np.float32)
    _gather(raster, values, starts, deal.strip, deal.fragments, deal.size)
    return values


def scatter(raster: Raster, values: Raster, deal: Deal, offsets: Offsets, fragment: int) -> None:
    """Put a fragment's coefficients to their places in the raster."""
    values = np.require(values, requirements="A").view()
    values.flags.writeable = False  # one type for Numba, wherever the bytes come from
    _scatter(raster, values, (offsets + fragment) % deal.fragments, deal.strip, deal.fragments, deal.size)


@njit(nogil=True, cache=True)
def _add_gains(exact, stored, rotations, strip, gains):  # type: ignore[no-untyped-def]
    n = gains.shape[1]
    residues = np.empty(n)
    for s in range(rotations.size):
        residues[:] = 0.0
        for row in range(s * strip, (s + 1) * strip, n):
            for i in range(n):
                value = np.float64(stored[row + i])
                residues[i] += (2.0 * exact[row + i] - value) * value
        for i in range(n):
            gains[s % gains.shape[0], (i + rotations[s]) % n] += residues[i]


@njit(nogil=True, cache=True)
def _deal(raster, values, offsets, strip, size, places):  # type: ignore[no-untyped-def]
    n = places.size
    for s in range(offsets.size):
        for fragment in range(n):
            k = places[fragment]
            for place in range(s * strip + (offsets[s] + fragment) % n, min((s + 1) * strip, size), n):
                values[k] = raster[place]
                k += 1
            places[fragment] = k


@njit(nogil=True, cache=True)
def _gather(raster, values, offsets, strip, step, size):  # type: ignore[no-untyped-def]
    k = 0
    for s in range(offsets.size):
        for place in range(s * strip + offsets[s], min((s + 1) * strip, size), step):
            values[k] = raster[place]
            k += 1


@njit(nogil=True, cache=True)
def _scatter(raster, values, offsets, strip, step, size):  # type: ignore[no-untyped-def]
    k = 0
    for s in range(offsets.size):
        for place in range(s * strip + offsets[s], min((s + 1) * strip, size), step):
            raster[place] = values[k]
            k += 1


def warm() -> None:
    """Compile what decoding needs."""
    deal, raster = Deal(1, 1, 0), np.zeros(256, np.float32)
    offsets = np.zeros(1, np.int64)
    scatter(raster, gather(raster, deal, offsets, 0), deal, offsets, 0)
