"""Every metric holoray exposes: one catalogue, one registry a job, plain numbers behind it.

Base units, few labels, never one per tensor. Numbers are kept here and turned into Prometheus families on a scrape, so
that counts from other processes can be added as they arrive.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from holoray.errors import UsageError

COUNTER: Final = "counter"
GAUGE: Final = "gauge"
HISTOGRAM: Final = "histogram"

_SECONDS: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
STAGE_BUCKETS: Final = tuple(1e-4 * 2**i for i in range(14))


@dataclass(frozen=True, slots=True)
class Description:
    """One metric as the catalogue lists it."""

    kind: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


CATALOGUE: Final[Mapping[str, Description]] = MappingProxyType(
    {
        "holoray_build_info": Description(GAUGE, "Versions in use (always 1).", ("version", "backend")),
        "holoray_loads_total": Description(COUNTER, "Loads finished, by outcome: ok, failed.", ("outcome",)),
        "holoray_load_duration_seconds": Description(HISTOGRAM, "Wall time of a load.", ("outcome",), _SECONDS),
        "holoray_time_to_quality_seconds": Description(
            HISTOGRAM, "Time from the start of a load to a published quality.", ("quality",), _SECONDS
        ),
        "holoray_quality_ratio": Description(GAUGE, "Quality of the newest generation: 1 - error energy / energy."),
        "holoray_quality_target_ratio": Description(GAUGE, "Quality that the load is heading for."),
        "holoray_generation": Description(GAUGE, "Number of the newest published generation."),
        "holoray_tensors": Description(GAUGE, "Tensors of the model."),
        "holoray_fragments_total": Description(
            COUNTER, "Fragments by fate: applied, redone (lost with a worker), corrupt.", ("outcome",)
        ),
        "holoray_fragments_pending": Description(GAUGE, "Fragments assigned to workers and not yet applied."),
        "holoray_received_bytes_total": Description(
            COUNTER, "Stored bytes received, by fate of their fragments.", ("outcome",)
        ),
        "holoray_source_received_bytes_total": Description(
            COUNTER, "Bytes received from each of several sources.", ("source",)
        ),
        "holoray_source_hedged_bytes_total": Description(
            COUNTER, "Bytes asked of a source because another one was slow.", ("source",)
        ),
        "holoray_source_events_total": Description(
            COUNTER,
            "What happened with a source: requests, retries, hedges, errors, mismatches, trips, quarantined.",
            ("source", "event"),
        ),
        "holoray_decoded_bytes_total": Description(COUNTER, "Bytes of weights written by decoding."),
        "holoray_stage_duration_seconds": Description(
            HISTOGRAM, "Time of one unit of work in a stage.", ("stage",), STAGE_BUCKETS
        ),
        "holoray_stage_busy_seconds_total": Description(COUNTER, "Busy time of a stage.", ("stage",)),
        "holoray_actors": Description(GAUGE, "Actors alive, by role.", ("role",)),
        "holoray_actor_restarts_total": Description(COUNTER, "Actors that had to be restarted.", ("role",)),
        "holoray_combine_bytes_total": Description(COUNTER, "Bytes of slots passed between nodes."),
        "holoray_served_bytes_total": Description(COUNTER, "Bytes of blobs sent by `holoray serve`."),
        "holoray_served_calls_total": Description(
            COUNTER,
            "Calls answered by `holoray serve`, by outcome: ok, refused (no such file, wrong token, too many readers), "
            "cancelled by the client, failed.",
            ("outcome",),
        ),
        "holoray_last_progress_timestamp_seconds": Description(GAUGE, "Unix time of the last applied fragment."),
    }
)

Labels = tuple[str, ...]


@dataclass(slots=True)
class Histogram:
    """Counts per bucket (the last one is +Inf) and the sum of what was observed."""

    counts: list[int]
    sum: float = 0.0

    @classmethod
    def empty(cls, buckets: tuple[float, ...]) -> Histogram:
        return cls([0] * (len(buckets) + 1))

    def observe(self, value: float, buckets: tuple[float, ...]) -> None:
        self.counts[bisect_left(buckets, value)] += 1
        self.sum += value

    def merge(self, other: Histogram) -> None:
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum


class JobMetrics(Collector):
    """The numbers of one job. Unknown names or labels are programming errors (KeyError, ValueError)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, dict[Labels, float]] = {}
        self._histograms: dict[str, dict[Labels, Histogram]] = {}
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def inc(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Add to a counter."""
        key = _key(name, COUNTER, labels)
        with self._lock:
            series = self._values.setdefault(name, {})
            series[key] = series.get(key, 0.0) + amount

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        key = _key(name, GAUGE, labels)
        with self._lock:
            self._values.setdefault(name, {})[key] = value

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add one observation to a histogram."""
        one = Histogram.empty(CATALOGUE[name].buckets)
        one.observe(value, CATALOGUE[name].buckets)
        self.merge(name, one, **labels)

    def merge(self, name: str, histogram: Histogram, **labels: str) -> None:
        """Add the observations of another process to a histogram."""
        key = _key(name, HISTOGRAM, labels)
        with self._lock:
            self._histograms.setdefault(name, {}).setdefault(key, Histogram.empty(CATALOGUE[name].buckets)).merge(
                histogram
            )

    def value(self, name: str, **labels: str) -> float:
        """The current value of a counter or gauge (0 if nothing was counted)."""
        with self._lock:
            return self._values.get(name, {}).get(_key(name, CATALOGUE[name].kind, labels), 0.0)

    def collect(self) -> Iterator[Metric]:
        """Prometheus families, for a scrape."""
        with self._lock:
            for name, description in CATALOGUE.items():
                if description.kind == HISTOGRAM:
                    yield self._histogram_family(name, description)
                else:
                    yield self._family(name, description)

    def _family(self, name: str, description: Description) -> Metric:
        make = CounterMetricFamily if description.kind == COUNTER else GaugeMetricFamily
        family = make(name, description.help, labels=description.labels)
        for labels, value in self._values.get(name, {}).items():
            family.add_metric(labels, value)
        return family

    def _histogram_family(self, name: str, description: Description) -> Metric:
        family = HistogramMetricFamily(name, description.help, labels=description.labels)
        edges = [*(repr(edge) for edge in description.buckets), "+Inf"]
        for labels, histogram in self._histograms.get(name, {}).items():
            cumulative, total = [], 0
            for edge, count in zip(edges, histogram.counts, strict=True):
                total += count
                cumulative.append((edge, float(total)))
            family.add_metric(labels, cumulative, sum_value=histogram.sum)
        return family


def _key(name: str, kind: str, labels: Mapping[str, str]) -> Labels:
    description = CATALOGUE[name]
    if description.kind != kind or set(labels) != set(description.labels):
        raise ValueError(f"{name} is a {description.kind} with labels {description.labels}")
    return tuple(labels[label] for label in description.labels)


class MetricsServer:
    """A `/metrics` endpoint; `port` 0 takes any free one.

    Raises UsageError for what is no port, OSError where it cannot listen.
    """

    def __init__(self, metrics: JobMetrics, port: int = 0, address: str = "127.0.0.1") -> None:
        if port not in range(1 << 16):
            raise UsageError(f"there is no port {port}", hint="0 to 65535; 0 takes any free port")
        self._server, self._thread = start_http_server(port, addr=address, registry=metrics.registry)
        self.port: int = self._server.server_port
        self.url = f"http://{address}:{self.port}/metrics"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
