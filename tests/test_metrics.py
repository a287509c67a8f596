"""Metrics: what a real Prometheus client reads from a real endpoint."""

from __future__ import annotations

import re
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

import holoray
from holoray.metrics import CATALOGUE, STAGE_BUCKETS, Histogram, JobMetrics, MetricsServer
from holoray.pipelines.fragment_pipeline import FragmentPipeline
from holoray.pipelines.loader import Loader
from holoray.pipelines.meter import STAGES, Meter, record
from holoray.tensor import Array


def scrape(metrics: JobMetrics) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    server = MetricsServer(metrics)
    try:
        with urllib.request.urlopen(server.url, timeout=10) as answer:
            text = answer.read().decode()
    finally:
        server.close()
    out: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            out.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return out


def test_names_follow_the_conventions() -> None:
    for name, description in CATALOGUE.items():
        assert re.fullmatch(r"holoray_[a-z_]+", name)
        assert name.endswith("_total") is (description.kind == "counter")
        assert description.help.endswith(".")
        assert not set(description.labels) & {"tensor", "fragment", "index", "name"}
        assert not re.search(r"_(ms|milliseconds|mb|percent)(_|$)", name)
        assert list(description.buckets) == sorted(set(description.buckets))


def test_numbers_arrive_over_http() -> None:
    metrics = JobMetrics()
    metrics.inc("holoray_fragments_total", 3, outcome="applied")
    metrics.inc("holoray_fragments_total", 2, outcome="applied")
    metrics.set("holoray_quality_ratio", 0.25)
    for value in (0.00005, 0.0001, 0.003, 99.0):
        metrics.observe("holoray_stage_duration_seconds", value, stage="verify")
    read = scrape(metrics)
    assert read["holoray_fragments_total"] == {(("outcome", "applied"),): 5.0}
    assert read["holoray_quality_ratio"] == {(): 0.25}
    assert read["holoray_stage_duration_seconds_sum"][(("stage", "verify"),)] == pytest.approx(99.00315)
    assert read["holoray_stage_duration_seconds_count"][(("stage", "verify"),)] == 4
    buckets = read["holoray_stage_duration_seconds_bucket"]
    assert buckets[(("le", "0.0001"), ("stage", "verify"))] == 2  # edges are inclusive
    assert buckets[(("le", "+Inf"), ("stage", "verify"))] == 4


def test_unknown_names_and_labels_are_errors() -> None:
    metrics = JobMetrics()
    with pytest.raises(KeyError):
        metrics.inc("holoray_surprise_total")
    with pytest.raises(ValueError, match="labels"):
        metrics.inc("holoray_fragments_total", worker="w0")
    with pytest.raises(ValueError, match="counter"):
        metrics.set("holoray_fragments_total", 1, outcome="applied")


def test_histograms_merge() -> None:
    a, b = Histogram.empty(STAGE_BUCKETS), Histogram.empty(STAGE_BUCKETS)
    a.observe(0.5, STAGE_BUCKETS)
    b.observe(0.5, STAGE_BUCKETS)
    b.observe(1e-6, STAGE_BUCKETS)
    a.merge(b)
    assert sum(a.counts) == 3
    assert a.sum == pytest.approx(1.000001)


def test_a_load_counts_every_fragment_and_byte(model: dict[str, Array]) -> None:
    store = holoray.MemoryStore()
    holoray.encode(model, store)
    sealed = holoray.open(store)
    meter, metrics = Meter(), JobMetrics()
    Loader(sealed.store, sealed.manifest, meter=meter).load()
    record(metrics, meter.take())
    read = scrape(metrics)
    applied = (("outcome", "applied"),)
    assert read["holoray_fragments_total"] == {applied: sealed.manifest.fragment_count}
    assert read["holoray_received_bytes_total"] == {applied: sum(t.stored_bytes for t in sealed.manifest.tensors)}
    assert read["holoray_decoded_bytes_total"][()] == sealed.manifest.bytes_in
    stages = {dict(labels)["stage"] for labels in read["holoray_stage_busy_seconds_total"]}
    assert stages <= set(STAGES)
    assert {"fetch", "verify", "decompress", "accumulate"} <= stages
    assert not meter.take().stages  # taken once


def test_damaged_fragments_are_counted(model: dict[str, Array]) -> None:
    store = holoray.MemoryStore()
    holoray.encode(model, store, codec="raw")
    sealed = holoray.open(store)
    entry = sealed.manifest.tensors[0].fragments[0]
    name = f"fragments-{entry.file:05d}.arrow"
    blob = bytearray(store.blobs[name])
    blob[entry.offset] ^= 1
    store.blobs[name] = bytes(blob)
    meter = Meter()
    loader = Loader(store, sealed.manifest, meter=meter)
    with pytest.raises(holoray.IntegrityError):
        loader.load()
    assert meter.take().fragments["corrupt"] == 1


def test_the_budget_bounds_what_is_in_flight(model: dict[str, Array]) -> None:
    store = holoray.MemoryStore()
    holoray.encode(model, store, codec="planes")
    sealed = holoray.open(store)
    pipeline = FragmentPipeline(store, sealed.manifest, budget_bytes=3 << 20, cores=4)
    loader = Loader(store, sealed.manifest)
    loader.state_dict()  # there are tensors to load into
    from holoray.pipelines.curve import streaming_keys
    from holoray.pipelines.plan import units

    pipeline.run(units(sealed.manifest, streaming_keys(sealed.manifest)), loader)
    assert 0 < pipeline.budget.peak_bytes <= 3 << 20
    assert pipeline.budget.used_bytes == 0
