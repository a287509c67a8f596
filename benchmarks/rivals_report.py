"""What `rivals.measure` found, as tables and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.rivals import OURS, RATES, REFERENCE, BreakEven, Load, Results, source_name

_TICKS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10)
_HEAD = ("loader", "MB read", "quality", "first tensor, s", "all it loads, s", "times safetensors' speed")


def markdown(results: Results) -> str:
    """A table for each model and source, and one of break-even bandwidths."""
    parts = []
    for (model, source), loads in groupby(results.loads, key=lambda row: (row.model, row.source)):
        parts.append(_table(f"{model}, {source}", _HEAD, list(_load_rows(list(loads)))))
    if results.break_evens:
        head = ("rival", "`planes` complete are faster below", "measured: times the rival's speed at")
        rows = [_break_even_row(row) for row in results.break_evens]
        parts.append(_table(f"Break-even bandwidth, {results.break_evens[0].model}", head, rows))
        parts.append(_in_words(results.break_evens))
    return "\n".join(parts)


def _load_rows(loads: Sequence[Load]) -> Iterator[tuple[str, ...]]:
    reference = next((row.total_s for row in loads if row.loader == REFERENCE), None)
    for row in loads:
        if row.total_s is None:
            yield (row.loader, row.note, "", "", "", "")
            continue
        first = "" if row.first_s is None else f"{row.first_s:.3f}"
        ratio = "" if reference is None else f"{reference / row.total_s:.2f}x"
        quality = f"{math.floor(row.quality * 1e4) / 1e4:.4f}" if row.partial else "exact"
        yield (row.loader, f"{row.bytes_read / 1e6:.1f}", quality, first, f"{row.total_s:.3f}", ratio)


def _break_even_row(row: BreakEven) -> tuple[str, ...]:
    below = "any bandwidth" if math.isinf(row.rate) else f"{row.rate / 1e6:,.0f} MB/s" if row.rate else "none"
    return (row.rival, below, ", ".join(f"{ratio:.2f}x at {rate / 1e6:,.0f} MB/s" for rate, ratio in row.measured))


def _in_words(rows: Sequence[BreakEven]) -> str:
    hardest = min(rows, key=lambda row: row.rate)
    reference = next((row for row in rows if row.rival == REFERENCE), hardest)
    said = [f"than {row.rival} below {_break_even_row(row)[1]}" for row in (reference, hardest)]
    words = said[0] if reference is hardest else f"{said[0]}, and than the best rival: {said[1]}"
    return f"{OURS}, complete, is faster {words}.\n"


def _table(title: str, head: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [f"### {title}", "", _line(head), "|" + "---|" * len(head), *map(_line, rows)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plot(results: Results, path: Path) -> None:
    """Seconds (the shortest run) over bandwidth for the first model, both logarithmic; needs matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.5, 5.5), dpi=120)
    model = results.loads[0].model
    rates = sorted(rate for rate in RATES if not math.isinf(rate))
    for name in dict.fromkeys(row.loader for row in results.loads):
        found = {r.rate: r.best_s for r in results.loads if (r.model, r.loader) == (model, name) and r.rate in rates}
        seconds = [s for rate in rates if (s := found.get(rate)) is not None]
        if len(seconds) < len(rates):
            continue
        style = "--" if " to " in name else "-" if name.startswith("holoray") else ":"
        axes.plot([rate / 1e6 for rate in rates], seconds, style, marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="bandwidth of the source, MB/s", ylabel="seconds")
    axes.set_title(f"Time to load {model}, loopback")
    axes.set_xticks([rate / 1e6 for rate in rates], [source_name(rate).removesuffix(" MB/s") for rate in rates])
    axes.set_yticks(_TICKS_S, [f"{s:g}" for s in _TICKS_S])
    axes.minorticks_off()
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
