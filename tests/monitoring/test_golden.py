"""Every expression of the board, asked of a real Prometheus over real endpoints: the values, not only the syntax.

Two jobs made from the catalogue, with round numbers, know what each panel must show. A real warm-up, one of whose
workers is killed, is compared with what its own handle reports.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pytest
from expressions import filled_in
from prometheus_server import Labels, Result, Server, labels, running_server, until
from recording import BEGAN, Recording, Samples, make_blocks, scrape

import holoray
from dashboards import generate
from holoray.actors.coordinator import Generation
from holoray.actors.warm_model import WarmModel, warm_up
from holoray.metrics import CATALOGUE, JobMetrics, MetricsServer

pytestmark = [pytest.mark.promtool, pytest.mark.ray, pytest.mark.timeout(300)]

NOW: Final = BEGAN + 60.0
ASKED: Final = NOW + 0.5  # no sample lies on the edge of a window, where versions of Prometheus differ
QUALITIES: Final = (0.5, 0.9, 0.99, 0.999, 1.0)
LEVELS: Final = ("0.95", "0.99", "0.999", "0.9999", "1")
PANELS: Final[dict[str, Any]] = {
    panel["title"]: panel
    for panel in json.loads((generate.HERE / "grafana/holoray.json").read_text(encoding="utf-8"))["panels"]
    if panel["type"] != "row"
}
ALL: Final = frozenset[tuple[str, str]]()


# -- three jobs ----------------------------------------------------------------------------------------------


def at_work(metrics: JobMetrics, second: int) -> None:
    """One second of a job that loads: everything grows by round numbers."""
    if not second:
        metrics.set("holoray_build_info", 1, version="9.9", backend="cpu")
        metrics.set("holoray_quality_target_ratio", 1)
        metrics.set("holoray_tensors", 7)
    metrics.set("holoray_quality_ratio", 0.99)
    metrics.set("holoray_generation", second)
    metrics.set("holoray_fragments_pending", 40 - second)
    metrics.set("holoray_actors", 4, role="worker")
    metrics.set("holoray_last_progress_timestamp_seconds", NOW - 5)
    for outcome, amount in (("applied", 100), ("redone", 10), ("corrupt", 1)):
        metrics.inc("holoray_fragments_total", amount, outcome=outcome)
        metrics.inc("holoray_received_bytes_total", 1000 * amount, outcome=outcome)
    for source, received, requests in (("near", 60_000, 5), ("far", 40_000, 3)):
        metrics.inc("holoray_source_received_bytes_total", received, source=source)
        metrics.inc("holoray_source_events_total", requests, source=source, event="requests")
    metrics.inc("holoray_source_hedged_bytes_total", 2000, source="far")
    for source, event, count in (("near", "errors", 2), ("far", "mismatches", 1), ("far", "hedges", 1)):
        metrics.inc("holoray_source_events_total", count, source=source, event=event)
    metrics.inc("holoray_decoded_bytes_total", 250_000)
    metrics.inc("holoray_combine_bytes_total", 3000)
    metrics.inc("holoray_served_bytes_total", 5000)
    metrics.inc("holoray_served_calls_total", 3, outcome="ok")
    metrics.inc("holoray_actor_restarts_total", role="worker")
    for stage, busy in (("fetch", 0.25), ("accumulate", 2.0)):
        metrics.inc("holoray_stage_busy_seconds_total", busy, stage=stage)
        for _ in range(10):
            metrics.observe("holoray_stage_duration_seconds", busy / 10, stage=stage)


def is_over(metrics: JobMetrics, second: int) -> None:
    """A job whose load failed after it had reached two qualities."""
    metrics.set("holoray_quality_target_ratio", 1)
    metrics.set("holoray_quality_ratio", 0.999)
    metrics.set("holoray_last_progress_timestamp_seconds", NOW - 30)
    if second == 2:
        metrics.observe("holoray_time_to_quality_seconds", 3, quality="0.95")
        metrics.observe("holoray_time_to_quality_seconds", 7, quality="0.99")
        metrics.inc("holoray_loads_total", outcome="failed")
        metrics.observe("holoray_load_duration_seconds", 9, outcome="failed")


def made_up(name: str, act: Callable[[JobMetrics, int], None]) -> Recording:
    """A job that does as `act` says for eight seconds, scraped over HTTP."""
    recording, metrics = Recording(name, NOW), JobMetrics()
    server = MetricsServer(metrics)
    try:
        for second in range(8):
            act(metrics, second)
            recording.scrapes.append(scrape(server.url))
    finally:
        server.close()
    return recording


@dataclass
class Real:
    """A real warm-up: what was scraped, and what it says of itself."""

    recording: Recording
    generations: list[dict[str, Any]]
    manifest_bytes: int
    fragments: int
    model_bytes: int


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    """Scraped at the start, when a worker was replaced, with each generation, and when the load was over."""
    path, rng = tmp_path_factory.mktemp("golden") / "store", np.random.default_rng(0)
    weights = {f"layer.{i}": rng.standard_normal((1024, 1024)).astype(np.float32) for i in range(2)}
    holoray.encode(weights, path)
    recording = Recording("real", NOW)

    def take(model: WarmModel, *names: str) -> None:
        """Scrape, as soon as these samples are there."""

        def complete() -> Samples:
            found = scrape(str(model.metrics_url))
            return found if all(found.get(name) for name in names) else {}

        recording.scrapes.append(until(complete, 120))

    def on_generation(model: WarmModel, generation: Generation) -> None:
        if generation.generation == 1:
            take(model, "holoray_actors", "holoray_fragments_pending")
            os.kill(model.crew()[0]["pid"], signal.SIGKILL)
            take(model, "holoray_actor_restarts_total")
        take(model, "holoray_quality_ratio")

    with warm_up(path, workers=2, qualities=QUALITIES, metrics_port=0, on_generation=on_generation) as model:
        model.wait(timeout_s=200)
        take(model, "holoray_loads_total")
        sealed = holoray.open(path)
        return Real(
            recording,
            model.generations,
            len(sealed.manifest.encoded),
            sealed.manifest.fragment_count,
            sealed.manifest.bytes_in,
        )


@pytest.fixture(scope="module")
def jobs() -> list[Recording]:
    return [made_up("at-work", at_work), made_up("over", is_over)]


@pytest.fixture(scope="module")
def server(real: Real, jobs: list[Recording], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("prometheus")
    make_blocks(directory, [*jobs, real.recording])
    with running_server(directory) as server:
        yield server


def shown(server: Server, title: str, instance: str, ref: str = "A") -> Result:
    """What a panel shows of a job, now."""
    (expr,) = [target["expr"] for target in PANELS[title]["targets"] if target["refId"] == ref]
    return server.query(filled_in(expr, instance=instance), ASKED)


# -- round numbers -------------------------------------------------------------------------------------------


def by(label: str, **values: float) -> Result:
    return {labels(**{label: name}): value for name, value in values.items()}


ONE: Final = labels(job="holoray", instance="at-work")
OVER: Final = labels(job="holoray", instance="over")
NOTHING: Final[Result] = {}

# (title, query, job): what must be shown. Of 8 samples the window of 4 s has the last 4.
EXPECTED: Final[dict[tuple[str, str, str], Result]] = {
    ("Quality", "A", "at-work"): {ALL: 0.99},
    ("Quality", "A", "at-work|over"): {ALL: 0.99},
    ("Quality", "A", "over"): {ALL: 0.999},
    ("Loads running", "A", "at-work"): {ALL: 1},
    ("Loads running", "A", "over"): {ALL: 0},
    ("Time to 0.99", "A", "at-work"): NOTHING,
    ("Time to 0.99", "A", "over"): {ALL: 7},
    ("Decoding", "A", "at-work"): {ALL: 250_000},
    ("Decoding", "A", "over"): NOTHING,
    ("Received", "A", "at-work"): {ALL: 888_000},
    ("Received", "A", "over"): {ALL: 0},
    ("Corrupt fragments", "A", "at-work"): {ALL: 8},
    ("Corrupt fragments", "A", "over"): {ALL: 0},
    ("Workers", "A", "at-work"): {ALL: 4},
    ("Workers", "A", "over"): {ALL: 0},
    ("Replicas down", "A", "at-work"): {ALL: 0},
    ("Quality and target", "A", "at-work|over"): {ONE: 0.99, OVER: 0.999},
    ("Quality and target", "B", "at-work|over"): {ONE: 1, OVER: 1},
    ("Signal to noise", "A", "at-work|over"): {ONE: 20, OVER: 30},
    ("Time to quality", "A", "over"): by("quality", **{"0.95": 3, "0.99": 7}),
    ("Time without progress", "A", "at-work|over"): {ONE: 5.5},
    ("Fragments assigned", "A", "at-work"): {ONE: 33},
    ("Generations", "A", "at-work"): {ONE: 7},
    ("Loads finished", "A", "at-work|over"): by("outcome", failed=1),
    ("Duration of loads", "A", "at-work|over"): by("outcome", failed=9),
    ("Bytes per second", "A", "at-work"): {ALL: 111_000},
    ("Bytes per second", "B", "at-work"): {ALL: 250_000},
    ("Bytes per second", "C", "at-work"): {ALL: 3000},
    ("Cores busy", "A", "at-work"): by("stage", fetch=0.25, accumulate=2),
    # All observations lie in one bucket, 12.8 to 25.6 ms or 102.4 to 204.8 ms: 95 % of the way through it.
    ("Time per unit of work, 95 %", "A", "at-work"): by(
        "stage", fetch=0.0128 + 0.95 * 0.0128, accumulate=0.1024 * 2 - 0.05 * 0.1024
    ),
    ("Bytes per second by source", "A", "at-work"): by("source", near=60_000, far=40_000),
    ("Faults by source", "A", "at-work"): {
        labels(source="near", event="errors"): 16,
        labels(source="far", event="mismatches"): 8,
    },
    ("Requests by kind", "A", "at-work"): by("event", requests=8, hedges=1),
    ("Hedged bytes", "A", "at-work"): {ALL: 0.02},
    ("Fragments by fate", "A", "at-work"): by("outcome", applied=100, redone=10, corrupt=1),
    ("Bytes by fate", "A", "at-work"): by("outcome", applied=800_000, redone=80_000, corrupt=8000),
    ("Actors alive", "A", "at-work"): by("role", worker=4),
    ("Restarts", "A", "at-work"): by("role", worker=8),
    ("Bytes served", "A", "at-work"): {ALL: 5000},
    ("Calls answered", "A", "at-work"): by("outcome", ok=3),
    ("Versions", "A", "at-work"): {ONE | labels(version="9.9", backend="cpu"): 1},
    ("Tensors", "A", "at-work"): {ONE: 7},
}


@pytest.mark.parametrize(("place", "expected"), EXPECTED.items(), ids=[" ".join(place) for place in EXPECTED])
def test_panels_show_what_the_jobs_did(place: tuple[str, str, str], expected: Result, server: Server) -> None:
    title, ref, instance = place
    assert shown(server, title, instance, ref) == {key: pytest.approx(value) for key, value in expected.items()}


def test_the_heatmap_has_the_rate_of_every_bucket(server: Server) -> None:
    found = shown(server, "Time per unit of work, distribution", "at-work")
    rates = {float(dict(key)["le"]): value for key, value in found.items()}
    assert len(rates) == len(CATALOGUE["holoray_stage_duration_seconds"].buckets) + 1
    for edge, value in rates.items():
        assert value == pytest.approx(10 * (edge >= 0.025) + 10 * (edge >= 0.2))


def test_every_query_of_every_panel_has_an_expected_value() -> None:
    there = {(title, target["refId"]) for title, panel in PANELS.items() for target in panel["targets"]}
    heatmap = ("Time per unit of work, distribution", "A")
    assert {place[:2] for place in EXPECTED} | {heatmap} == there


def test_the_made_up_jobs_have_the_whole_catalogue(jobs: list[Recording]) -> None:
    have: set[str] = set()
    for job in jobs:
        have |= {name for name in CATALOGUE if {name, f"{name}_count"} & job.last.keys()}
    assert have == CATALOGUE.keys()


def test_variables_offer_the_jobs(server: Server) -> None:
    board = json.loads((generate.HERE / "grafana/holoray.json").read_text(encoding="utf-8"))
    offered = {}
    for variable in board["templating"]["list"][1:]:
        selector, _, label = variable["definition"].removeprefix("label_values(").removesuffix(")").rpartition(", ")
        offered[label] = server.label_values(label, filled_in(selector), ASKED)
    assert offered["job"] == ["holoray"]
    assert offered["instance"] == ["at-work", "over", "real"]
    assert {"fetch", "verify", "accumulate"} <= set(offered["stage"])


# -- a real warm-up ------------------------------------------------------------------------------------------


def one(found: Result) -> float:
    (value,) = found.values()
    return value


def increase_per_second(recording: Recording, name: str, key: Labels) -> float | None:
    """Of the samples in the last 4 s, what Prometheus' `rate` documents; an oracle of the test's own.

    The window begins and ends half a second beyond its four samples. The increase is extrapolated to its ends, but to
    no earlier than where the counter would be zero. None if it is younger: there versions of Prometheus differ.
    """
    values = [samples.get(name, {}).get(key) for samples in recording.scrapes[-4:]]
    first, last = values[0], values[-1]
    if first is None or last is None:
        return None
    increase, before, after = last - first, 0.5, 0.5
    if increase > 0:
        before = min(before, 3 * first / increase)
    return increase * (before + 3 + after) / 3 / 4


def test_progress_is_that_of_the_warm_up(real: Real, server: Server) -> None:
    last = real.generations[-1]
    assert one(shown(server, "Quality", "real")) == pytest.approx(last["quality"], abs=1e-12)
    assert one(shown(server, "Generations", "real")) == last["generation"] == len(QUALITIES)
    assert one(shown(server, "Quality and target", "real", "B")) == 1
    assert one(shown(server, "Signal to noise", "real")) == 120
    assert one(shown(server, "Loads running", "real")) == 0
    assert shown(server, "Loads finished", "real") == by("outcome", ok=1)
    assert one(shown(server, "Duration of loads", "real")) >= last["seconds"]
    assert shown(server, "Time without progress", "real") == NOTHING
    assert one(shown(server, "Tensors", "real")) == 2


def test_times_to_quality_are_those_of_the_generations(real: Real, server: Server) -> None:
    def first(level: str) -> float:
        return next(
            float(g["seconds"])
            for g in real.generations
            if g["complete"] or (float(level) < 1 and g["quality"] >= float(level))
        )

    expected = by("quality", **{level: first(level) for level in LEVELS})
    found = shown(server, "Time to quality", "real")
    assert found == {key: pytest.approx(value, abs=1e-9) for key, value in expected.items()}
    assert one(shown(server, "Time to 0.99", "real")) == pytest.approx(first("0.99"), abs=1e-9)


def test_bytes_and_fragments_are_those_of_the_store(real: Real, server: Server) -> None:
    received = real.generations[-1]["bytes_read"] - real.manifest_bytes
    assert one(shown(server, "Received", "real")) == received
    assert sum(shown(server, "Bytes by fate", "real").values()) == received
    assert one(shown(server, "Corrupt fragments", "real")) == 0
    assert real.recording.value("holoray_fragments_total", outcome="applied") >= real.fragments
    assert real.recording.value("holoray_decoded_bytes_total") >= real.model_bytes


def test_a_killed_worker_is_seen(real: Real, server: Server) -> None:
    assert shown(server, "Restarts", "real") == by("role", worker=1)
    assert one(shown(server, "Actors alive", "real")) in (1, 2)


def test_rates_are_those_of_the_scrapes(real: Real, server: Server) -> None:
    assert len(real.recording.scrapes) == len(QUALITIES) + 3
    for title, ref, name in (
        ("Decoding", "A", "holoray_decoded_bytes_total"),
        ("Bytes per second", "B", "holoray_decoded_bytes_total"),
    ):
        expected = increase_per_second(real.recording, name, ALL)
        assert expected is not None
        assert expected > 0
        assert one(shown(server, title, "real", ref)) == pytest.approx(expected)
    busy = {
        key: (value, increase_per_second(real.recording, "holoray_stage_busy_seconds_total", key))
        for key, value in shown(server, "Cores busy", "real").items()
    }
    compared = [(value, expected) for value, expected in busy.values() if expected is not None]
    assert compared
    for value, expected in compared:
        assert value == pytest.approx(expected)
