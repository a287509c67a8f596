"""The quality benchmark measures what it says: scores, subsets, sizes, and tables that name the better one."""

from __future__ import annotations

import random
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import holoray
import minilm
from benchmarks import quality
from benchmarks.quality_plot import draw
from benchmarks.quality_tables import best_within, tables, within
from benchmarks.yardstick import IN_ORDER, RIVAL, SUBSET, UNSEEN, Point, Score, Yardstick
from holoray.tensor import Array


@pytest.fixture(scope="module")
def yardstick() -> Yardstick:
    return Yardstick(UNSEEN[:3])


def test_scores_of_known_approximations(yardstick: Yardstick) -> None:
    whole = yardstick.score({})
    assert whole.relative_error == 0
    assert whole.weight_cosine == pytest.approx(1.0, abs=1e-6)
    assert whole.embedding_cosine == pytest.approx(1.0, abs=1e-6)
    assert yardstick.score(yardstick.weights) == whole
    larger = {n: 1.125 * w.astype(np.float32) for n, w in yardstick.weights.items() if w.dtype == ml_dtypes.bfloat16}
    scaled = yardstick.score(larger)
    assert scaled.relative_error == pytest.approx(0.125, rel=1e-5)
    assert scaled.weight_cosine == pytest.approx(1.0, abs=1e-6)
    assert scaled.embedding_cosine < 0.999
    nothing = yardstick.score({n: np.zeros_like(w) for n, w in yardstick.weights.items()})
    assert nothing.relative_error == pytest.approx(1.0, abs=1e-6)
    assert nothing.weight_cosine == 0


def test_sizes_of_the_model(yardstick: Yardstick) -> None:
    assert yardstick.nbytes == sum(w.nbytes for w in yardstick.weights.values())
    coded = 2 * sum(w.size for w in yardstick.matrices.values())
    assert yardstick.rest_nbytes == yardstick.nbytes - coded
    assert 0 < yardstick.rest_nbytes < 0.01 * yardstick.nbytes
    assert len({*UNSEEN, *minilm.SENTENCES}) == 80


@pytest.mark.parametrize("codec", ["planes", "spectral", "raw"])
def test_subsets_are_read_and_counted_as_the_curve_says(codec: str, model: dict[str, Array]) -> None:
    store = holoray.MemoryStore()
    holoray.encode(model, store, codec=codec)
    sealed, rng = holoray.open(store), random.Random(4)
    for share in (0.4, 1.0):
        subset = {t.name: [f.index for f in t.fragments if rng.random() < share] for t in sealed.manifest.tensors}
        nbytes, weights = quality._load_subset(sealed, subset)
        named = [(name, index) for name, indices in subset.items() for index in indices]
        stored = sum(sealed.entry(name).fragments[index].stored_bytes for name, index in named)
        assert nbytes == len(sealed.manifest.encoded) + stored
        error = energy = 0.0
        for name, truth in model.items():
            if truth.dtype.kind == "i":
                continue
            wide = np.nan_to_num(truth.astype(np.float64))
            error += float(np.square(np.nan_to_num(weights[name].astype(np.float64)) - wide).sum())
            energy += float(np.square(wide).sum())
        assert sealed.curve().quality_of(named).ratio == pytest.approx(1 - error / energy, abs=1e-4)


class SmallYardstick(Yardstick):
    """Two small matrices and no sentences."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.weights = {n: rng.standard_normal((128, 256)).astype(ml_dtypes.bfloat16) for n in "ab"}
        self.weights["bias"] = np.zeros(7, ml_dtypes.bfloat16)
        self.nbytes = sum(w.nbytes for w in self.weights.values())

    @property
    def matrices(self) -> dict[str, Array]:
        return {n: self.weights[n].astype(np.float32) for n in "ab"}

    def score(self, approximate: dict[str, Array]) -> Score:
        error = sum(float(np.square(approximate[n] - self.matrices[n]).sum()) for n in approximate)
        return Score(error**0.5, 1.0, 1.0)


def test_rivals_on_small_matrices() -> None:
    small = SmallYardstick()
    points = list(quality.measure(small, chosen=()))
    assert {p.kind for p in points} == {RIVAL}
    by_coder = {p.coder: [q for q in points if q.coder == p.coder] for p in points}
    (int4,), (int8,) = by_coder["int4, groups of 128"], by_coder["int8, groups of 128"]
    weights = 2 * 128 * 256
    assert (int4.bytes, int8.bytes) == (14 + weights // 2 + weights // 64, 14 + weights + weights // 64)
    assert [p.bytes for p in by_coder["int8, then bf16"]] == [int8.bytes, int8.bytes + small.nbytes]
    assert by_coder["int8, then bf16"][1].score.relative_error == 0 < int8.score.relative_error
    streamed = by_coder["BitStack-like"]
    assert [p.bytes for p in streamed] == sorted(p.bytes for p in streamed)
    assert [p.score.relative_error for p in streamed] == sorted(
        (p.score.relative_error for p in streamed), reverse=True
    )
    assert streamed[0].bytes <= 0.125 * small.nbytes
    assert streamed[-1].bytes <= small.nbytes


def point(coder: str, kind: str, share: float, embeddings: float, error: float = 0.5, eighths: int = 0) -> Point:
    return Point(coder, kind, int(share * 1000), share, Score(error, 0.9, embeddings), eighths)


POINTS = [
    point("planes", IN_ORDER, 0.12, 0.2),
    point("planes", IN_ORDER, 0.4, 0.99),
    point("planes", IN_ORDER, 0.67, 1.0, error=0.0),
    point("rival", RIVAL, 0.11, 0.3),
    point("late", RIVAL, 0.505, 0.999, error=0.01),
    point("planes", SUBSET, 0.5, 0.1, eighths=4),
    point("planes", SUBSET, 0.5, 0.3, eighths=4),
]


def test_tables_say_who_is_better() -> None:
    text = tables(POINTS, 1000, 80, 1.0)
    assert "- 12.5%: **the rival is better**: planes 0.20000, rival 0.30000." in text
    assert "- 50.0%: ours: planes 0.99000, rival 0.30000." in text
    assert "- 51.0%: **the rival is better**: planes 0.99000, late 0.99900." in text
    assert "- 87.5%: ours: planes 1.00000, late 0.99900." in text
    assert "| late | – | – | – | – | – | **0.9990** | 0.9990 | 0.9990 | error 1.0e-02 at 50.5% |" in text
    assert "| exact at 67.0% |" in text
    assert "| planes, 4 of 8 | 50.0% | 0.5 | 0.90000 | 0.20000 |" in text


def test_what_fits_and_what_is_best() -> None:
    streams = [p for p in POINTS if p.kind != SUBSET]
    assert within(streams, "late", 0.5) is None
    assert within(streams, "planes", 0.5) is POINTS[1]
    assert best_within(streams, 0.51, lambda p: p.score.embedding_cosine) == [POINTS[4]]


def test_the_picture(tmp_path: Path) -> None:
    draw(POINTS, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
