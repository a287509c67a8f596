"""`lowrank`: exact at full rank whatever the spectrum, gains that add up, and no noise for terms."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import gaussian, with_singular_values

from holoray.codecs import LowRankCodec
from holoray.errors import FormatError
from holoray.fragment import Fragment, TensorEntry
from holoray.kernels import blas, factors, lowrank
from holoray.pipelines.tensor_codec import TensorDecoder, encode_tensor
from holoray.tensor import DTYPES, Array


def falling(count: int, power: float) -> Any:
    return np.arange(1.0, count + 1) ** -power


MATRICES = {
    "white": gaussian((120, 200)),
    "tall": gaussian((300, 70)),
    "1/i": with_singular_values(150, 150, falling(150, 1)),
    "1/i^2": with_singular_values(200, 120, falling(120, 2)),
    "2^-i": with_singular_values(120, 90, 2.0 ** -np.arange(90)),
    "rank 5": with_singular_values(200, 150, np.ones(5)),
    "constant": np.full((70, 80), 0.3, np.float32),
    "huge": with_singular_values(100, 100, falling(100, 1)) * np.float32(1e37),
    "tiny": with_singular_values(100, 100, falling(100, 1)) * np.float32(1e-35),
    "one row": gaussian((5000,)),
    "3-D": gaussian((20, 12, 25)),
    "scalar": gaussian(()),
}


def check_truth(array: Array, entry: TensorEntry, fragments: list[Fragment], seed: int = 0) -> float:
    """Reported = true after each fragment of a random order; returns the relative error at the end."""
    truth = array.astype(np.float64)
    decoder = TensorDecoder(entry)
    for index in np.random.default_rng(seed).permutation(len(fragments)):
        decoder.add(fragments[index])
        error = float(np.linalg.norm(decoder.reconstruct().astype(np.float64) - truth) / np.linalg.norm(truth))
        assert decoder.quality == pytest.approx(1 - error**2, abs=1e-4)
        assert decoder.report.relative_error == pytest.approx(error, rel=1e-2, abs=1e-6)
    return error


@pytest.mark.parametrize("name", MATRICES)
def test_full_rank_is_exact_and_every_partial_sum_is_as_reported(name: str) -> None:
    entry, fragments = encode_tensor(MATRICES[name], "lowrank")
    assert entry.codec == "lowrank"
    assert check_truth(MATRICES[name], entry, fragments) <= 1e-6


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("options", [{}, {"rank": 7}, {"energy": 0.8}, {"essential": 0.4}], ids=str)
@pytest.mark.parametrize("name", ["white", "1/i", "1/i^2", "2^-i", "rank 5", "constant"])
def test_half_precision_factors(name: str, options: dict[str, Any], dtype: str) -> None:
    """Where their rounding, or the tensor's own, would falsify what is reported, the tensor goes raw."""
    array = MATRICES[name].astype(DTYPES[dtype])
    entry, fragments = encode_tensor(array, "lowrank", coefficients="float16", **options)
    if name == "white":
        assert entry.codec == "lowrank"
    error = check_truth(array, entry, fragments)
    if not options:
        assert error <= 1e-3


def test_terms_that_overlap_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the guard switched off, float16 factors of nearly a rank-one matrix report something else than the truth."""
    array = np.ones((100, 100), np.float32) + np.float32(1e-4) * gaussian((100, 100))
    assert encode_tensor(array, "lowrank", coefficients="float16")[0].codec == "raw"
    monkeypatch.setattr(lowrank.LowRankEncoder, "_adds_up", lambda self, array: True)
    entry, fragments = encode_tensor(array, "lowrank", coefficients="float16")
    with pytest.raises(AssertionError):
        check_truth(array, entry, fragments)


def test_rank_and_energy() -> None:
    array = with_singular_values(128, 96, falling(96, 1))
    values = np.linalg.svd(array.astype(np.float64), compute_uv=False)
    energies = np.cumsum(values**2) / np.sum(values**2)
    entry, fragments = encode_tensor(array, "lowrank", energy=0.9)
    rank = int(np.searchsorted(energies, 0.9)) + 1
    assert entry.config["rank"] == rank
    assert check_truth(array, entry, fragments) == pytest.approx(math.sqrt(1 - energies[rank - 1]), rel=1e-4)
    assert encode_tensor(array, "lowrank", energy=0.9, rank=3)[0].config["rank"] == 3
    assert encode_tensor(array, "lowrank", rank=1000)[0].config["rank"] == 96
    assert encode_tensor(MATRICES["rank 5"], "lowrank")[0].config["rank"] == 5
    assert encode_tensor(MATRICES["constant"], "lowrank")[0].config["rank"] == 1


def test_random_probes_find_the_leading_terms() -> None:
    array = with_singular_values(400, 300, falling(300, 1))
    best = float(np.sqrt(1 - np.sum(falling(10, 2)) / np.sum(falling(300, 2))))
    entry, fragments = encode_tensor(array, "lowrank", rank=10)
    error = check_truth(array, entry, fragments)
    assert best <= error <= 1.02 * best
    assert encode_tensor(array, "lowrank", rank=10, seed=1)[0].fragments[0].sha256 != entry.fragments[0].sha256


SPECTRA = {
    "slow": falling(256, 0.25),
    "1/i^.5": falling(256, 0.5),
    "1/i": falling(256, 1),
    ".97^i": 0.97 ** np.arange(256),
    "a step": np.where(np.arange(256) < 40, 2.0, 1.0),
    "flat": np.ones(256),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_probes_find_four_fifths(name: str) -> None:
    """What the bound of `auto` relies on."""
    values = SPECTRA[name]
    matrix = with_singular_values(256, 256, values).astype(np.float64)
    for rank in (1, 4, 16, 64):
        assert factors.probed_energy(matrix, rank, rank) >= 0.8 * float(np.sum(values[:rank] ** 2))


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 60))
def test_snake_wise_dealing(fragments: int, rank: int, essential: int) -> None:
    codec = LowRankCodec(fragments, 0, min(essential, rank), "float32", rank)
    dealt = [codec.terms(i).tolist() for i in range(fragments)]
    assert sorted(term for terms in dealt for term in terms) == list(range(codec.essential, rank))
    players = [*range(fragments), *reversed(range(fragments))]
    for owner, terms in enumerate(dealt):
        assert terms == sorted(terms)
        assert all(players[(t - codec.essential) % (2 * fragments)] == owner for t in terms)


@given(st.integers(0, 3), st.data())
@settings(deadline=None, max_examples=15)
def test_any_subset_is_as_reported(kind: int, data: st.DataObject) -> None:
    array = MATRICES[("white", "1/i", "tall", "3-D")[kind]]
    options: dict[str, Any] = data.draw(
        st.sampled_from([{}, {"coefficients": "float16"}, {"essential": 0.3}, {"rank": 9}])
    )
    entry, fragments = encode_tensor(array, "lowrank", fragments=data.draw(st.integers(1, 12)), **options)
    check_truth(array, entry, fragments, data.draw(st.integers(0, 1000)))


def test_one_thread_of_blas_as_long_as_anybody_needs_it() -> None:
    def threads() -> set[int]:
        return {pool["num_threads"] for pool in blas._controller().info() if pool["user_api"] == "blas"}

    before = threads()
    first, second = blas.one_blas_thread(), blas.one_blas_thread()
    first.__enter__()
    in_a_thread(second.__enter__)
    assert threads() == {1}
    first.__exit__(None, None, None)
    assert threads() == {1}
    in_a_thread(lambda: second.__exit__(None, None, None))
    assert threads() == before


def test_sums_of_terms_do_not_depend_on_the_thread() -> None:
    terms = gaussian((256, 600))
    expected = lowrank._sum(terms, 100)
    for _ in range(2):
        np.testing.assert_array_equal(in_a_thread(lambda: lowrank._sum(terms, 100)), expected)
        np.testing.assert_array_equal(lowrank._sum(terms, 100), expected)


def test_stores_do_not_depend_on_the_threads_of_blas() -> None:
    code = (
        "import numpy as np, holoray\n"
        "w = np.random.default_rng(0).standard_normal((300, 400)).astype(np.float32)\n"
        "print(holoray.encode({'w': w}, holoray.MemoryStore(), codec='lowrank', coefficients='float16').root)"
    )
    roots = [
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {"OPENBLAS_NUM_THREADS": threads},
        ).stdout
        for threads in ("1", "2")
    ]
    assert roots[0].startswith("sha256:")
    assert roots[0] == roots[1]


def in_a_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.mark.parametrize(
    "change",
    [
        {"fragments": 0},
        {"fragments": 1 << 40},
        {"rank": 0},
        {"rank": 71},
        {"rank": 1 << 60},
        {"essential": -1},
        {"essential": 71},
        {"exponent": 10**9},
        {"coefficients": "float64"},
        {"rank": 1.0},
        {"extra": 1},
    ],
    ids=str,
)
def test_forged_configurations(change: dict[str, object]) -> None:
    entry, _ = encode_tensor(gaussian((70, 90)), "lowrank")
    with pytest.raises(FormatError):
        LowRankCodec.from_config(dict(entry.config) | change).check(entry.spec)


def test_an_absurd_rank_is_laid_out_at_once() -> None:
    """The fragments of a claimed matrix of exabytes are counted, not listed."""
    entry, _ = encode_tensor(gaussian((70, 90)), "lowrank")
    codec = LowRankCodec.from_config(dict(entry.config) | {"rank": 1 << 20, "fragments": 4096})
    spec = type(entry.spec)("absurd", "F32", (1 << 21, 1 << 20))
    codec.check(spec)
    assert sum(1 for _ in codec.shapes(spec)) == 4096


def test_energies_and_directions_are_those_of_the_matrix() -> None:
    matrix = MATRICES["1/i"].astype(np.float64)
    for rank in (150, 20):
        energies, directions = factors.leading_directions(matrix, rank, 0)
        np.testing.assert_allclose(directions.T @ directions, np.eye(rank), atol=1e-12)
        np.testing.assert_allclose(energies, falling(150, 2)[:rank], rtol=0.05 if rank == 20 else 1e-5)
