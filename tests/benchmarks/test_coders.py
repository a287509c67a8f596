"""The rivals of the quality benchmark do what is said of them: sizes to the byte, errors within their bounds."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.coders import (
    GROUP,
    Floats,
    Rounded,
    Term,
    by_gain_per_byte,
    residual_terms,
    round_to_nearest,
    zipnn_bytes,
)


def gaussian(rows: int, columns: int, seed: int = 0) -> Floats:
    return (0.05 * np.random.default_rng(seed).standard_normal((rows, columns))).astype(np.float32)


def squared(array: Floats) -> float:
    return float(np.square(array, dtype=np.float64).sum())


def naive_levels(coded: Rounded) -> list[int]:
    """The integers, one by one."""
    if coded.bits == 8:
        return [int(c) - 256 * (c > 127) for c in coded.codes]
    halves = [half for byte in coded.codes for half in (int(byte) & 15, int(byte) >> 4)]
    return [h - 16 * (h > 7) for h in halves][: coded.shape[0] * coded.shape[1]]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 300), st.sampled_from([4, 8]), st.integers(0, 99))
@example(1, 1, 8, 7)  # a subnormal scale
def test_integers_are_within_half_a_step_and_count_their_bytes(rows: int, columns: int, bits: int, seed: int) -> None:
    matrix = gaussian(rows, columns, seed)
    coded = round_to_nearest(matrix, bits)
    assert coded.nbytes == -(-rows * columns * bits // 8) + 2 * rows * -(-columns // GROUP)
    most = 2 ** (bits - 1) - 1
    decoded, levels = coded.decode(), naive_levels(coded)
    assert max(map(abs, levels)) == most  # the largest of some group
    for place, (row, column) in enumerate(np.ndindex(rows, columns)):
        scale = float(coded.scales[row, column // GROUP])
        assert decoded[row, column] == np.float32(levels[place]) * np.float32(scale)
        # A float16 scale may be a little too small for the largest weight: 2^-11 of it is cut, 2^-25 where subnormal.
        cut = most * max(scale * 2**-11, 2**-25)
        assert abs(decoded[row, column] - matrix[row, column]) <= 0.5 * scale * 1.0001 + cut


def test_groups_are_scaled_apart_and_zeros_stay_zeros() -> None:
    matrix = np.concatenate([gaussian(3, GROUP), 100 * gaussian(3, GROUP), np.zeros((3, GROUP), np.float32)], axis=1)
    decoded = round_to_nearest(matrix, 8).decode()
    first = np.abs(decoded - matrix)[:, :GROUP].max()
    assert first <= np.abs(matrix[:, :GROUP]).max() / 127
    assert not decoded[:, 2 * GROUP :].any()


@pytest.mark.parametrize("shape", [(64, 200), (200, 64), (5, 3), (1, 40)], ids=str)
def test_terms_count_their_bytes_and_their_gains_are_true(shape: tuple[int, int]) -> None:
    matrix = gaussian(*shape)
    budget = 4 * matrix.size
    terms = residual_terms(matrix, budget)
    rows, columns = shape
    for term in terms:
        rank = term.left.shape[1]
        assert (term.left.shape, term.right.shape) == ((rows, rank), (columns, rank))
        assert term.nbytes == -(-rows * columns // 8) + 2 * rank * (rows + columns)
    assert sum(t.nbytes for t in terms) <= budget
    approximation, left = np.zeros_like(matrix), squared(matrix)
    for term in terms:
        approximation += term.decode()
        left -= term.gain
        assert squared(matrix - approximation) == pytest.approx(left, rel=1e-3, abs=1e-9 * squared(matrix))
        assert term.gain > 0


def test_the_first_term_removes_what_a_constant_magnitude_would_at_least() -> None:
    matrix = gaussian(120, 100)
    first = residual_terms(matrix, 2 * matrix.size)[0]
    assert first.gain >= 0.99 * 2 / np.pi * squared(matrix)  # (E|x|)^2 / E x^2 of normal values


@pytest.mark.parametrize("shape", [(64, 200), (200, 64)], ids=str)
@pytest.mark.parametrize("scale", [1e-7, 1e6])
def test_factors_are_balanced_so_that_float16_holds_them(shape: tuple[int, int], scale: float) -> None:
    matrix = scale * gaussian(*shape)
    (first, *_) = residual_terms(matrix, 2 * matrix.size)
    norms = [np.linalg.norm(factor.astype(np.float64), axis=0) for factor in (first.left, first.right)]
    np.testing.assert_allclose(norms[0], norms[1], rtol=0.05)
    assert first.gain >= 0.9 * 2 / np.pi * squared(matrix)


@pytest.mark.parametrize("transposed", [False, True])
def test_signs_times_low_rank_is_found_at_once(transposed: bool) -> None:
    rng = np.random.default_rng(1)
    magnitude = np.abs(rng.standard_normal((60, 1))) @ np.abs(rng.standard_normal((1, 40))) + 0.01
    matrix = (np.where(rng.random(magnitude.shape) < 0.5, -1, 1) * magnitude).astype(np.float32)
    matrix = np.ascontiguousarray(matrix.T) if transposed else matrix
    first = residual_terms(matrix, 2 * matrix.size)[0]
    assert squared(matrix - first.decode()) <= 1e-4 * squared(matrix)


def test_terms_stream_by_gain_per_byte_each_after_those_before_it() -> None:
    empty = (np.zeros(0, np.uint8), np.zeros((10, 1), np.float16), np.zeros((0, 1), np.float16))  # 20 bytes
    terms = {
        "a": [Term(*empty, gain=5.0), Term(*empty, gain=9.0), Term(*empty, gain=1.0)],
        "b": [Term(*empty, gain=7.0), Term(*empty, gain=2.0)],
        "none": [],
    }
    assert [(n, t.gain) for n, t in by_gain_per_byte(terms)] == [("b", 7), ("a", 5), ("a", 9), ("b", 2), ("a", 1)]
    real = {str(i): residual_terms(gaussian(40, 50, i) * (1 + i), 2000) for i in range(3)}
    streamed = list(by_gain_per_byte(real))
    rates = [term.gain / term.nbytes for _, term in streamed]
    assert all(a >= b for a, b in itertools.pairwise(rates))  # gains of one matrix fall
    for name, rows in real.items():
        assert [term for n, term in streamed if n == name] == rows


def test_zipnn_is_left_out_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zipnn", None)
    assert zipnn_bytes([np.zeros(4)]) is None
