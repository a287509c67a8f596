"""What a load counts: seconds by stage, fragments and bytes by outcome. Plain numbers that travel between processes."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from holoray.metrics import STAGE_BUCKETS, Histogram, JobMetrics

STAGES: Final = ("fetch", "verify", "decompress", "accumulate", "combine", "finalize")


@dataclass(slots=True)
class Tally:
    """Counts of one stretch of work; `merge` adds those of another."""

    stages: dict[str, Histogram] = field(default_factory=dict)
    fragments: Counter[str] = field(default_factory=Counter)
    received_bytes: Counter[str] = field(default_factory=Counter)
    decoded_bytes: int = 0
    sources: Counter[tuple[str, str]] = field(default_factory=Counter)
    """What each source of a pool did: by its URI and the name of the count."""

    def merge(self, other: Tally) -> None:
        for name, histogram in other.stages.items():
            self.stages.setdefault(name, Histogram.empty(STAGE_BUCKETS)).merge(histogram)
        self.fragments += other.fragments
        self.received_bytes += other.received_bytes
        self.decoded_bytes += other.decoded_bytes
        self.sources += other.sources

    def observe(self, stage: str, seconds: float) -> None:
        """Count one unit of work in a stage."""
        histogram = self.stages.get(stage)
        if histogram is None:
            histogram = self.stages[stage] = Histogram.empty(STAGE_BUCKETS)
        histogram.observe(seconds, STAGE_BUCKETS)

    def count(self, outcome: str, fragments: int, nbytes: int) -> None:
        """Count fragments and their stored bytes under an outcome (see the catalogue of metrics)."""
        self.fragments[outcome] += fragments
        self.received_bytes[outcome] += nbytes


class Meter:
    """A tally that several threads add to; `take` hands it over and starts a new one."""

    def __init__(self) -> None:
        self._tally = Tally()
        self._lock = threading.Lock()

    def add(self, tally: Tally) -> None:
        with self._lock:
            self._tally.merge(tally)

    def take(self) -> Tally:
        with self._lock:
            tally, self._tally = self._tally, Tally()
        return tally


@contextmanager
def stage(tally: Tally, name: str) -> Iterator[None]:
    """Time a stage; the tally belongs to the calling thread."""
    start = time.perf_counter()
    try:
        yield
    finally:
        tally.observe(name, time.perf_counter() - start)


class Laps:
    """Times stages that follow each other, a lap each; for the many units of a load, where `stage` would be felt.

    A stage that raises is not counted. The tally belongs to the calling thread.
    """

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._last = time.perf_counter()

    def start(self) -> None:
        """What follows is a new lap; what was since the last one belongs to no stage."""
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """The time since the last lap was spent in this stage."""
        now = time.perf_counter()
        self._tally.observe(stage, now - self._last)
        self._last = now


def record(metrics: JobMetrics, tally: Tally) -> None:
    """Add a tally to the metrics of a job."""
    for name, histogram in tally.stages.items():
        metrics.merge("holoray_stage_duration_seconds", histogram, stage=name)
        metrics.inc("holoray_stage_busy_seconds_total", histogram.sum, stage=name)
    for outcome, count in tally.fragments.items():
        metrics.inc("holoray_fragments_total", count, outcome=outcome)
        metrics.inc("holoray_received_bytes_total", tally.received_bytes[outcome], outcome=outcome)
    metrics.inc("holoray_decoded_bytes_total", tally.decoded_bytes)
    for (source, what), count in tally.sources.items():
        if what in ("received_bytes", "hedged_bytes"):
            metrics.inc(f"holoray_source_{what}_total", count, source=source)
        else:
            metrics.inc("holoray_source_events_total", count, source=source, event=what)
