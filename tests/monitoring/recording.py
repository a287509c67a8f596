"""Scrapes of real endpoints, kept with times of our choice and turned into blocks of Prometheus."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from prometheus_client.parser import text_string_to_metric_families
from prometheus_server import Labels, promtool

BEGAN: Final = 1_700_000_000.0
Samples = dict[str, dict[Labels, float]]


def scrape(url: str) -> Samples:
    """The samples of an endpoint, by name and labels."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return found


@dataclass
class Recording:
    """The scrapes of one endpoint, one a second, the last one at `end`."""

    instance: str
    end: float
    scrapes: list[Samples] = field(default_factory=list)

    @property
    def last(self) -> Samples:
        return self.scrapes[-1]

    def value(self, name: str, **labels: str) -> float:
        """A sample of the last scrape."""
        return self.last[name][frozenset(labels.items())]

    def times(self) -> list[float]:
        return [self.end - (len(self.scrapes) - 1 - i) for i in range(len(self.scrapes))]


def make_blocks(directory: Path, recordings: Iterable[Recording]) -> None:
    """Write what was recorded into `directory`/data, as Prometheus would have stored it under job `holoray`."""
    series: dict[str, dict[Labels, list[tuple[float, float]]]] = {}
    for recording in recordings:
        target = frozenset({("job", "holoray"), ("instance", recording.instance)})
        for at, samples in zip(recording.times(), recording.scrapes, strict=True):
            for name, values in samples.items():
                for labels, value in values.items():
                    series.setdefault(name, {}).setdefault(labels | target, []).append((at, value))
    lines = []
    for name, by_labels in series.items():
        lines.append(f"# TYPE {name} unknown")
        for labels, points in by_labels.items():
            text = ",".join(f'{label}="{value}"' for label, value in sorted(labels))
            lines += [f"{name}{{{text}}} {value!r} {at!r}" for at, value in points]
    path = directory / "scrapes.txt"
    path.write_text("\n".join([*lines, "# EOF", ""]), encoding="utf-8")
    done = promtool("tsdb", "create-blocks-from", "openmetrics", path, directory / "data")
    assert done.returncode == 0, done.stdout + done.stderr
