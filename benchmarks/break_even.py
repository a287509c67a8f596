"""Below which bandwidth one load beats another, from the times both took over links of several."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Final

_CRAWL: Final = 1e5  # bytes a second: slow enough for bytes to be all that counts


def break_even(ours: Mapping[float, float], theirs: Mapping[float, float], fewer_bytes: int) -> float:
    """Bytes a second below which `ours` is faster: 0 if it never is, infinity if it is at every bandwidth measured.

    Both map bytes a second (infinity: no limit) to seconds, for the same bandwidths. Between two of them, time is
    linear in the seconds that a byte takes; below the slowest, what we fetch less (`fewer_bytes`) counts in full.
    """
    lead = {1 / rate: theirs[rate] - ours[rate] for rate in ours}  # by seconds a byte
    slowest = max(lead)
    lead[1 / _CRAWL] = lead[slowest] + fewer_bytes * (1 / _CRAWL - slowest)
    slow_to_fast = sorted(lead, reverse=True)
    if lead[slow_to_fast[0]] < 0:
        return 0.0
    for slower, faster in pairwise(slow_to_fast):
        if lead[faster] < 0:
            return 1 / (faster + (slower - faster) * lead[faster] / (lead[faster] - lead[slower]))
    return math.inf
