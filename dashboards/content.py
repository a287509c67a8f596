"""The holoray board: what is on it, and the expressions behind it."""

from __future__ import annotations

from typing import Final

from dashboards.board import Annotation, Board, Panel, Query, Row, Variable
from dashboards.promql import BY_TARGET, running, select
from dashboards.rules import USABLE
from dashboards.scraping import REPLICAS

_SCOPE: Final = ('job=~"$job"', 'instance=~"$instance"')
_WINDOW: Final = "$__rate_interval"


def _on_board(sample: str, **labels: str) -> str:
    return select(sample, *_SCOPE, **labels)


def _rate(counter: str, *by: str, **labels: str) -> str:
    grouping = f" by ({', '.join(by)}) " if by else ""
    return f"sum{grouping}(rate({_on_board(counter, **labels)}[{_WINDOW}]))"


def _newest(sample: str, **labels: str) -> str:
    """The last value of each series in the time range, also of jobs that are gone: they count from 0, so it is all."""
    return f"last_over_time({_on_board(sample, **labels)}[$__range])"


def _mean(histogram: str, *by: str, **labels: str) -> str:
    """Mean of what the newest loads observed: sums over counts, never a mean of means."""
    grouping = f" by ({', '.join(by)}) " if by else ""
    total, count = (f"sum{grouping}({_newest(f'{histogram}_{part}', **labels)})" for part in ("sum", "count"))
    return f"{total} / {count}"


_FAULTS: Final = "~errors|mismatches|trips|quarantined"
_QUALITY: Final = _on_board("holoray_quality_ratio")
_TARGET: Final = _on_board("holoray_quality_target_ratio")


def _tile(
    title: str,
    description: str,
    expr: str,
    unit: str = "short",
    *,
    decimals: int | None = None,
    alarm: float | None = None,
    absent: str = "No data",
) -> Panel:
    """One of the eight of the top row."""
    return Panel(
        title,
        description,
        (Query(expr),),
        "stat",
        unit,
        width=3,
        height=4,
        decimals=decimals,
        alarm=alarm,
        absent=absent,
    )


_TILES: Final = (
    _tile(
        "Quality",
        "Lowest quality of the newest generations: 1 - error energy / energy, measured.",
        f"min({_QUALITY})",
        "percentunit",
        decimals=3,
        absent="No generation",
    ),
    _tile(
        "Loads running",
        "Jobs that answer and whose load is not over.",
        f"count({running(_TARGET)}) or vector(0)",
    ),
    _tile(
        f"Time to {USABLE}",
        f"Mean time from the start of a load to a published quality of {USABLE} or more, newest load of each job.",
        _mean("holoray_time_to_quality_seconds", quality=USABLE),
        "s",
        decimals=2,
        absent="Not reached",
    ),
    _tile(
        "Decoding",
        "Bytes of weights written per second, all jobs.",
        _rate("holoray_decoded_bytes_total"),
        "Bps",
        absent="No traffic",
    ),
    _tile(
        "Received",
        "Bytes of stores received since the jobs began.",
        f"sum({_on_board('holoray_received_bytes_total')}) or vector(0)",
        "bytes",
    ),
    _tile(
        "Corrupt fragments",
        "Fragments without the digest that the manifest names, since the jobs began; none of them was used.",
        f"sum({_on_board('holoray_fragments_total', outcome='corrupt')}) or vector(0)",
        alarm=1,
    ),
    _tile(
        "Workers",
        "Worker actors that have joined.",
        f"sum({_on_board('holoray_actors', role='worker')}) or vector(0)",
    ),
    _tile(
        "Replicas down",
        "Endpoints of the targets files that do not answer. A job that is over leaves no trace here.",
        f'count(up{{job="{REPLICAS}"}} == 0) or vector(0)',
        alarm=1,
    ),
)

_PROGRESS: Final = Row(
    "Progress: how good is it, and when is it good enough?",
    (
        Panel(
            "Quality and target",
            "Quality of the newest generation of each job, and what the job is heading for.",
            (Query(_QUALITY, "{{instance}}"), Query(_TARGET, "{{instance}} target")),
            unit="percentunit",
            decimals=3,
            bounds=(0, 1),
        ),
        Panel(
            "Signal to noise",
            "The same in decibels, where steps near 1 can be told apart: 20 dB is .99, 30 dB .999; an exact model is "
            "cut to 120 dB.",
            (Query(f"-10 * log10(clamp_min(1 - {_QUALITY}, 1e-12))", "{{instance}}"),),
            unit="dB",
            bounds=(0, 120),
        ),
        Panel(
            "Time to quality",
            "Mean time from the start of a load to each level, newest load of each job.",
            (Query(_mean("holoray_time_to_quality_seconds", "quality"), "{{quality}}"),),
            kind="bargauge",
            unit="s",
            absent="Not reached",
        ),
        Panel(
            "Time without progress",
            "Time since the last applied fragment, of loads that are not over. Generations wait for their consumer.",
            (Query(running(f"time() - {_on_board('holoray_last_progress_timestamp_seconds')}"), "{{instance}}"),),
            unit="s",
        ),
        Panel(
            "Fragments assigned",
            "Fragments that workers have in hand or in their queue.",
            (Query(_on_board("holoray_fragments_pending"), "{{instance}}"),),
        ),
        Panel(
            "Generations",
            "Number of the newest generation.",
            (Query(_on_board("holoray_generation"), "{{instance}}"),),
        ),
        Panel(
            "Loads finished",
            "Newest load of each job by outcome.",
            (Query(f"sum by (outcome) ({_newest('holoray_loads_total')})", "{{outcome}}"),),
            kind="bargauge",
            absent="None",
        ),
        Panel(
            "Duration of loads",
            "Mean wall time of the newest loads by outcome.",
            (Query(_mean("holoray_load_duration_seconds", "outcome"), "{{outcome}}"),),
            kind="bargauge",
            unit="s",
            absent="None",
        ),
    ),
)

_STAGES: Final = Row(
    "Stages: what takes the time?",
    (
        Panel(
            "Bytes per second",
            "Received: from stores, as stored. Decoded: weights written. Between nodes: slots that another node "
            "needed.",
            (
                Query(_rate("holoray_received_bytes_total"), "received"),
                Query(_rate("holoray_decoded_bytes_total"), "decoded"),
                Query(_rate("holoray_combine_bytes_total"), "between nodes"),
            ),
            unit="Bps",
        ),
        Panel(
            "Cores busy",
            "Seconds of work per second, by stage: the tallest is the bottleneck.",
            (Query(_rate("holoray_stage_busy_seconds_total", "stage"), "{{stage}}"),),
            stacked=True,
            decimals=2,
        ),
        Panel(
            "Time per unit of work, 95 %",
            "95th percentile by stage.",
            (
                Query(
                    f"histogram_quantile(0.95, {_rate('holoray_stage_duration_seconds_bucket', 'stage', 'le')})",
                    "{{stage}}",
                ),
            ),
            unit="s",
        ),
        Panel(
            "Time per unit of work, distribution",
            "Of the chosen stages.",
            (Query(_rate("holoray_stage_duration_seconds_bucket", "le", stage="~$stage"), "{{le}}"),),
            kind="heatmap",
            unit="s",
        ),
    ),
)

_SOURCES: Final = Row(
    "Sources: who gives what, where there are several?",
    (
        Panel(
            "Bytes per second by source",
            "Received from each source, whatever it was worth.",
            (Query(_rate("holoray_source_received_bytes_total", "source"), "{{source}}"),),
            unit="Bps",
            stacked=True,
        ),
        Panel(
            "Faults by source",
            "Since the jobs began: requests that failed, wrong digests, opened breakers, proven liars.",
            (
                Query(
                    f"sum by (source, event) ({_on_board('holoray_source_events_total', event=_FAULTS)})",
                    "{{source}} {{event}}",
                ),
            ),
            absent="None",
        ),
        Panel(
            "Requests by kind",
            "Requests to all sources; of them second tries, and hedges of what was slow elsewhere.",
            (Query(_rate("holoray_source_events_total", "event", event="~requests|retries|hedges"), "{{event}}"),),
            unit="cps",
        ),
        Panel(
            "Hedged bytes",
            "Share of what was received that was asked for because another source was slow.",
            (
                Query(
                    f"sum({_on_board('holoray_source_hedged_bytes_total')}) / "
                    f"sum({_on_board('holoray_source_received_bytes_total')})"
                ),
            ),
            unit="percentunit",
            decimals=2,
        ),
    ),
)

_TRUST: Final = Row(
    "Trust and recovery: what went wrong, and what did it cost?",
    (
        Panel(
            "Fragments by fate",
            "Applied; redone, because the worker that had them died; corrupt, and dropped.",
            (Query(_rate("holoray_fragments_total", "outcome"), "{{outcome}}"),),
            unit="cps",
            stacked=True,
        ),
        Panel(
            "Bytes by fate",
            "Received so far, by the fate of their fragments: all but `applied` is waste.",
            (Query(f"sum by (outcome) ({_on_board('holoray_received_bytes_total')})", "{{outcome}}"),),
            unit="bytes",
            stacked=True,
        ),
        Panel(
            "Actors alive",
            "By role.",
            (Query(f"sum by (role) ({_on_board('holoray_actors')})", "{{role}}"),),
        ),
        Panel(
            "Restarts",
            "Actors that were replaced since the jobs began, by role.",
            (Query(f"sum by (role) ({_on_board('holoray_actor_restarts_total')})", "{{role}}"),),
            absent="None",
        ),
    ),
)

_SERVED: Final = Row(
    "Servers: what do others read from `holoray serve`?",
    (
        Panel(
            "Bytes served",
            "Sent by servers per second.",
            (Query(_rate("holoray_served_bytes_total"), "served"),),
            unit="Bps",
        ),
        Panel(
            "Calls answered",
            "By servers per second. Refused: no such file, wrong token, too many readers. Cancelled by the client.",
            (Query(_rate("holoray_served_calls_total", "outcome"), "{{outcome}}"),),
            unit="cps",
            stacked=True,
        ),
    ),
)

_WHAT: Final = Row(
    "What runs",
    (
        Panel(
            "Versions",
            "Of holoray, and its backend, by endpoint.",
            (Query(_on_board("holoray_build_info")),),
            kind="table",
        ),
        Panel(
            "Tensors",
            "Tensors of each model.",
            (Query(_on_board("holoray_tensors"), "{{instance}}"),),
            kind="bargauge",
        ),
    ),
)

BOARD: Final = Board(
    uid="holoray-warm-up",
    title="holoray: warm-up",
    description="Progressive model warm-up: how good the model is, how fast it gets better, what is in the way.",
    tiles=_TILES,
    rows=(_PROGRESS, _STAGES, _SOURCES, _TRUST, _SERVED, _WHAT),
    variables=(
        Variable("job", select("holoray_quality_target_ratio")),
        Variable("instance", select("holoray_quality_target_ratio", 'job=~"$job"')),
        Variable("stage", _on_board("holoray_stage_busy_seconds_total")),
    ),
    annotations=(
        Annotation("Alerts", 'ALERTS{alertname=~"Holoray.+",alertstate="firing"}', "{{alertname}} {{instance}}"),
        Annotation(
            "Restarts",
            f"sum by {BY_TARGET} (changes({_on_board('holoray_actor_restarts_total')}[{_WINDOW}])) > 0",
            "Actor restarted on {{instance}}",
        ),
    ),
)
