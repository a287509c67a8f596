"""Points of the quality benchmark as a picture (needs matplotlib)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.yardstick import RIVAL, SUBSET, Point


def draw(points: Sequence[Point], path: Path) -> None:
    """Embedding cosine and relative error by bytes in streaming order; ours solid, rivals dashed and hollow."""
    from matplotlib.figure import Figure

    streams = [p for p in points if p.kind != SUBSET]
    figure = Figure(figsize=(14, 6.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _panel(left, streams, lambda p: 1 - p.score.embedding_cosine, floor=1e-5)
    left.set(title="embeddings", ylabel="1 - embedding cosine (lower is better)")
    _panel(right, streams, lambda p: p.score.relative_error, floor=1e-3)
    right.set(title="weights", ylabel="relative error (lower is better)")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    figure.suptitle("MiniLM-L6: what so many bytes give. On the lower edge: exact, or nearer than the axis shows")
    figure.savefig(path, dpi=130)


def _panel(axes: Any, points: Sequence[Point], value: Callable[[Point], float], floor: float) -> None:
    markers = cycle("osD^vP*X<>")
    for coder in dict.fromkeys(p.coder for p in points):
        mine = sorted((p for p in points if p.coder == coder), key=lambda p: p.share)
        rival = mine[0].kind == RIVAL
        (line,) = axes.plot([100 * p.share for p in mine], [max(value(p), floor) for p in mine], label=coder)
        line.set(linestyle="--" if rival else "-", marker=next(markers), markersize=8 if rival else 5, clip_on=False)
        if rival:
            line.set_markerfacecolor("none")
    axes.set(xlabel="bytes read, % of bf16", yscale="log", ylim=(floor, 1.3))
    axes.set_xlim(0, 103 * max(p.share for p in points))
    axes.grid(alpha=0.3, which="both")
