"""How long a load takes over a link of some bandwidth, and below which bandwidth one load beats another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

_SLOWEST, _FASTEST = 1e6, 1e12  # bytes a second
_STEPS: Final = 100


@dataclass(frozen=True)
class Cost:
    """A load as three measured numbers: what it fetches, what it does besides waiting for that, what bounds it.

    `serial_s` is what it took at a low rate beyond the transfer itself, `floor_s` what it takes over a link that is no
    limit at all.
    """

    nbytes: int
    serial_s: float
    floor_s: float

    def seconds(self, rate: float) -> float:
        """At `rate` bytes a second: fetching and decoding overlap, so the slower of the two counts."""
        return max(self.nbytes / rate + self.serial_s, self.floor_s)


def break_even(ours: Cost, theirs: Cost) -> float:
    """Bytes a second below which `ours` is faster; 0 if it never is, infinity if it always is.

    By bisection: with fewer bytes ours is ahead on a slow link, and the lead changes hands at most once.
    """
    if ours.seconds(_SLOWEST) >= theirs.seconds(_SLOWEST):
        return 0.0
    if ours.seconds(_FASTEST) < theirs.seconds(_FASTEST):
        return math.inf
    low, high = _SLOWEST, _FASTEST
    for _ in range(_STEPS):
        middle = math.sqrt(low * high)
        if ours.seconds(middle) < theirs.seconds(middle):
            low = middle
        else:
            high = middle
    return low
