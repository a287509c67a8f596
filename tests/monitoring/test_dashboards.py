"""The generated files: committed as generated, over metrics that exist, and laid out so that Grafana shows them."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from expressions import faults, labels_of, metrics

from dashboards import generate
from dashboards.board import DATASOURCE, SCHEMA_VERSION, WIDTH
from dashboards.content import BOARD
from dashboards.promql import counted_within, select
from dashboards.rules import ALERTS, RECORDINGS
from dashboards.scraping import JOB_PORT
from holoray.metrics import CATALOGUE

Json = dict[str, Any]

BOARD_JSON: Final[Json] = json.loads((generate.HERE / "grafana/holoray.json").read_text(encoding="utf-8"))
NOT_ON_THE_BOARD: Final[Mapping[str, str]] = {}  # metric: why not
UNITS: Final = {"short", "percentunit", "s", "Bps", "bytes", "dB", "cps"}
DOCS: Final = (generate.HERE.parent / "docs/dashboards.md").read_text(encoding="utf-8")


def panels(board: Json) -> list[Json]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


# -- the files -----------------------------------------------------------------------------------------------


def test_committed_files_are_the_generated_ones() -> None:
    for name, text in generate.generated().items():
        assert (generate.HERE / name).read_text(encoding="utf-8") == text, f"run `make dashboards`: {name} is old"
    committed = {path.relative_to(generate.HERE).as_posix() for path in generate.HERE.glob("*/**/*") if path.is_file()}
    assert {name for name in committed if "__pycache__" not in name} == set(generate.generated())


def test_generating_elsewhere_leaves_the_committed_ones(tmp_path: Path) -> None:
    generate.write(tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")} == set(generate.generated())


def test_provisioning_names_what_there_is() -> None:
    files = generate.generated()
    (source,) = yaml.safe_load(files["grafana/provisioning/datasources/prometheus.yml"])["datasources"]
    (provider,) = yaml.safe_load(files["grafana/provisioning/dashboards/holoray.yml"])["providers"]
    assert (source["type"], source["uid"], source["access"]) == ("prometheus", "prometheus", "proxy")
    assert provider["type"] == "file"
    assert provider["options"]["path"] in DOCS
    for name in yaml.safe_load(files["prometheus/prometheus.yml"])["rule_files"]:
        assert f"prometheus/{name}" in files


def test_documents_name_the_port() -> None:
    cluster = (generate.HERE.parent / "docs/cluster.md").read_text(encoding="utf-8")
    for text in (DOCS, cluster):
        assert f"--metrics-port {JOB_PORT}" in text


# -- the expressions -----------------------------------------------------------------------------------------


def expressions() -> Iterator[tuple[str, str]]:
    """Every expression with the name of its place, as the committed files have it."""
    for panel in panels(BOARD_JSON):
        for target in panel["targets"]:
            yield f"{panel['title']}/{target['refId']}", target["expr"]
    for variable in BOARD_JSON["templating"]["list"][1:]:
        yield f"${variable['name']}", re.fullmatch(r"label_values\((.+), \w+\)", variable["definition"])[1]  # type: ignore[index]
    for annotation in BOARD_JSON["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]
    for name in ("recording", "alerts"):
        groups = yaml.safe_load((generate.HERE / f"prometheus/{name}.yml").read_text(encoding="utf-8"))["groups"]
        for rule in (rule for group in groups for rule in group["rules"]):
            yield rule.get("record") or rule["alert"], rule["expr"]


ALL: Final = dict(expressions())


@pytest.mark.parametrize("expr", ALL.values(), ids=ALL)
def test_expressions_use_what_exists(expr: str) -> None:
    assert list(faults(expr)) == []


PLANTED: Final = {
    "holoray_surprise_total": "no holoray_surprise_total",
    "holoray_stage_duration_seconds": "no holoray_stage_duration_seconds",
    "holoray_generation_bucket": "no holoray_generation_bucket",
    'holoray_fragments_total{worker="w0"}': "has no label worker",
    'rate(holoray_fragments_total{fate="applied"}[5m])': "has no label fate",
    "sum by (stage) (holoray_generation)": "nothing has the label stage",
    "holoray_generation unless on (role) holoray_tensors": "nothing has the label role",
    "rate(holoray_generation[5m])": "which is no counter",
    "histogram_quantile(0.9, sum by (stage) (rate(holoray_stage_duration_seconds_bucket[5m])))": "without le",
    "sum(rate(holoray_fragments_total[5m])": "syntax",
    'job_quality:holoray_time_to_quality_seconds:p95{instance="a"}': "has no label instance",
}


@pytest.mark.parametrize(("expr", "expected"), PLANTED.items())
def test_the_check_goes_red_on(expr: str, expected: str) -> None:
    assert any(expected in fault for fault in faults(expr)), list(faults(expr))


def test_every_metric_is_on_the_board() -> None:
    shown = {metric for panel in BOARD.panels for metric in panel.metrics}
    assert NOT_ON_THE_BOARD.keys() <= CATALOGUE.keys() - shown
    assert shown - {"up"} == CATALOGUE.keys() - NOT_ON_THE_BOARD.keys()


def test_legends_name_labels_that_the_series_have() -> None:
    for panel in panels(BOARD_JSON):
        for target in panel["targets"]:
            there = set().union(*(labels_of(name) for name in metrics(target["expr"])))
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= there, panel["title"]


def test_selectors_are_checked_where_they_are_written() -> None:
    assert select("holoray_stage_duration_seconds_bucket", 'job="x"', le="1", stage="~a|b") == (
        'holoray_stage_duration_seconds_bucket{job="x",le="1",stage=~"a|b"}'
    )
    for name in ("holoray_nothing", "holoray_load_duration_seconds", "holoray_generation_sum"):
        with pytest.raises(ValueError, match=name):
            select(name)
    with pytest.raises(ValueError, match="worker"):
        select("holoray_actors", worker="w0")


# -- the board -----------------------------------------------------------------------------------------------


def layout_faults(board: Json) -> Iterator[str]:
    """What Grafana would show wrongly or not at all."""
    taken: dict[tuple[int, int], str] = {}
    for panel in board["panels"]:
        grid, title = panel["gridPos"], panel["title"]
        if not (grid["w"] > 0 and grid["h"] > 0 and grid["x"] >= 0 and grid["x"] + grid["w"] <= WIDTH):
            yield f"{title} leaves the grid"
        for cell in (
            (x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])
        ):
            if cell in taken:
                yield f"{title} lies on {taken[cell]}"
                break
            taken[cell] = title
    for kind, values in (("id", [p["id"] for p in board["panels"]]), ("title", [p["title"] for p in board["panels"]])):
        yield from (f"{kind} {value} is there {n} times" for value, n in Counter(values).items() if n > 1)
    for panel in panels(board):
        yield from _panel_faults(panel)


def _panel_faults(panel: Json) -> Iterator[str]:
    title, refs = panel["title"], [target["refId"] for target in panel["targets"]]
    if not refs or len(set(refs)) < len(refs):
        yield f"{title}: refIds {refs}"
    if any(target["datasource"] != DATASOURCE for target in (panel, *panel["targets"])):
        yield f"{title} does not follow the variable of the data source"
    if panel["fieldConfig"]["defaults"]["unit"] not in UNITS:
        yield f"{title} has an unknown unit"
    if not re.search(r"[.:] Metric: `\w+`(, `\w+`)*\.$", panel["description"]):
        yield f"{title} does not say what it shows"
    if any("[" in t["expr"] and not re.search(r"\[\$__(rate_interval|range)\]", t["expr"]) for t in panel["targets"]):
        yield f"{title} has a window of its own"


def test_the_board_is_laid_out() -> None:
    assert list(layout_faults(BOARD_JSON)) == []
    assert BOARD_JSON["schemaVersion"] == SCHEMA_VERSION >= 36
    assert re.fullmatch(r"[a-z0-9-]{8,40}", BOARD_JSON["uid"])
    assert "id" not in BOARD_JSON  # Grafana's own number, which another Grafana would not know
    tiles = [panel["gridPos"] | {"type": panel["type"]} for panel in BOARD_JSON["panels"][:8]]
    assert tiles == [{"x": 3 * i, "y": 0, "w": 3, "h": 4, "type": "stat"} for i in range(8)]


def test_variables_are_defined_and_used() -> None:
    names = {variable["name"] for variable in BOARD_JSON["templating"]["list"]}
    used = set(re.findall(r"\$\{?(?!__)(\w+)", json.dumps([BOARD_JSON["panels"], BOARD_JSON["annotations"]])))
    assert names == used


def plant(**changes: Any) -> Json:
    board = copy.deepcopy(BOARD_JSON)
    board["panels"][1] |= changes
    return board


@pytest.mark.parametrize(
    ("board", "expected"),
    [
        (plant(gridPos={"x": 2, "y": 0, "w": 3, "h": 4}), "lies on"),
        (plant(gridPos={"x": 22, "y": 900, "w": 3, "h": 4}), "leaves the grid"),
        (plant(id=BOARD_JSON["panels"][0]["id"]), "id 1 is there 2 times"),
        (plant(title=BOARD_JSON["panels"][0]["title"]), "title Quality is there"),
        (plant(targets=BOARD_JSON["panels"][1]["targets"] * 2), "refIds"),
        (plant(datasource={"type": "prometheus", "uid": "mine"}), "data source"),
        (plant(fieldConfig={"defaults": {"unit": "furlongs"}}), "unknown unit"),
        (plant(description="Pretty."), "does not say"),
    ],
)
def test_the_layout_check_goes_red_on(board: Json, expected: str) -> None:
    found = list(layout_faults(board))
    assert any(expected in fault for fault in found), found


# -- the rules -----------------------------------------------------------------------------------------------


def test_alerts_say_what_to_do() -> None:
    assert len({alert.name for alert in ALERTS}) == len(ALERTS)
    for alert in ALERTS:
        assert re.fullmatch(r"Holoray([A-Z][a-z]+)+", alert.name)
        assert re.fullmatch(r"\d+[sm]", alert.lasting)
        assert alert.severity in ("critical", "warning")
        assert min(len(alert.summary), len(alert.description), len(alert.runbook)) > 20
        assert f"### {alert.name}" in DOCS


def test_recorded_names_have_their_three_parts() -> None:
    for rule in RECORDINGS:
        level, metric, operation = rule.name.split(":")
        assert level
        assert operation
        assert any(metric.startswith(name.removesuffix("_total")) for name in CATALOGUE), rule.name


def test_docs_have_every_row() -> None:
    for row in BOARD.rows:
        assert f"**{row.title.partition(':')[0]}**" in DOCS


def test_a_counter_within_a_window_counts_from_its_birth() -> None:
    assert counted_within("c", "5m") == "(c unless c offset 5m) or increase(c[5m])"
