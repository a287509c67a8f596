"""A real sentence encoder in 8 shares: usable from any 4, exact from any 7, smaller than its bf16 weights."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import ml_dtypes
import pytest
from safetensors.numpy import load_file

import holoray
import minilm
from holoray.errors import QualityError
from holoray.stores import Shares, open_shares
from holoray.tensor import Array, as_bytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def model() -> dict[str, Array]:
    return load_file(minilm.weights_path())


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("minilm") / "store"
    holoray.encode(minilm.weights_path(), directory, dtype="bf16", shares=Shares.usable(8, 4, 7))
    return [directory / f"share-{index}" for index in range(8)]


def test_size(places: list[Path], model: dict[str, Array]) -> None:
    stored = sum(file.stat().st_size for place in places for file in place.iterdir())
    bf16 = sum(a.nbytes // 2 if a.dtype.kind == "f" else a.nbytes for a in model.values())
    print(f"{stored} of {bf16} bytes: {stored / bf16:.2%}")
    assert stored <= 0.985 * bf16


def test_any_four_are_usable(places: list[Path], model: dict[str, Array]) -> None:
    full = minilm.embed(model)
    loaded: set[int] = set()
    for subset in itertools.combinations(places, 4):
        store = holoray.open(open_shares(subset))
        with pytest.raises(QualityError) as refused:
            store.load()
        weights = store.load(quality=float(refused.value.hint.rpartition(" ")[2]))
        content = hash(tuple((name, as_bytes(array).tobytes()) for name, array in sorted(weights.items())))
        if content not in loaded:  # 70 times the same weights: the embeddings of each are asked for
            cosine = minilm.mean_cosine(minilm.embed(weights), full)
            print(f"cosine {cosine:.4f}")
            assert cosine >= 0.95
        loaded.add(content)
    assert math.comb(8, 4) == 70
    assert len(loaded) == 1


def test_any_seven_are_exact(places: list[Path], model: dict[str, Array]) -> None:
    expected = {n: a.astype(ml_dtypes.bfloat16) if a.dtype.kind == "f" else a for n, a in model.items()}
    for subset in itertools.combinations(places, 7):
        weights = holoray.open(open_shares(subset)).load()
        assert weights.keys() == expected.keys()
        assert all(as_bytes(weights[n]).tobytes() == as_bytes(a).tobytes() for n, a in expected.items())
