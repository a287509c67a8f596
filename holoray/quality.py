"""Quality: 1 - ||W - West||^2 / ||W||^2 over finite floating elements, from gains measured when encoding.

With energy E = ||W||^2, the squared error of a partial load is `residual + sum(gains of the fragments missing)`,
so quality is exact for every subset (`planes` counts a fragment only once its prerequisites are present).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from holoray.errors import UsageError
from holoray.tensor import DTYPES, FLOATING, Array, dtype_name

_ENERGY_BLOCK = 1 << 15


@dataclass(frozen=True, slots=True)
class Quality:
    """Squared error against signal energy, with the usual ways to say it. `complete`: every fragment is there."""

    energy: float
    error: float
    complete: bool = False

    @property
    def ratio(self) -> float:
        """1 - error / energy, at most 1; a tensor without energy has 1 once complete, else 0."""
        if self.energy <= 0.0:
            return 1.0 if self.complete else 0.0
        return 1.0 - max(self.error, 0.0) / self.energy

    @property
    def relative_error(self) -> float:
        """sqrt(error / energy): relative Frobenius error."""
        if self.energy <= 0.0:
            return 0.0 if self.complete else 1.0
        return math.sqrt(max(self.error, 0.0) / self.energy)

    @property
    def snr_db(self) -> float:
        """10 log10(energy / error) in dB; inf where nothing is missing."""
        relative = self.relative_error
        return math.inf if relative == 0.0 else -20.0 * math.log10(relative)

    def reaches(self, target: float) -> bool:
        """Whether this is at least `target`; 1 means everything."""
        return self.complete if target >= 1.0 else self.complete or self.ratio >= target


def check_target(quality: float) -> float:
    """Return a target quality unchanged if it lies in (0, 1]; raises UsageError otherwise."""
    if not 0.0 < quality <= 1.0:
        raise UsageError(f"quality {quality} is not in (0, 1]", hint="1 means every byte, .99 a first usable model")
    return quality


def finite_energy(array: Array) -> float:
    """Sum of squares of the finite elements in float64; 0 for dtypes that are not floating."""
    if dtype_name(array.dtype) not in FLOATING:
        return 0.0
    flat, total = array.reshape(-1), 0.0
    with np.errstate(invalid="ignore", over="ignore"):  # signalling NaNs; float64 values whose squares overflow
        for start in range(0, flat.size, _ENERGY_BLOCK):  # blocks that stay in the cache
            values = widened(flat[start : start + _ENERGY_BLOCK])
            energy = float(np.square(values, dtype=np.float64).sum())
            if not math.isfinite(energy):
                energy = float(np.square(values[np.isfinite(values)], dtype=np.float64).sum())
            total += energy
    return total


def widened(values: Array) -> Array:
    """The same values in a dtype that NumPy computes with; bfloat16 by a shift (its cast is ten times slower)."""
    if values.dtype == DTYPES["BF16"]:
        return (values.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.promote_types(values.dtype, np.float32) if values.dtype.kind == "f" else np.float32)
