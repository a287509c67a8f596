"""`python -m dashboards.generate [DIRECTORY]`: write the board and the configurations (default: beside this file)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

import yaml

from dashboards.content import BOARD
from dashboards.rules import alerting_rules, recording_rules
from dashboards.scraping import prometheus_config

HERE: Final = Path(__file__).resolve().parent
_HEADER: Final = "# Written by `python -m dashboards.generate`: change the Python beside it, not this file.\n"
_BOARDS: Final = "/var/lib/grafana/dashboards/holoray"


def generated() -> dict[str, str]:
    """The text of every generated file, by its path under `dashboards/`."""
    return {
        "grafana/holoray.json": json.dumps(BOARD.as_json(), indent=2) + "\n",
        "grafana/provisioning/dashboards/holoray.yml": _yaml(_provider()),
        "grafana/provisioning/datasources/prometheus.yml": _yaml(_datasource()),
        "prometheus/alerts.yml": _yaml(alerting_rules()),
        "prometheus/prometheus.yml": _yaml(prometheus_config()),
        "prometheus/recording.yml": _yaml(recording_rules()),
    }


def write(directory: Path) -> None:
    """Write every generated file under a directory."""
    for name, text in generated().items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _provider() -> dict[str, Any]:
    provider = {
        "name": "holoray",
        "type": "file",
        "folder": "holoray",
        "disableDeletion": True,
        "allowUiUpdates": False,
        "options": {"path": _BOARDS},
    }
    return {"apiVersion": 1, "providers": [provider]}


def _datasource() -> dict[str, Any]:
    source = {
        "name": "Prometheus",
        "uid": "prometheus",
        "type": "prometheus",
        "access": "proxy",
        "url": "http://127.0.0.1:9090",
        "isDefault": True,
        "jsonData": {"httpMethod": "POST", "timeInterval": "10s"},
    }
    return {"apiVersion": 1, "datasources": [source]}


def _yaml(value: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=118)
    return _HEADER + text


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
