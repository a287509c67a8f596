"""`auto`: the codec with the best measured curve, a bound that saves decompositions, and what an encode notes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import scipy.fft
from hypothesis import given
from hypothesis import strategies as st
from matrices import gaussian, with_singular_values

import holoray
from holoray.fragment import FragmentEntry, TensorEntry
from holoray.kernels.encoder import EncodeOptions
from holoray.pipelines import auto
from holoray.pipelines.tensor_codec import TensorDecoder, encode_tensor
from holoray.stores import MemoryStore
from holoray.tensor import Array, TensorSpec


def few_frequencies() -> Array:
    coefficients = np.zeros((256, 256))
    coefficients[:2, :2] = 1.0
    coefficients[200:204, 10:200] = 1e-5 * np.random.default_rng(0).standard_normal((4, 190))
    array: Array = scipy.fft.idctn(coefficients, norm="ortho").astype(np.float32)
    return array


CASES: dict[str, tuple[Array, dict[str, Any], str]] = {
    "white": (gaussian((128, 200)), {}, "planes"),
    "white, half the bits": (gaussian((128, 200)).astype(ml_dtypes.bfloat16), {}, "planes"),
    "rank 4": (with_singular_values(256, 200, np.ones(4)), {}, "lowrank"),
    "steep": (with_singular_values(256, 256, np.arange(1.0, 257) ** -5), {}, "lowrank"),
    "zeros": (np.zeros((80, 80), np.float32), {}, "planes"),
    "not finite": (np.full((80, 80), np.nan, np.float32), {}, "planes"),
    "integers": (np.arange(6400).reshape(80, 80), {}, "raw"),
}


@pytest.mark.parametrize("name", CASES)
def test_choices(name: str) -> None:
    array, options, codec = CASES[name]
    entry, fragments = encode_tensor(array, "auto", **options)
    assert entry.codec == codec
    decoder = TensorDecoder(entry)
    for fragment in fragments:
        decoder.add(fragment)
    assert decoder.report.relative_error <= auto.MAX_ERROR
    if codec != "raw":
        rivals = [encode_tensor(array, c, compression="zstd")[0] for c in ("planes", "spectral")]
        assert (
            auto.mean_quality(entry) >= max(auto.mean_quality(r) for r in rivals if r.codec != "raw") or not array.any()
        )


def test_spectral_where_it_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few frequencies hold nearly everything, and ride in the first of many fragments; `lowrank` is kept out."""
    monkeypatch.setattr(auto, "_lowrank_could_win", lambda *_: False)
    assert encode_tensor(few_frequencies(), "auto", essential=0.9, fragments=1024)[0].codec == "spectral"


def test_a_choice_must_end_well(monkeypatch: pytest.MonkeyPatch) -> None:
    array = with_singular_values(256, 200, np.ones(4))
    assert encode_tensor(array, "auto", coefficients="float16")[0].codec == "planes"
    assert encode_tensor(array, "auto", coefficients="float16", rank=4)[0].codec == "lowrank"
    monkeypatch.setattr(auto, "MAX_ERROR", 1e-2)
    assert encode_tensor(array, "auto", coefficients="float16")[0].codec == "lowrank"


def entry_of(gains: list[tuple[float, int]], size: int) -> TensorEntry:
    fragments = tuple(
        FragmentEntry(i, 0, i, -1, "none", nbytes, nbytes, gain, 0, bytes(32)) for i, (gain, nbytes) in enumerate(gains)
    )
    return TensorEntry(TensorSpec("t", "U8", (size,)), "raw", {}, 0.0, False, bytes(32), fragments)


def test_the_mean_quality_is_the_area_under_the_curve() -> None:
    assert auto.mean_quality(entry_of([(3.0, 20), (1.0, 30)], 100)) == pytest.approx(0.75 * 0.3 + 0.5)
    assert auto.mean_quality(entry_of([(1.0, 30), (3.0, 20)], 100)) == pytest.approx(0.75 * 0.3 + 0.5)
    assert auto.mean_quality(entry_of([(3.0, 20), (1.0, 300)], 100)) == pytest.approx(0.75 * 0.8)
    assert auto.mean_quality(entry_of([(3.0, 200)], 100)) == 0


@given(st.lists(st.floats(0.001, 1), min_size=2, max_size=40), st.integers(0, 100))
def test_the_bound_is_above_every_concave_curve(energies: list[float], place: int) -> None:
    falling = np.sort(energies)[::-1] / np.sum(energies)
    curve = np.concatenate([[0.0], np.cumsum(falling)])
    at = 1 + place % (curve.size - 1)
    mean = float(np.mean((curve[1:] + curve[:-1]) / 2))
    assert mean <= auto.mean_bound(float(curve[at]), at / (curve.size - 1)) + 1e-12


def test_probes_spare_hopeless_decompositions(monkeypatch: pytest.MonkeyPatch) -> None:
    array = gaussian((256, 256))
    spec = TensorSpec.of("w", array)
    planes = auto.mean_quality(encode_tensor(array)[0])
    assert not auto._lowrank_could_win(spec, array, EncodeOptions(), planes)
    assert auto._lowrank_could_win(spec, with_singular_values(256, 256, np.ones(4)), EncodeOptions(), planes)


def test_notes_say_what_the_store_pays_for() -> None:
    rng = np.random.default_rng(0)
    model = {
        "w": rng.standard_normal((100, 80)).astype(np.float32),
        "few": with_singular_values(100, 80, np.ones(3)),
        "spike": np.where(np.arange(8000).reshape(100, 80) == 7, 1e3, rng.standard_normal((100, 80))).astype(
            ml_dtypes.bfloat16
        ),
    }
    plain, carried = MemoryStore(), MemoryStore()
    assert holoray.encode(model, plain).notes == ()
    notes = holoray.encode(model, carried, codec="lowrank", essential=0.3, compression="none").notes
    assert [note.partition(":")[0] for note in notes] == [
        "essential parts ride in every fragment",
        "lowrank does not pay, the factors are larger than the tensor",
        "raw, since rounding would have falsified the quality of partial loads",
    ]
    manifest = holoray.open(carried).manifest
    w = manifest.tensors[manifest.by_name["w"]]
    few = manifest.tensors[manifest.by_name["few"]]
    copies = 7 * 4 * 180 * (int(w.config["essential"]) + int(few.config["essential"]))
    stored = sum(t.stored_bytes for t in manifest.tensors)
    assert f"{copies} bytes more, {stored / (stored - copies):.2f} times" in notes[0]
    assert notes[1].endswith(": w")
    assert notes[2].endswith(": spike")
