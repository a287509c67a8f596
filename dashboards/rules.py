"""Recording rules and alerts: few, on symptoms, each with what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from dashboards.promql import BY_TARGET, counted_within, running, select
from dashboards.scraping import REPLICAS

STALLED_S: Final = 60
SLOW_S: Final = 60
USABLE: Final = "0.99"  # the level whose time is alerted on
_RECENT: Final = "10m"


@dataclass(frozen=True, slots=True)
class Recording:
    """An expression kept under a name of the form `level:metric:operation`."""

    name: str
    expr: str

    def as_rule(self) -> dict[str, Any]:
        return {"record": self.name, "expr": self.expr}


@dataclass(frozen=True, slots=True)
class Alert:
    """An alert; `lasting` is for how long its expression must hold. The texts may use Prometheus' templates."""

    name: str
    expr: str
    lasting: str
    severity: Literal["critical", "warning"]
    summary: str
    description: str
    runbook: str

    def as_rule(self) -> dict[str, Any]:
        return {
            "alert": self.name,
            "expr": self.expr,
            "for": self.lasting,
            "labels": {"severity": self.severity},
            "annotations": {"summary": self.summary, "description": self.description, "runbook": self.runbook},
        }


def _sum(expr: str, *labels: str) -> str:
    return f"sum by ({', '.join(('job', 'instance', *labels))}) ({expr})"


def _rate(counter: str) -> str:
    return f"rate({select(counter)}[1m])"


CORRUPT: Final = Recording(
    "instance:holoray_fragments_corrupt:increase10m",
    _sum(counted_within(select("holoray_fragments_total", outcome="corrupt"), _RECENT)),
)
RESTARTS: Final = Recording(
    "instance:holoray_actor_restarts:increase10m",
    _sum(counted_within(select("holoray_actor_restarts_total"), _RECENT)),
)
FAILED: Final = Recording(
    "instance:holoray_loads_failed:increase10m",
    _sum(counted_within(select("holoray_loads_total", outcome="failed"), _RECENT)),
)
# Buckets as they are, not their rate: a job sees each quality once, and one observation has no rate.
TIME_TO_QUALITY: Final = Recording(
    "job_quality:holoray_time_to_quality_seconds:p95",
    f"histogram_quantile(0.95, sum by (job, quality, le) ({select('holoray_time_to_quality_seconds_bucket')}))",
)

RECORDINGS: Final = (
    Recording("instance:holoray_received_bytes:rate1m", _sum(_rate("holoray_received_bytes_total"))),
    Recording("instance:holoray_decoded_bytes:rate1m", _sum(_rate("holoray_decoded_bytes_total"))),
    Recording(
        "instance_stage:holoray_stage_busy_seconds:rate1m", _sum(_rate("holoray_stage_busy_seconds_total"), "stage")
    ),
    CORRUPT,
    RESTARTS,
    FAILED,
    TIME_TO_QUALITY,
)

_PROGRESS: Final = select("holoray_last_progress_timestamp_seconds")
_ON: Final = "{{ $labels.instance }}"

ALERTS: Final = (
    Alert(
        "HolorayLoadStalled",
        # A load that never applied a fragment has no time of its last one.
        running(
            f"(time() - {_PROGRESS} > {STALLED_S} "
            f"or {select('holoray_quality_target_ratio')} unless on {BY_TARGET} {_PROGRESS})"
        ),
        "1m",
        "critical",
        f"The load on {_ON} makes no progress",
        f"No fragment was applied for more than {STALLED_S} s, or none at all since the job began, and the load is "
        "not over.",
        "Mostly the store's file system hangs (read a file of it on the workers' nodes; a worker that does not answer"
        " for five minutes is replaced), or the consumer's on_generation does not return, which the next generation "
        "but one waits for. Without any worker for a minute a load fails instead.",
    ),
    Alert(
        "HolorayLoadFailed",
        f"{FAILED.name} > 0",
        "0s",
        "critical",
        f"A load failed on {_ON}",
        "The job gave its load up; generations published before stay valid.",
        "The job's error says which it was and carries a hint: `ray job logs`, or what `wait()` raised. Exit code 3 "
        "of the command line: run `holoray verify STORE`. 5: make room in /dev/shm (two generations of the model a "
        "node). 6: the store is not at this path on every node. No worker within a minute: see `ray status`.",
    ),
    Alert(
        "HolorayCorruptFragments",
        f"{CORRUPT.name} > 0",
        "0s",
        "warning",
        f"{_ON} received corrupt fragments",
        "{{ printf `%.0f` $value }} fragments of the last 10 minutes had not the digest that the manifest names. None"
        " of them was used.",
        "Run `holoray verify STORE --expect sha256:...` on the node: it names each bad file, tensor and fragment. If "
        "the store is whole there, the disk, the memory or the network of the worker's node is at fault; else restore"
        " the store from its origin, or encode it again.",
    ),
    Alert(
        "HolorayWorkersRestarting",
        f"{RESTARTS.name} > 3",
        "0s",
        "warning",
        f"Workers of {_ON} keep dying",
        "{{ printf `%.0f` $value }} workers had to be replaced within 10 minutes. What they had in hand is redone; "
        "the result is the same.",
        "Look for the cause of death in `ray list actors --filter state=DEAD` and in the kernel's log: mostly the "
        "memory limit of the container or the node (OOM killer), or spot instances that are taken away.",
    ),
    Alert(
        "HolorayTimeToQualitySlow",
        f'{TIME_TO_QUALITY.name}{{quality="{USABLE}"}} > {SLOW_S}',
        "1m",
        "warning",
        f"Loads of {{{{ $labels.job }}}} take long to quality {USABLE}",
        f"95 % of the loads that are up now needed up to {{{{ $value | humanizeDuration }}}}, more than {SLOW_S} s.",
        "The board's row `Stages` names the stage that is busy: fetch is the store's disk or network (received bytes "
        "per second), decompress and accumulate are CPU (more workers, up to the cores of the node). If none is busy,"
        " workers started late: compare with actors alive.",
    ),
    Alert(
        "HolorayReplicaDown",
        f'up{{job="{REPLICAS}"}} == 0',
        "1m",
        "critical",
        f"The replica {_ON} does not answer",
        "It is listed in a targets file, so it should be up, and its endpoint did not answer for a minute.",
        "If the replica was taken out of service, take it out of the targets file. Else its process is gone: see its "
        "own log, and start it again.",
    ),
)


def recording_rules() -> dict[str, Any]:
    return {"groups": [{"name": "holoray-recording", "rules": [rule.as_rule() for rule in RECORDINGS]}]}


def alerting_rules() -> dict[str, Any]:
    return {"groups": [{"name": "holoray-alerts", "rules": [alert.as_rule() for alert in ALERTS]}]}
