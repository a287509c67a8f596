"""`projection`: orthogonal for every length, and any k of N fragments have the error that k has."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import gaussian, smooth, spikes

from holoray.codecs import ProjectionCodec
from holoray.codecs.projection import SIGNS, block_size, signs
from holoray.kernels import hadamard
from holoray.pipelines.tensor_codec import TensorDecoder, encode_tensor
from holoray.tensor import Array

N = 8


def sylvester(order: int) -> npt.NDArray[np.float64]:
    """The orthonormal Hadamard matrix, written out."""
    matrix = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / math.sqrt(order)


def written_out(size: int, seed: int) -> npt.NDArray[np.float64]:
    """The whole transform as a matrix: blocks, then the window at the end."""
    block = block_size(size)
    whole = size - size % block
    first = np.eye(size)
    for at in range(0, whole, block):
        own = signs(seed ^ SIGNS[0], size)[at : at + block]
        first[at : at + block, at : at + block] = sylvester(block) * own
    if whole == size:
        return first
    second = np.eye(size)
    second[-block:, -block:] = sylvester(block) * signs(seed ^ SIGNS[1], block)
    return second @ first


@given(st.integers(1, 200), st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=40)
def test_fast_transforms_are_the_orthogonal_matrix(size: int, seed: int) -> None:
    matrix = written_out(size, seed)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)
    x = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    fast = x.copy()
    hadamard.forward(fast, seed)
    np.testing.assert_allclose(fast, matrix @ x, atol=2e-5)
    hadamard.inverse(fast, seed)
    np.testing.assert_allclose(fast, x, atol=2e-5)


@pytest.mark.parametrize("size", [4095, 4096, 4097, 8191, 12_345])
def test_full_blocks(size: int) -> None:
    """The oracle of the codec (float64, by axes) against the kernel, where blocks have their full order."""
    x = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    fast = x.copy()
    hadamard.forward(fast, 9)
    codec = ProjectionCodec(1, 0, 0, "float32", 9, "")
    np.testing.assert_allclose(codec.inverse(fast.astype(np.float64)[None])[0], x, atol=1e-5)
    assert np.linalg.norm(fast) == pytest.approx(np.linalg.norm(x), rel=1e-6)


def test_signs_are_fair_and_differ_by_seed() -> None:
    own = signs(0, 1 << 16)
    assert abs(own.sum()) < 4 * 256  # four standard deviations
    assert abs((own * signs(1, 1 << 16)).sum()) < 4 * 256


INPUTS = {
    "white": gaussian((512, 512)),
    "white, no power of two": gaussian((601, 450)),
    "white, one row": gaussian(((1 << 18) + 1,)),
    "constant": np.full((601, 450), 0.3, np.float32),
    "smooth": smooth(513),
    "five spikes": spikes((601, 450), np.random.default_rng(3).choice(601 * 450, 5, replace=False)),
    "one spike": spikes((512, 513), [7]),
    "two neighbours in a large matrix": spikes((2048, 1024), [1000, 1001]),
}


@pytest.mark.parametrize("name", INPUTS)
def test_every_subset_has_the_error_of_its_size(name: str) -> None:
    """All 255 subsets of 8: within 3 % of sqrt(1 - k/N), reported = true, 1e-6 at the end."""
    array = INPUTS[name]
    truth = array.astype(np.float64)
    entry, fragments = encode_tensor(array, "projection", fragments=N)
    assert entry.codec == "projection"
    shares = [f.gain / entry.energy for f in entry.fragments]
    for k in range(1, N):
        for subset in itertools.combinations(range(N), k):
            missing = math.fsum(shares[i] for i in range(N) if i not in subset)
            assert math.sqrt(missing) == pytest.approx(math.sqrt(1 - k / N), rel=0.03)
    decoder = TensorDecoder(entry)
    for count, index in enumerate(np.random.default_rng(2).permutation(N), start=1):
        decoder.add(fragments[index])
        if count in (1, 3, 7, 8):
            error = np.linalg.norm(decoder.reconstruct() - truth) / np.linalg.norm(truth)
            assert decoder.quality == pytest.approx(1 - error**2, abs=1e-4)
            assert decoder.report.relative_error == pytest.approx(error, rel=1e-2, abs=1e-6)
    assert error <= 1e-6


def test_partial_sums_are_least_squares_of_minimal_norm() -> None:
    """With rows R of an orthogonal matrix at hand, the pseudo-inverse of R gives what the decoder gives."""
    array: Array = gaussian((300,))
    entry, fragments = encode_tensor(array, "projection", fragments=3, seed=5)
    codec = ProjectionCodec.from_config(entry.config)
    deal = codec.deal(array.size)
    places = deal.places(deal.offsets(codec.group_shifts), 1)
    rows = written_out(array.size, codec.seed)[places]
    decoder = TensorDecoder(entry)
    decoder.add(fragments[1])
    np.testing.assert_allclose(decoder.reconstruct(), np.linalg.pinv(rows) @ (rows @ array), atol=1e-5)
