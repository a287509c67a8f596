"""Points of the quality benchmark as tables, and in words who is best where."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

from benchmarks.yardstick import IN_ORDER, RIVAL, SHARES, SUBSET, Point

_HEAD = "| coder | bytes, % of bf16 | relative error | weight cosine | embedding cosine |\n|---|---|---|---|---|"


def tables(points: Sequence[Point], bf16_bytes: int, sentences: int, seconds: float) -> str:
    """Everything as markdown."""
    streams = [p for p in points if p.kind != SUBSET]
    parts = [
        "### Bytes against usefulness: MiniLM-L6",
        f"{bf16_bytes / 1e6:.1f} MB as bf16; cosine between the embeddings of {sentences} sentences and those of the "
        "full model. Coders without calibration data; bytes count everything that a load needs (manifest, scales, "
        f"mandatory tensors). {seconds:.0f} s.",
        "#### Embedding cosine within so many bytes (% of bf16)",
        _by_share(streams, lambda p: p.score.embedding_cosine, lambda p: f"{p.score.embedding_cosine:.4f}"),
        "#### Relative error of the weights within so many bytes",
        _by_share(streams, lambda p: -p.score.relative_error, lambda p: f"{p.score.relative_error:.2g}"),
        "\n".join(_comparison(streams)),
        "#### All points, in streaming order",
        "\n".join([_HEAD, *map(_row, streams)]),
        "#### Random subsets: k eighths of the fragments of every tensor",
        "\n".join([_HEAD, *_subset_rows([p for p in points if p.kind == SUBSET])]),
    ]
    return "\n\n".join(parts) + "\n"


def within(points: Sequence[Point], coder: str, share: float) -> Point | None:
    """The largest point of a coder that fits into a share of the bf16 bytes."""
    fitting = [p for p in points if p.coder == coder and p.share <= share]
    return max(fitting, key=lambda p: p.share, default=None)


def best_within(points: Sequence[Point], share: float, worth: Callable[[Point], float]) -> list[Point]:
    """The best points that fit, all that are within rounding of the best."""
    found = [p for coder in _coders(points) if (p := within(points, coder, share)) is not None]
    most = max(map(worth, found), default=0.0)
    return [p for p in found if worth(p) >= most - 5e-7]


def _coders(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(p.coder for p in points))


def _by_share(points: Sequence[Point], worth: Callable[[Point], float], shown: Callable[[Point], str]) -> str:
    lines = [
        "| coder | " + " | ".join(f"{share:.1%}" for share in SHARES) + " | complete |",
        "|---" * (len(SHARES) + 2) + "|",
    ]
    best = {share: {p.coder for p in best_within(points, share, worth)} for share in SHARES}
    for coder in _coders(points):
        cells = []
        for share in SHARES:
            found = within(points, coder, share)
            text = "–" if found is None else shown(found)
            cells.append(f"**{text}**" if coder in best[share] else text)
        lines.append(f"| {coder} | " + " | ".join([*cells, _complete(points, coder)]) + " |")
    return "\n".join(lines)


def _complete(points: Sequence[Point], coder: str) -> str:
    last = max((p for p in points if p.coder == coder), key=lambda p: p.share)
    error = last.score.relative_error
    return f"{'exact' if error == 0 else f'error {error:.1e}'} at {last.share:.1%}"


def _comparison(points: Sequence[Point]) -> Iterator[str]:
    """Who has the better embeddings at each size: the best of ours, or the best rival."""
    yield "#### Ours or a rival?"
    yield ""
    for share in SHARES:
        ours, theirs = (
            best_within([p for p in points if p.kind == kind], share, lambda p: p.score.embedding_cosine)
            for kind in (IN_ORDER, RIVAL)
        )
        if not theirs:
            yield f"- {share:.1%}: no rival fits."
            continue
        mine, other = ours[0], theirs[0]
        gap = mine.score.embedding_cosine - other.score.embedding_cosine
        verdict = "a tie" if abs(gap) < 5e-6 else "ours" if gap > 0 else "**the rival is better**"
        yield f"- {share:.1%}: {verdict}: {_named(mine)}, {_named(other)}."


def _named(point: Point) -> str:
    return f"{point.coder} {point.score.embedding_cosine:.5f}"


def _row(point: Point) -> str:
    score = point.score
    return _cells(point.coder, point.share, score.relative_error, score.weight_cosine, score.embedding_cosine)


def _cells(name: str, share: float, error: float, weights: float, embeddings: float) -> str:
    return f"| {name} | {share:.1%} | {error:.3g} | {weights:.5f} | {embeddings:.5f} |"


def _subset_rows(points: Sequence[Point]) -> Iterator[str]:
    """Means over the seeds."""
    for coder, eighths in dict.fromkeys((p.coder, p.eighths) for p in points):
        drawn = [p for p in points if (p.coder, p.eighths) == (coder, eighths)]
        yield _cells(
            f"{coder}, {eighths} of 8",
            statistics.fmean(p.share for p in drawn),
            statistics.fmean(p.score.relative_error for p in drawn),
            statistics.fmean(p.score.weight_cosine for p in drawn),
            statistics.fmean(p.score.embedding_cosine for p in drawn),
        )
