"""Selectors over the catalogue of metrics: a name or label that does not exist is an error here, not an empty panel."""

from __future__ import annotations

from typing import Final

from holoray.metrics import CATALOGUE, HISTOGRAM

TARGET_LABELS: Final = ("job", "instance")  # Prometheus gives them to whatever it scrapes
BY_TARGET: Final = "(" + ", ".join(TARGET_LABELS) + ")"
_PARTS: Final = ("_bucket", "_sum", "_count")


def select(sample: str, *scope: str, **labels: str) -> str:
    """A selector of `sample` (a metric, or `_bucket`, `_sum`, `_count` of a histogram).

    `scope` are matchers on labels of the target, as PromQL writes them; `labels` must be equal to their values, or
    match a regular expression that follows a `~`. Raises ValueError for what the catalogue does not have.
    """
    known = sample_labels(sample)
    for label in labels:
        if label not in known:
            raise ValueError(f"{sample} has no label {label}; it has {known}")
    matchers = [*scope, *(_matcher(label, value) for label, value in labels.items())]
    return sample + ("{" + ",".join(matchers) + "}" if matchers else "")


def sample_labels(sample: str) -> tuple[str, ...]:
    """The labels that a sample of this name carries, without those of its target; ValueError if there is none."""
    for part in ("", *_PARTS):
        metric = CATALOGUE.get(sample.removesuffix(part)) if sample.endswith(part) else None
        if metric is not None and (metric.kind == HISTOGRAM) == bool(part):
            return (*metric.labels, "le") if part == "_bucket" else metric.labels
    raise ValueError(f"holoray.metrics has no {sample}")


def counted_within(counter: str, window: str) -> str:
    """How much a counter grew within a window, its first increment included.

    A counter of ours is born with its first increment, and `increase` only sees the difference of two samples: the
    one corrupt fragment of a load would be lost. What is younger than the window therefore counts as it is.
    """
    return f"({counter} unless {counter} offset {window}) or increase({counter}[{window}])"


def running(vector: str) -> str:
    """Only of loads that are not over: a job counts its load when it ends."""
    return f"{vector} unless on {BY_TARGET} {select('holoray_loads_total')}"


def _matcher(label: str, value: str) -> str:
    return f'{label}=~"{value[1:]}"' if value.startswith("~") else f'{label}="{value}"'
