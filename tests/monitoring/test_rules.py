"""Prometheus' own judgement of the configuration and the rules: every alert fires on its symptom, and not on health."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from prometheus_server import promtool

from dashboards import generate
from dashboards.rules import ALERTS

pytestmark = pytest.mark.promtool

PROMETHEUS: Final = generate.HERE / "prometheus"
ON: Final = 'job="holoray",instance="a"'
REPLICA: Final = 'job="holoray-replicas",instance="r"'
TARGET: Final = {f"holoray_quality_target_ratio{{{ON}}}": "1x400"}
CORRUPT: Final = f'holoray_fragments_total{{{ON},outcome="corrupt"}}'
RESTARTS: Final = f'holoray_actor_restarts_total{{{ON},role="worker"}}'
FAILED: Final = f'holoray_loads_total{{{ON},outcome="failed"}}'
OK: Final = f'holoray_loads_total{{{ON},outcome="ok"}}'
PROGRESS: Final = f"holoray_last_progress_timestamp_seconds{{{ON}}}"


def slow(seconds: float, quality: str = "0.99") -> dict[str, str]:
    """A load that reached a quality after so long, since 20 s."""
    return {
        f'holoray_time_to_quality_seconds_bucket{{{ON},quality="{quality}",le="{le}"}}': f"_x4 {int(seconds <= le)}x400"
        for le in (20.0, 40.0, 80.0, float("inf"))
    }


@dataclass(frozen=True)
class Case:
    """Series in steps of 5 s, and when an alert fires (seconds) or does not."""

    alert: str
    series: dict[str, str]
    fires: tuple[int, ...] = ()
    silent: tuple[int, ...] = ()


CASES: Final = {
    "no progress for a minute": Case("HolorayLoadStalled", TARGET | {PROGRESS: "10x400"}, (140, 600), (60, 115)),
    "no progress ever": Case("HolorayLoadStalled", TARGET, (65, 600), (0, 50)),
    "steady progress": Case("HolorayLoadStalled", TARGET | {PROGRESS: "0+5x400"}, silent=(65, 140, 600)),
    "slow start": Case("HolorayLoadStalled", TARGET | {PROGRESS: "_x8 40+5x400"}, silent=(65, 140, 600)),
    "a pause of a minute": Case(
        "HolorayLoadStalled", TARGET | {PROGRESS: "0+5x4 20x13 90+5x400"}, silent=(85, 90, 100, 600)
    ),
    "a load that is over": Case(
        "HolorayLoadStalled", TARGET | {PROGRESS: "0+5x4 20x400", OK: "_x5 1x400"}, silent=(65, 140, 600)
    ),
    "a load that failed is no stall": Case(
        "HolorayLoadStalled", TARGET | {PROGRESS: "0+5x4 20x400", FAILED: "_x5 1x400"}, silent=(140, 600)
    ),
    "one of two loads stalls": Case(
        "HolorayLoadStalled",
        TARGET | {PROGRESS: "10x400", f"holoray_last_progress_timestamp_seconds{{{REPLICA}}}": "0+5x400"},
        (140,),
        (60,),
    ),
    "a failure": Case("HolorayLoadFailed", {FAILED: "_x5 1x400"}, (35, 600), (20, 700)),
    "a success": Case("HolorayLoadFailed", {OK: "_x5 1x400"}, silent=(30, 600)),
    "a failure after another": Case("HolorayLoadFailed", {FAILED: "_x5 1x200 2x200"}, (35, 1040, 1600), (900, 1700)),
    "one corrupt fragment": Case("HolorayCorruptFragments", {CORRUPT: "_x5 1x400"}, (35, 600), (20, 700)),
    "sound fragments": Case(
        "HolorayCorruptFragments", {CORRUPT.replace("corrupt", "applied"): "0+9x400"}, silent=(30, 600)
    ),
    "four workers, one after the other": Case(
        "HolorayWorkersRestarting", {RESTARTS: "_x5 1x9 2x9 3x9 4x400"}, (190, 600), (20, 60, 150, 900)
    ),
    "three workers": Case("HolorayWorkersRestarting", {RESTARTS: "_x5 3x400"}, silent=(40, 600, 900)),
    "four workers in an hour": Case(
        "HolorayWorkersRestarting", {RESTARTS: "_x5 1x180 2x180 3x180 4x180"}, silent=(2800,)
    ),
    "a slow load": Case("HolorayTimeToQualitySlow", slow(70), (90, 600), (20, 70)),
    "a fast load": Case("HolorayTimeToQualitySlow", slow(30), silent=(90, 600)),
    "slow to the very end": Case("HolorayTimeToQualitySlow", slow(70, quality="1"), silent=(90, 600)),
    "a replica is gone": Case("HolorayReplicaDown", {f"up{{{REPLICA}}}": "1x4 0x400"}, (90,), (20, 60)),
    "a replica hiccups": Case("HolorayReplicaDown", {f"up{{{REPLICA}}}": "1x4 0x6 1x400"}, silent=(50, 90, 120)),
    "no job runs": Case("HolorayReplicaDown", {f"up{{{ON}}}": "0x400"}, silent=(90, 600)),
}


def as_test(case: Case) -> dict[str, Any]:
    """The case in promtool's terms; labels of alerts are left to the series, so only how many fire is said."""
    query = f'count(ALERTS{{alertname="{case.alert}",alertstate="firing"}}) or vector(0)'
    return {
        "interval": "5s",
        "input_series": [{"series": series, "values": values} for series, values in case.series.items()],
        "promql_expr_test": [
            {"expr": query, "eval_time": f"{at}s", "exp_samples": [{"labels": "{}", "value": value}]}
            for value, times in ((1, case.fires), (0, case.silent))
            for at in times
        ],
    }


def run(tmp_path: Path, *tests: dict[str, Any]) -> tuple[int, str]:
    content = {
        "rule_files": [str(PROMETHEUS / "recording.yml"), str(PROMETHEUS / "alerts.yml")],
        "evaluation_interval": "5s",
        "tests": list(tests),
    }
    path = tmp_path / "test.yml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    done = promtool("test", "rules", path)
    return done.returncode, done.stdout + done.stderr


def test_configuration_and_rules_are_valid() -> None:
    for arguments in (("config", PROMETHEUS / "prometheus.yml"), ("rules", PROMETHEUS / "alerts.yml")):
        done = promtool("check", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_alerts(case: Case, tmp_path: Path) -> None:
    code, output = run(tmp_path, as_test(case))
    assert code == 0, output


def test_every_alert_fires_somewhere_and_is_silent_elsewhere() -> None:
    names = {alert.name for alert in ALERTS}
    assert {case.alert for case in CASES.values() if case.fires} == names
    assert {case.alert for case in CASES.values() if case.silent and not case.fires} == names


def test_a_wrong_expectation_is_noticed(tmp_path: Path) -> None:
    code, output = run(tmp_path, as_test(Case("HolorayCorruptFragments", {CORRUPT: "_x5 1x400"}, fires=(20,))))
    assert code != 0
    assert "HolorayCorruptFragments" in output


def test_an_alert_says_where_and_how_many(tmp_path: Path) -> None:
    (alert,) = [alert for alert in ALERTS if alert.name == "HolorayCorruptFragments"]
    expected = {
        "exp_labels": {"job": "holoray", "instance": "a", "severity": "warning"},
        "exp_annotations": {
            "summary": "a received corrupt fragments",
            "description": "3 " + alert.description.partition("}} ")[2],
            "runbook": alert.runbook,
        },
    }
    test = as_test(Case(alert.name, {CORRUPT: "_x5 3x400"})) | {
        "alert_rule_test": [{"eval_time": "35s", "alertname": alert.name, "exp_alerts": [expected]}]
    }
    code, output = run(tmp_path, test)
    assert code == 0, output
