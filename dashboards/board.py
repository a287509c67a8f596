"""A Grafana board as values: what is on it (rows, panels, queries), and the JSON that Grafana loads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from dashboards.scraping import SCRAPE_INTERVAL

WIDTH: Final = 24
SCHEMA_VERSION: Final = 39  # Grafana 10.4; later ones migrate it
DATASOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}

Json = dict[str, Any]
Kind = Literal["timeseries", "stat", "bargauge", "heatmap", "table"]


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL expression of a panel; `legend` names its series by `{{label}}`."""

    expr: str
    legend: str = ""

    def as_json(self, ref: str, kind: Kind) -> Json:
        instant = kind == "table"
        return {
            "datasource": DATASOURCE,
            "editorMode": "code",
            "expr": self.expr,
            "format": {"heatmap": "heatmap", "table": "table"}.get(kind, "time_series"),
            "instant": instant,
            "interval": SCRAPE_INTERVAL,  # or $__rate_interval would follow that of the data source
            "legendFormat": self.legend or "__auto",
            "range": not instant,
            "refId": ref,
        }


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture. `unit` is an id of Grafana; `alarm` the value from which on it is red; `width` of 24 columns."""

    title: str
    description: str
    queries: tuple[Query, ...]
    kind: Kind = "timeseries"
    unit: str = "short"
    width: int = 12
    height: int = 8
    stacked: bool = False
    decimals: int | None = None
    bounds: tuple[float, float] | None = None
    alarm: float | None = None
    absent: str = "No data"

    def as_json(self, number: int, x: int, y: int) -> Json:
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": f"{self.description} Metric: {', '.join(f'`{name}`' for name in self.metrics)}.",
            "datasource": DATASOURCE,
            "gridPos": {"h": self.height, "w": self.width, "x": x, "y": y},
            "fieldConfig": {"defaults": self._defaults(), "overrides": []},
            "options": _OPTIONS[self.kind],
            "targets": [query.as_json(chr(ord("A") + i), self.kind) for i, query in enumerate(self.queries)],
            "transformations": _TRANSFORMATIONS.get(self.kind, []),
        }

    @property
    def metrics(self) -> list[str]:
        """The metrics of the panel, as the catalogue names them."""
        names = re.findall(r"\b(?:holoray_\w+|up)\b", " ".join(query.expr for query in self.queries))
        return sorted({re.sub(r"_(bucket|sum|count)$", "", name) for name in names})

    def _defaults(self) -> Json:
        steps: list[Json] = [{"color": "green" if self.alarm is not None else "blue", "value": None}]
        if self.alarm is not None:
            steps.append({"color": "red", "value": self.alarm})
        defaults: Json = {
            "unit": self.unit,
            "noValue": self.absent,
            "thresholds": {"mode": "absolute", "steps": steps},
            "mappings": [{"type": "special", "options": {"match": "nan", "result": {"text": self.absent, "index": 0}}}],
        }
        if self.decimals is not None:
            defaults["decimals"] = self.decimals
        if self.bounds is not None:
            defaults["min"], defaults["max"] = self.bounds
        if self.kind == "timeseries":
            defaults["custom"] = {
                "drawStyle": "line",
                "fillOpacity": 25 if self.stacked else 5,
                "lineInterpolation": "stepAfter" if self.bounds else "linear",
                "lineWidth": 1,
                "showPoints": "auto",
                "spanNulls": False,
                "stacking": {"group": "A", "mode": "normal" if self.stacked else "none"},
            }
        return defaults


@dataclass(frozen=True, slots=True)
class Row:
    """A headline, and the panels below it from left to right."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Variable:
    """A choice at the top of the board: the values of a label in a selector."""

    name: str
    selector: str

    def as_json(self) -> Json:
        query = f"label_values({self.selector}, {self.name})"
        return {
            "name": self.name,
            "type": "query",
            "datasource": DATASOURCE,
            "definition": query,
            "query": {"query": query, "refId": f"{self.name}-values"},
            "refresh": 2,  # when the time range changes
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": ".+",
            "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
            "hide": 0,
        }


@dataclass(frozen=True, slots=True)
class Annotation:
    """Marks in all pictures wherever an expression has a value."""

    name: str
    expr: str
    title: str

    def as_json(self) -> Json:
        return {
            "name": self.name,
            "datasource": DATASOURCE,
            "enable": True,
            "expr": self.expr,
            "iconColor": "red",
            "titleFormat": self.title,
        }


@dataclass(frozen=True, slots=True)
class Board:
    """A board; `tiles` make the top row."""

    uid: str
    title: str
    description: str
    tiles: tuple[Panel, ...]
    rows: tuple[Row, ...]
    variables: tuple[Variable, ...] = ()
    annotations: tuple[Annotation, ...] = field(default=())

    @property
    def panels(self) -> tuple[Panel, ...]:
        return self.tiles + tuple(panel for row in self.rows for panel in row.panels)

    def as_json(self) -> Json:
        datasource = {
            "name": "datasource",
            "label": "Data source",
            "type": "datasource",
            "query": "prometheus",
            "refresh": 1,
            "hide": 0,
        }
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": ["holoray", "ray"],
            "schemaVersion": SCHEMA_VERSION,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "5s",
            "time": {"from": "now-15m", "to": "now"},
            "timezone": "browser",
            "templating": {"list": [datasource, *(variable.as_json() for variable in self.variables)]},
            "annotations": {"list": [annotation.as_json() for annotation in self.annotations]},
            "panels": list(self._layout()),
        }

    def _layout(self) -> Iterator[Json]:
        number = y = 0
        for row in (Row("", self.tiles), *self.rows):
            if row.title:
                number += 1
                yield {
                    "id": number,
                    "type": "row",
                    "title": row.title,
                    "collapsed": False,
                    "gridPos": {"h": 1, "w": WIDTH, "x": 0, "y": y},
                    "panels": [],
                }
                y += 1
            x = tallest = 0
            for panel in row.panels:
                if x + panel.width > WIDTH:
                    x, y, tallest = 0, y + tallest, 0
                number += 1
                yield panel.as_json(number, x, y)
                x, tallest = x + panel.width, max(tallest, panel.height)
            y += tallest


_REDUCED: Final = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_OPTIONS: Final[dict[Kind, Json]] = {
    "timeseries": {
        "legend": {"calcs": ["lastNotNull", "max"], "displayMode": "table", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "colorMode": "value",
        "graphMode": "area",
        "justifyMode": "auto",
        "orientation": "auto",
        "reduceOptions": _REDUCED,
        "textMode": "value",
    },
    "bargauge": {
        "displayMode": "gradient",
        "orientation": "horizontal",
        "reduceOptions": _REDUCED,
        "showUnfilled": True,
        "valueMode": "color",
    },
    "heatmap": {
        "calculate": False,
        "cellGap": 1,
        "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
        "legend": {"show": True},
        "tooltip": {"mode": "single", "showColorScale": True, "yHistogram": False},
        "yAxis": {"axisPlacement": "left", "unit": "s"},
    },
    "table": {"cellHeight": "sm", "showHeader": True},
}
_TRANSFORMATIONS: Final[dict[Kind, list[Json]]] = {
    "table": [{"id": "organize", "options": {"excludeByName": {"Time": True, "Value": True, "__name__": True}}}],
}
