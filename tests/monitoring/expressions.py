"""What is in a PromQL expression, by a parser that is not ours: names, labels, and what must not be done with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import promql_parser as promql

from dashboards.promql import TARGET_LABELS, sample_labels
from dashboards.rules import RECORDINGS
from holoray.metrics import CATALOGUE, COUNTER

MACROS: Final = {"$__rate_interval": "4s", "$__range": "1m", "$job": ".+", "$instance": ".+", "$stage": ".+"}
_PROMETHEUS: Final = {"up": (), "ALERTS": ("alertname", "alertstate")}  # what it makes itself
_RECORDED: Final = {rule.name: rule.expr for rule in RECORDINGS}
_OVER_COUNTERS: Final = ("rate", "increase", "irate", "changes", "resets")


def filled_in(expr: str, **values: str) -> str:
    """An expression of the board as Grafana sends it."""
    for macro, value in (MACROS | {f"${name}": value for name, value in values.items()}).items():
        expr = expr.replace(macro, value)
    return expr


def faults(expr: str) -> Iterator[str]:
    """What is wrong with an expression: syntax, names and labels that do not exist, rates of gauges."""
    try:
        tree = promql.parse(filled_in(expr))
    except ValueError as error:
        yield f"syntax: {error}"
        return
    known: set[str] = set()
    for selector in _nodes(tree, promql.VectorSelector):
        try:
            labels = labels_of(selector.name)
        except ValueError as error:
            yield str(error)
            continue
        known |= labels
        for matcher in selector.matchers.matchers:
            if matcher.name not in labels:
                yield f"{selector.name} has no label {matcher.name}"
    for node in _nodes(tree, promql.AggregateExpr, promql.BinaryExpr):
        for label in _grouping(node):
            if label not in known:
                yield f"nothing has the label {label}"
    for call in _nodes(tree, promql.Call):
        yield from _call_faults(call)


def _call_faults(call: Any) -> Iterator[str]:
    for argument in call.args:
        if call.func.name in _OVER_COUNTERS:
            for selector in _nodes(argument, promql.VectorSelector):
                if not _is_counter(selector.name):
                    yield f"{call.func.name} of {selector.name}, which is no counter"
        if call.func.name == "histogram_quantile":
            for node in _nodes(argument, promql.AggregateExpr):
                if "le" not in _grouping(node):
                    yield "histogram_quantile without le"


def metrics(expr: str) -> set[str]:
    """The samples that an expression selects."""
    return {selector.name for selector in _nodes(promql.parse(filled_in(expr)), promql.VectorSelector)}


def labels_of(sample: str) -> set[str]:
    """The labels of a sample, those of its target included; ValueError if there is none of this name."""
    if sample in _RECORDED:
        return {
            label for node in _nodes(promql.parse(_RECORDED[sample]), promql.AggregateExpr) for label in _grouping(node)
        }
    return {*(_PROMETHEUS[sample] if sample in _PROMETHEUS else sample_labels(sample)), *TARGET_LABELS}


def _nodes(tree: Any, *kinds: type) -> list[Any]:
    found: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, kinds):
            found.append(node)
        if isinstance(node, promql.MatrixSelector) and promql.VectorSelector in kinds:
            found.append(node.vector_selector)

    if isinstance(tree, promql.Expr):
        promql.walk(tree, pre_visit=visit)
    return found


def _grouping(node: Any) -> list[str]:
    """The labels of `by`, `without`, `on` and `ignoring`."""
    if node.modifier is None:
        return []
    clause = node.modifier.matching if isinstance(node, promql.BinaryExpr) else node.modifier
    return [] if clause is None else list(clause.labels)


def _is_counter(sample: str) -> bool:
    described = CATALOGUE.get(sample)
    return described.kind == COUNTER if described else sample.endswith(("_bucket", "_sum", "_count"))
