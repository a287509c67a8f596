"""What is known of each source, and which one to ask: no I/O, no clock, no randomness of its own.

Speed is learnt in seconds per byte, with a request's fixed cost counted as so many bytes more; a request is worth
giving to whoever would be done with it first. Failures make a source wait (full jitter), then open its breaker:
one try after at least `breaker_s`, and twice as long after each that fails. A wrong digest makes a source suspect; once
another source had the right bytes it is a proven lie, and after some of those the source is out.
"""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from holoray.errors import SourceError
from holoray.pipelines.fault_policy import FaultPolicy

OVERHEAD_BYTES: Final = 256 << 10  # what a request's fixed cost is reckoned as
_SAMPLES: Final = 64
_QUANTILE: Final = 0.95
_REQUEST_S: Final = 0.1  # requests grow until they take about so long
_FORGET_S: Final = 10.0  # after so long without news a source may be twice as fast
_OVERDUE: Final = 2.0  # a source is overdue after so many times what was expected
_LOOK_AGAIN_S: Final = 0.05  # whoever waits for the best source looks at the others now and then
_WEIGHT: Final = 0.3  # of the newest sample in the mean
_SUSPICION: Final = 4.0  # a wrong digest counts like being so many times slower
_LATE: Final = 8.0  # a try is late after so many times what was expected,
_MIN_LATE_S: Final = 2.0  # but not before: a process may well be stopped for a second
NEWS: Final = math.inf
"""A time to wait for that never comes: something has to happen first."""


@dataclass(slots=True)
class Source:
    """One source as the book has it. `counts` are what `stats` shows."""

    name: str
    priority: int = 0
    slowness: float | None = None  # seconds a byte, mean; None until something came
    measured_at: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=_SAMPLES))
    in_flight_bytes: int = 0
    flying: dict[int, float] = field(default_factory=dict)  # attempts in flight, and when they began
    held_bytes: int = 0  # in flight, on the way to be verified, or given up and not back yet
    failures: int = 0  # in a row
    ready_at: float = 0.0
    suspicion: float = 0.0
    lies: int = 0
    last_error: Exception | None = None
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def in_flight(self) -> int:
        return len(self.flying)

    def expected_s(self, nbytes: int, now: float, slowness: float | None = None) -> float:
        """Seconds until it would be done with so many more bytes; 0 where nothing is known."""
        if slowness is None:
            age = max(0.0, now - self.measured_at)
            slowness = (self.slowness or 0.0) * 0.5 ** (age / _FORGET_S)
        return (self.in_flight_bytes + nbytes + OVERHEAD_BYTES) * slowness

    def due_s(self, now: float) -> float:
        """In how long the oldest request in flight should have come at the latest; negative once it is overdue."""
        return min(self.flying.values(), default=now) + _OVERDUE * self.expected_s(0, now, self.slowness or 0.0) - now

    def overdue_s(self, now: float) -> float:
        """Since when: whoever is stalled looks worse with every second."""
        return max(0.0, -self.due_s(now)) if self.flying else 0.0

    def tail_s(self, nbytes: int) -> float:
        """The same at the 95th percentile of what was seen; inf where nothing was."""
        if not self.recent:
            return math.inf
        slowness = sorted(self.recent)[math.ceil(_QUANTILE * len(self.recent)) - 1]
        return self.expected_s(nbytes, 0.0, slowness)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request under way: `number` tells it from others, `concurrent` were under way there when it began."""

    number: int
    source: int
    nbytes: int
    began: float
    late_at: float
    concurrent: int
    hedge: bool


class SourceBook:
    """The sources of a pool and the budgets that all requests share. Not thread-safe: the pool has a lock."""

    def __init__(self, sources: Sequence[tuple[str, int]], policy: FaultPolicy, rng: random.Random) -> None:
        self.sources = [Source(name, priority) for name, priority in sources]
        self.policy = policy
        self.news_at = -math.inf  # when bytes last came from anywhere
        self._share = policy.budget_bytes // max(len(sources), 1)
        self._rng = rng
        self._attempts = 0
        self._retries = float(policy.retry_burst)
        self._refilled_at = -math.inf
        self._hedged_bytes = 0
        self._received_bytes = 0

    # -- whom to ask ---------------------------------------------------------------------------------------

    def choose(
        self, now: float, nbytes: int, avoid: Collection[int], *, least: int = 0, retry: bool = False
    ) -> tuple[int | None, float]:
        """A source to ask for the first of `nbytes` (`least` or more); or None, and when to ask again.

        (None, -inf) means that no source is left. The best of those that may be asked, whoever that is: if it is
        busy, waiting for it is better than asking one that would be done later. What failed before (`retry`) is not for
        trying out who failed: it goes to whoever failed least since an answer, of whatever priority, and owes none.
        """
        left = [i for i, source in enumerate(self.sources) if i not in avoid and not self.is_quarantined(source)]
        if not left:
            return None, -math.inf
        if retry and not self._may_retry(now):
            return None, now + 1.0 - self._retries
        if retry:
            left = [i for i in left if not self._may_be_stalled(self.sources[i], now)] or left
            fewest = min(self.sources[i].failures for i in left)
            left = [i for i in left if self.sources[i].failures == fewest]
        usable = [i for i in left if self._is_usable(self.sources[i], now)]
        if not usable:
            return None, min(self._usable_at(self.sources[i], now) for i in left)
        while usable:
            best = self._best(usable, nbytes, now)
            source, wanted = self.sources[best], max(least, min(nbytes, self.request_bytes(best)))
            if not self._is_full(source) and self._has_room(source, wanted):
                return best, now
            usable.remove(best)
            if source.in_flight:
                return None, self._overtaken_at(best, usable, nbytes, now)
            # else its memory is held by reads that were given up: who knows when they return
        return None, NEWS

    def choose_hedge(self, now: float, attempt: Attempt, avoid: Collection[int]) -> int | None:
        """A source that would have been done with an attempt long ago, if the budgets have room for asking it."""
        allowed = self.policy.hedge_share * self._received_bytes + self.policy.hedge_burst_bytes
        if not self.policy.hedge_share or self._hedged_bytes + attempt.nbytes > allowed:
            return None
        if now < self.hedge_at(attempt, avoid):
            return None
        others = [(i, self.sources[i]) for i in self._others(attempt, avoid)]
        usable = [i for i, s in others if not self._is_full(s) and self._has_room(s, attempt.nbytes)]
        return self._best(usable, attempt.nbytes, now) if usable else None

    def hedge_at(self, attempt: Attempt, avoid: Collection[int]) -> float:
        """When an attempt is so late that another source should be asked too; inf while no other one is known."""
        tails = [self.sources[i].tail_s(attempt.nbytes) for i in self._others(attempt, avoid)]
        return attempt.began + max(self.policy.min_hedge_s, self.policy.hedge_factor * min(tails, default=math.inf))

    def request_bytes(self, number: int) -> int:
        """How much to ask a source for at once: little where its speed is unknown, or it failed."""
        source, policy = self.sources[number], self.policy
        if source.slowness is None or source.failures:
            return min(policy.min_request_bytes, self._share)
        fitting = _REQUEST_S / max(source.slowness, 1e-15) - OVERHEAD_BYTES
        return int(min(max(fitting, policy.min_request_bytes), policy.max_request_bytes, self._share))

    def _best(self, usable: Sequence[int], nbytes: int, now: float) -> int:
        """By priority, then by cost; whoever may be stalled keeps nothing from those of a lower priority."""
        steady = [i for i in usable if not self._may_be_stalled(self.sources[i], now)] or usable
        first = min(self.sources[i].priority for i in steady)
        return min(
            (i for i in usable if self.sources[i].priority == first),
            key=lambda i: (self._cost(i, nbytes, now), self.sources[i].in_flight),
        )

    def _cost(self, number: int, nbytes: int, now: float) -> float:
        source = self.sources[number]
        expected = source.expected_s(min(nbytes, self.request_bytes(number)), now) + source.overdue_s(now)
        return float(expected * _SUSPICION**source.suspicion + source.suspicion * 1e-9)

    def _overtaken_at(self, best: int, others: Sequence[int], nbytes: int, now: float) -> float:
        """When the best source, if it is stalled, will look worse than the next."""
        if not others:
            return NEWS
        lead = self._cost(self._best(others, nbytes, now), nbytes, now) - self._cost(best, nbytes, now)
        return now + max(self.sources[best].due_s(now), 0.0) + max(lead, _LOOK_AGAIN_S)

    def _others(self, attempt: Attempt, avoid: Collection[int]) -> list[int]:
        """Who else could be asked, of those whose speed is known."""
        return [
            i
            for i, source in enumerate(self.sources)
            if i != attempt.source and i not in avoid and source.recent and not source.failures
            if not self.is_quarantined(source)
        ]

    def is_quarantined(self, source: Source) -> bool:
        return source.lies >= self.policy.quarantine_after

    def _is_usable(self, source: Source, now: float) -> bool:
        """Whether it may be asked: one request at a time where its speed is unknown or its breaker is half-open."""
        if now < source.ready_at:
            return False
        careful = source.slowness is None or self._is_tripped(source)
        return not (careful and source.in_flight)

    def _may_be_stalled(self, source: Source, now: float) -> bool:
        """Whether it owes an answer that is overdue, or any after it failed."""
        return bool(source.flying) and (source.failures > 0 or source.overdue_s(now) > 0)

    def _is_tripped(self, source: Source) -> bool:
        return source.failures >= self.policy.breaker_failures

    def _usable_at(self, source: Source, now: float) -> float:
        return source.ready_at if source.ready_at > now else NEWS

    def _is_full(self, source: Source) -> bool:
        return source.in_flight >= self.policy.in_flight

    def _has_room(self, source: Source, nbytes: int) -> bool:
        """Each source has a share of the budget, so that one that stalls cannot keep all memory from the others.

        One request above the share is let through alone, so that a fragment larger than it still loads.
        """
        return source.held_bytes == 0 or source.held_bytes + nbytes <= self._share

    def _may_retry(self, now: float) -> bool:
        if now > self._refilled_at:
            passed = 0.0 if math.isinf(self._refilled_at) else now - self._refilled_at
            self._retries = min(self._retries + passed, max(1.0, float(self.policy.retry_burst)))
            self._refilled_at = now
        return self._retries > 1.0 - 1e-9

    # -- what happens to requests --------------------------------------------------------------------------

    def begin(self, now: float, number: int, nbytes: int, *, retry: bool = False, hedge: bool = False) -> Attempt:
        """Note that a source is asked. It ends in `arrived`, `lacked` or `failed`, and its memory is `released`."""
        source = self.sources[number]
        source.in_flight_bytes += nbytes
        source.counts["requests"] += 1
        source.held_bytes += nbytes
        self._attempts += 1
        source.flying[self._attempts] = now
        if retry:
            self._retries -= 1.0
            source.counts["retries"] += 1
        if hedge:
            self._hedged_bytes += nbytes
            source.counts["hedges"] += 1
            source.counts["hedged_bytes"] += nbytes
        slowest = source.slowness or min((s.slowness for s in self.sources if s.slowness), default=math.inf)
        expected = source.expected_s(0, now, slowest)
        late = min(max(_LATE * expected, _MIN_LATE_S), self.policy.deadline_of(source.in_flight_bytes))
        return Attempt(self._attempts, number, nbytes, now, now + late, source.in_flight, hedge)

    def arrived(self, now: float, attempt: Attempt) -> None:
        """All bytes came, whatever they are worth."""
        source = self._end(attempt, attempt.nbytes)
        sample = _slowness(now, attempt)
        known = source.slowness is not None and source.failures == 0
        source.slowness = sample if not known else _WEIGHT * sample + (1 - _WEIGHT) * (source.slowness or 0.0)
        source.measured_at = self.news_at = now
        source.recent.append(sample)
        source.failures, source.ready_at = 0, 0.0
        self._retries = min(self._retries + self.policy.retry_share, max(1.0, float(self.policy.retry_burst)))

    def failed(self, now: float, attempt: Attempt, error: Exception, received: int = 0) -> None:
        """An attempt broke off, or was given up because it is late."""
        source = self._end(attempt, received)
        source.counts["errors"] += 1
        source.last_error = error
        source.failures += 1
        if received:
            self.news_at = now
        bound, beyond = self.policy.backoff_s * 2 ** min(source.failures - 1, 30), 0.0
        if source.failures >= self.policy.breaker_failures:
            if source.failures == self.policy.breaker_failures:
                source.counts["trips"] += 1
            beyond = self.policy.breaker_s * 2 ** min(source.failures - self.policy.breaker_failures, 30)
        wait = min(beyond, max(self.policy.max_backoff_s, self.policy.breaker_s))
        source.ready_at = now + wait + self._rng.uniform(0.0, min(bound, self.policy.max_backoff_s))

    def lacked(self, now: float, attempt: Attempt, error: Exception, received: int) -> None:
        """The blob ends there, or is not there at all: a source that says so is well, and has less than it should."""
        source = self._end(attempt, received)
        source.counts["errors"] += 1
        source.last_error = error
        source.failures, source.ready_at = 0, 0.0
        if received:
            self.news_at = now

    def outrun(self, now: float, attempt: Attempt) -> None:
        """Another source was faster, or time is up: the source is at least so slow. Nobody can stop the attempt."""
        source = self.sources[attempt.source]
        source.slowness = max(source.slowness or 0.0, _slowness(now, attempt))
        source.measured_at = now

    def note_absent(self, now: float, number: int, error: Exception) -> None:
        """A source did not even say what it holds: its breaker is open from the start."""
        source = self.sources[number]
        source.last_error, source.failures = error, self.policy.breaker_failures
        source.ready_at = now + self.policy.breaker_s

    def released(self, attempt: Attempt) -> None:
        """The memory of an attempt is free again."""
        self.sources[attempt.source].held_bytes -= attempt.nbytes

    def suspect(self, number: int, error: Exception) -> None:
        """A source gave bytes that do not match their digest, and nobody else has given better ones yet."""
        source = self.sources[number]
        source.suspicion += 1.0
        source.last_error = error
        source.counts["mismatches"] += 1

    def trust(self, number: int) -> None:
        """A source gave bytes that match their digests: what it was suspected over may have been an accident."""
        source = self.sources[number]
        source.suspicion = source.suspicion / 2 if source.suspicion > 0.1 else 0.0

    def convict(self, number: int) -> None:
        """Another source had what this one was suspected over."""
        source = self.sources[number]
        source.lies += 1
        if source.lies == self.policy.quarantine_after:
            source.counts["quarantined"] += 1

    def _end(self, attempt: Attempt, received: int) -> Source:
        source = self.sources[attempt.source]
        del source.flying[attempt.number]
        source.in_flight_bytes -= attempt.nbytes
        source.counts["received_bytes"] += received
        self._received_bytes += received
        return source

    # -- what to say ---------------------------------------------------------------------------------------

    def state(self, source: Source, now: float) -> str:
        """`healthy`, `suspect` (gave wrong bytes), `waiting` (after a failure), `open` (breaker) or `quarantined`."""
        if self.is_quarantined(source):
            return "quarantined"
        if self._is_tripped(source):
            return "open"
        if source.ready_at > now:
            return "waiting"
        return "suspect" if source.suspicion else "healthy"

    def no_healthy_source(self, what: str, now: float) -> SourceError:
        """The error that names every source, how it is, and what it said last."""
        lines = "; ".join(self._describe(now))
        hint = "what was loaded is kept; run again when one of them answers"
        return SourceError(f"no healthy source for {what}: {lines}", hint=hint, source=self.sources[0].name)

    def _describe(self, now: float) -> Iterator[str]:
        for source in self.sources:
            said = source.last_error
            why = getattr(said, "message", None) or (repr(said) if said is not None else "never failed")
            yield f"{source.name} ({self.state(source, now)}): {why}"


def _slowness(now: float, attempt: Attempt) -> float:
    """Seconds a byte of the whole source: what was under way there at the same time shared it."""
    return (now - attempt.began) / (attempt.nbytes + OVERHEAD_BYTES) / attempt.concurrent
