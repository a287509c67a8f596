"""Dealing: who gets which coefficient, so that *which* fragments arrive does not matter (ADR 0005).

The coefficients in raster order are cut into strips of a multiple of N. In a strip, position i goes to fragment
(i + rotation + shift) mod N: the rotation is pseudo-random (seeded) so that no comb of frequencies belongs to one
fragment (a plain stride leaves combs whenever N divides the width); the shift, one for a group of strips, was chosen by
the encoder so that all fragments carry nearly the same energy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

MAX_FRAGMENTS: Final = 1 << 12
MAX_GROUPS: Final = 1 << 10
_STRIP: Final = 256


@dataclass(frozen=True, slots=True)
class Deal:
    """Who gets which of `size` coefficients in raster order."""

    size: int
    fragments: int
    seed: int

    @property
    def strip(self) -> int:
        """Coefficients of a strip: the multiple of N next above 256."""
        return self.fragments * -(-_STRIP // self.fragments)

    @property
    def strips(self) -> int:
        return -(-self.size // self.strip)

    @property
    def padded(self) -> int:
        """Coefficients of all strips, the last one whole."""
        return self.strips * self.strip

    @property
    def groups(self) -> int:
        """Strip s belongs to group s mod `groups`: neighbours, which may hold much together, are levelled apart."""
        return min(self.strips, MAX_GROUPS)

    def rotations(self) -> npt.NDArray[np.int64]:
        """int64[strips]: pseudo-random rotation of each strip (splitmix64 of seed and strip)."""
        return self._rotations(0, self.strips)

    def offsets(self, shifts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """int64[strips]: where in each strip fragment 0 begins; its coefficients follow N apart.

        Fragment i begins at (offset + i) mod N.
        """
        of_strip = np.resize(shifts, self.strips)
        return (-self.rotations() - of_strip) % self.fragments

    def last_offset(self, shifts: npt.NDArray[np.int64]) -> int:
        """Offset of fragment 0 in the last strip, without computing the others: `size` may be an absurd claim."""
        last = self.strips - 1
        rotation = int(self._rotations(last, 1)[0])
        return (-rotation - int(shifts[last % self.groups])) % self.fragments

    def _rotations(self, first: int, count: int) -> npt.NDArray[np.int64]:
        return (splitmix64(self.seed, first, count) % np.uint64(self.fragments)).astype(np.int64)

    def count(self, last_offset: int) -> int:
        """Coefficients of a fragment whose offset in the last strip is `last_offset`."""
        in_last = self.size - (self.strips - 1) * self.strip
        before = (self.strips - 1) * (self.strip // self.fragments)
        return before + max(0, -(-(in_last - last_offset) // self.fragments))

    def places(self, offsets: npt.NDArray[np.int64], fragment: int) -> npt.NDArray[np.int64]:
        """Raster positions of the fragment's coefficients, ascending."""
        starts = np.arange(self.strips) * self.strip + (offsets + fragment) % self.fragments
        places = (starts[:, None] + np.arange(0, self.strip, self.fragments)).reshape(-1)
        return places[places < self.size]


def splitmix64(seed: int, first: int, count: int) -> npt.NDArray[np.uint64]:
    """Numbers first..first+count-1 of the sequence.

    Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014).
    """
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(first + 1, first + count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
