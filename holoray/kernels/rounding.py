"""What rounding does to transforms: keeping numbers in range, and telling when it would be felt."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import numpy.typing as npt

from holoray.kernels.sums import moments
from holoray.tensor import LARGEST, Array, dtype_name

UNFELT = 1e-6
"""Relative errors below this are not told apart."""


def scaling_exponent(weights: npt.NDArray[np.float32]) -> int:
    """0 for ordinary weights; else the exponent that brings the largest into [.5, 1): squares must not overflow."""
    exponent = largest_exponent(weights)
    return 0 if -40 <= exponent <= 40 else exponent


def largest_exponent(values: npt.NDArray[np.float32]) -> int:
    """The exponent e for which the largest of |values| / 2**e is in [.5, 1); 0 for nothing but zeros."""
    return int(np.frexp(max(float(np.max(values)), -float(np.min(values))))[1])


def scaled(weights: npt.NDArray[np.float32], exponent: int) -> npt.NDArray[np.float32]:
    """Weights / 2**exponent (the same array for 0)."""
    return np.ldexp(weights, -exponent) if exponent else weights


def through_half(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The float32 values after a way through float16; they must be in its range."""
    return values.astype(np.float16).astype(np.float32)


def store(weights: npt.NDArray[np.float32], out: Array, exponent: int) -> None:
    """Scale by 2**exponent, clip to finite values of `out`'s dtype, round to nearest even."""
    largest = LARGEST[dtype_name(out.dtype)]
    if exponent:
        with np.errstate(over="ignore"):
            weights = np.ldexp(weights.astype(np.float64), exponent)
    # A subset of coefficients may overshoot the largest weight; infinity would never come back from that.
    if exponent or out.dtype == np.float16:
        weights = np.clip(weights, -largest, largest)
    out[...] = weights


def is_faithful(array: Array, shares: npt.NDArray[np.float64], residual: float) -> bool:
    """Whether rounding partial results to the array's dtype leaves reported quality and relative error true.

    Gains are energies of coefficients; what is handed out is rounded. Rounding adds some eps^2 / 7 of the energy, which
    must not be felt beside the smallest error that a subset can have; and its correlation with the error, which a few
    dominating weights could have, must stay below 1e-4 of the energy.
    """
    eps = float(ml_dtypes.finfo(array.dtype).eps) / 2  # type: ignore[no-untyped-call]
    if eps < UNFELT:
        return True
    energy, fourth = moments(array)
    least = least_error(shares, residual, energy)
    return eps**2 / 7 * energy <= 0.01 * least and math.sqrt(fourth) * eps <= 1.2e-4 * energy


def least_error(shares: npt.NDArray[np.float64], residual: float, energy: float) -> float:
    """The smallest squared error of a partial result: one share missing, of those that are felt at all."""
    return residual + float(np.min(shares[shares > UNFELT**2 * energy], initial=energy))
