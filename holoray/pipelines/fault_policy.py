"""What a load puts up with: how often and how long it tries, and how good its end must be."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from holoray.errors import UsageError


@dataclass(frozen=True, slots=True)
class FaultPolicy:
    """Bounds of a load from several sources. Raises UsageError for values without meaning.

    The first two are for any load; the others are for how sources are asked, and most people leave them alone.
    """

    skip_corrupted: bool = False
    """Go on without fragments of which no source has an honest copy, and without those that require them.

    Mandatory tensors cannot be left out. Every source must have said that it has no such copy: one that does not
    answer may have what the others lack.
    """
    min_quality: float = 0.0
    """With `skip_corrupted`: QualityError if the load ends below this quality (1: everything)."""

    max_retries: int = 8
    """Tries of one range that may fail before it is given up."""
    patience_s: float = 15.0
    """Seconds without any byte from anywhere before a load gives up."""
    deadline_s: float = 30.0
    """Seconds after which a try is abandoned at the latest; sooner where a source was faster so far."""
    slowest_bytes_per_s: float = 100e3
    """For n bytes under way, a source has n / slowest_bytes_per_s seconds more than that."""

    backoff_s: float = 0.1
    """Bound of the first wait after a failure; doubles. The wait itself is uniform below it (full jitter)."""
    max_backoff_s: float = 10.0
    """Bound of all waits."""
    retry_share: float = 0.2
    """Retries that each success pays for, and `retry_burst` that are free; besides, one a second."""
    retry_burst: int = 10

    hedge_share: float = 0.03
    """Bytes asked for a second time, for the slow tail, as a share of those received; 0 switches hedging off."""
    hedge_burst_bytes: int = 2 << 20
    """Bytes that may be hedged beyond this share."""
    hedge_factor: float = 2.0
    """Hedge what takes so many times what another source would need from now on, by its 95th percentile."""
    min_hedge_s: float = 0.02
    """Never hedge before so many seconds."""

    breaker_failures: int = 3
    """Failures in a row after which a source is left alone, but for one try now and then (half-open)."""
    breaker_s: float = 1.0
    """Seconds that it is left alone at least; doubles with each try that fails."""
    quarantine_after: int = 3
    """Proven lies (a wrong digest where another source had the right bytes) after which a source is not asked again."""

    in_flight: int = 4
    """Requests to one source at a time."""
    budget_bytes: int = 64 << 20
    """Bytes under way or waiting to be verified, in equal shares for the sources; a larger fragment passes alone."""
    min_request_bytes: int = 256 << 10
    """Bytes of a request to a source of unknown speed; slow ones get no more."""
    max_request_bytes: int = 4 << 20
    """Bytes of a request at most, but for a single fragment that is larger."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{field.name} is {value}: it must be a number from 0", hint="see FaultPolicy")
        for name in ("breaker_failures", "quarantine_after", "in_flight", "budget_bytes", "min_request_bytes"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1", hint="see FaultPolicy")
        for name in ("patience_s", "deadline_s", "slowest_bytes_per_s", "breaker_s", "hedge_factor"):
            if not getattr(self, name):
                raise UsageError(f"{name} must be above 0", hint="see FaultPolicy")
        if self.min_quality > 1:
            raise UsageError(f"min_quality {self.min_quality} is above 1", hint="1 means everything")
        if self.max_request_bytes < self.min_request_bytes:
            raise UsageError("max_request_bytes is below min_request_bytes", hint="see FaultPolicy")

    def deadline_of(self, nbytes: int) -> float:
        """Seconds that a try for so many bytes may take at most."""
        return self.deadline_s + nbytes / self.slowest_bytes_per_s
