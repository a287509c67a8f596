"""`essential`: the leading part rides in every fragment, counts once, and makes a lost fragment bearable."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import gaussian, smooth, with_singular_values

from holoray.codecs import get_codec
from holoray.codecs.essential import EssentialPart
from holoray.errors import FormatError, IntegrityError
from holoray.fragment import Fragment, FragmentEntry, TensorEntry
from holoray.integrity import Digests
from holoray.kernels.accumulator import Accumulator
from holoray.kernels.registry import make_accumulator
from holoray.kernels.scratch import Scratch
from holoray.kernels.transform import leading
from holoray.pipelines.ledger import QualityLedger
from holoray.pipelines.plan import with_streaming_order
from holoray.pipelines.tensor_codec import TensorDecoder, encode_tensor
from holoray.tensor import Array, TensorSpec

N = 8
DEALT = ("spectral", "projection", "lowrank")


def decoded(entry: TensorEntry, fragments: list[Fragment], indices: Any) -> TensorDecoder:
    decoder = TensorDecoder(entry)
    for index in indices:
        decoder.add(fragments[index])
    return decoder


def relative_error(decoder: TensorDecoder, array: Array) -> float:
    truth = array.astype(np.float64)
    return float(np.linalg.norm(decoder.reconstruct().astype(np.float64) - truth) / np.linalg.norm(truth))


SMOOTH = {
    "random factors": with_singular_values(512, 512, np.arange(1.0, 513) ** -2),
    "cosine factors": np.asarray(
        np.polynomial.legendre.legvander(np.linspace(-1, 1, 512), 9)
        @ np.diag(np.arange(1.0, 11) ** -2)
        @ np.polynomial.legendre.legvander(np.linspace(-1, 1, 512), 9).T,
        np.float32,
    ),
}


@pytest.mark.parametrize("coefficients", ["float32", "float16"])
@pytest.mark.parametrize("codec", DEALT)
@pytest.mark.parametrize("name", SMOOTH)
def test_losing_any_one_of_eight_fragments(name: str, codec: str, coefficients: str) -> None:
    array = SMOOTH[name]
    entry, fragments = encode_tensor(array, codec, fragments=N, essential=0.6, coefficients=coefficients)
    assert entry.codec == codec
    for lost in range(N):
        decoder = decoded(entry, fragments, [i for i in range(N) if i != lost])
        error = relative_error(decoder, array)
        assert error <= 0.25
        assert decoder.report.relative_error == pytest.approx(error, rel=1e-2, abs=1e-6)


def test_without_it_a_lost_fragment_is_felt() -> None:
    """The yardstick of the test above."""
    array = SMOOTH["random factors"]
    entry, fragments = encode_tensor(array, "lowrank", fragments=N)
    assert relative_error(decoded(entry, fragments, range(1, N)), array) > 0.9


@pytest.mark.parametrize("coefficients", ["float32", "float16"])
@pytest.mark.parametrize("codec", DEALT)
@given(data=st.data())
@settings(deadline=None, max_examples=12)
def test_its_gain_is_counted_once(codec: str, coefficients: str, data: st.DataObject) -> None:
    array = gaussian((60, 75), seed=4)
    entry, fragments = encode_tensor(array, codec, fragments=5, essential=0.4, coefficients=coefficients)
    assert entry.essential_gain / entry.energy == pytest.approx(0.4, abs=0.05)
    assert entry.energy == pytest.approx(float(np.square(array, dtype=np.float64).sum()), rel=1e-6)
    subset = data.draw(st.lists(st.integers(0, 4), min_size=1, unique=True))
    decoder = decoded(entry, fragments, subset)
    error = relative_error(decoder, array)
    assert decoder.quality == pytest.approx(1 - error**2, abs=1e-6)
    gained = entry.essential_gain + math.fsum(entry.fragments[i].gain for i in subset)
    assert decoder.quality == pytest.approx(gained / entry.energy, abs=1e-12)
    ledger = QualityLedger([entry])
    for index in subset:
        ledger.add(0, index)
        ledger.add(0, index)
    assert ledger.quality.ratio == pytest.approx(decoder.quality, abs=1e-12)
    assert ledger.tensor_quality(0).ratio == decoder.quality


def accumulated(entry: TensorEntry, fragments: list[Fragment], indices: Any) -> Accumulator:
    out = np.zeros(entry.spec.shape, entry.spec.numpy_dtype)
    accumulator = make_accumulator(entry.spec, get_codec(entry.codec, entry.config), out)
    for index in indices:
        known = entry.fragments[index]
        raw = accumulator.decompress([known], [memoryview(fragments[index].payload)], Scratch())
        accumulator.accumulate(known.slot, raw, Scratch())
    return accumulator


@pytest.mark.parametrize("codec", DEALT)
def test_combined_it_comes_from_one_owner(codec: str) -> None:
    """Both hold the essential part: a sum of the two would double it; and finalizing before changes nothing."""
    entry, fragments = encode_tensor(gaussian((60, 75)), codec, fragments=4, essential=0.4)
    one, other, empty = (accumulated(entry, fragments, i) for i in ([0, 3], [1], []))
    whole = accumulated(entry, fragments, [0, 1, 3])
    for accumulator in (one, other, whole):
        before = {key: array.copy() for key, array in accumulator.state().items()}
        accumulator.finalize()
        for key, array in accumulator.state().items():
            np.testing.assert_array_equal(array, before[key])
    empty.combine(one)
    empty.combine(other)
    one.combine(other)
    for accumulator in (one, empty):
        accumulator.finalize()
        np.testing.assert_array_equal(accumulator.out, whole.out)
        for key, array in accumulator.state().items():
            np.testing.assert_array_equal(array, whole.state()[key])


def plain_entry(name: str, gains: list[float], essential_gain: float = 0.0) -> TensorEntry:
    """A tensor whose fragments have 10 bytes each."""
    fragments = tuple(FragmentEntry(i, 0, i, -1, "none", 10, 10, g, 0, bytes(32)) for i, g in enumerate(gains))
    return TensorEntry(TensorSpec(name, "F32", (4,)), "x", {}, 0.0, False, bytes(32), fragments, essential_gain)


def test_the_first_fragment_of_a_tensor_streams_early() -> None:
    """With its essential gain it beats what the others gain; these wait for their turn."""
    entries = (plain_entry("a", [1.0, 2.0, 1.5], 100.0), plain_entry("b", [5.0, 6.0]))
    tensors = with_streaming_order(entries)
    order = [
        (name, index) for _, name, index in sorted((f.order, t.name, f.index) for t in tensors for f in t.fragments)
    ]
    assert order == [("a", 1), ("b", 1), ("b", 0), ("a", 2), ("a", 0)]
    assert [f.gain for t in tensors for f in t.fragments] == [1.0, 2.0, 1.5, 5.0, 6.0]
    assert [t.essential_gain for t in tensors] == [100.0, 0.0]
    ledger = QualityLedger(tensors)
    ledger.add(0, 1)
    assert ledger.quality.ratio == pytest.approx(102.0 / 115.5)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=30), st.floats(0, 0.99))
def test_leading_values_are_the_fewest_that_hold_the_share(values: list[int], share: float) -> None:
    array = np.array(values, np.float32)
    places = leading(array, share)
    squares = array.astype(np.float64) ** 2
    if share == 0 or squares.sum() == 0:
        assert places.size == 0
        return
    assert (np.diff(places) > 0).all()
    assert squares[places].sum() >= share * squares.sum() - 1e-9
    if places.size:
        fewer = np.sort(squares)[::-1][: places.size - 1].sum()
        assert fewer <= share * squares.sum()


def resealed(entry: TensorEntry, index: int, payload: bytes) -> TensorEntry:
    digests = Digests.of(payload)
    known = replace(entry.fragments[index], xxh3_64=digests.xxh3_64, sha256=digests.sha256)
    return replace(entry, fragments=tuple(known if f.index == index else f for f in entry.fragments))


@pytest.mark.parametrize("codec", ["spectral", "projection"])
@pytest.mark.parametrize("positions", [[5, 4], [4, 4], [0, 1 << 31], [0, 60 * 75]], ids=str)
def test_positions_that_make_no_sense(codec: str, positions: list[int]) -> None:
    """Out of order, double, out of range: refused before anything of the fragment is used; the oracle refuses too."""
    entry, fragments = encode_tensor(gaussian((60, 75)), codec, fragments=4, essential=0.4, compression="none")
    payload = np.array(positions, "<u4").tobytes() + fragments[1].payload[8:]
    decoder = TensorDecoder(resealed(entry, 1, payload))
    decoder.add(fragments[0])
    before = decoder.reconstruct()
    with pytest.raises(IntegrityError, match="positions"):
        decoder.add(Fragment(entry.name, 1, payload))
    np.testing.assert_array_equal(decoder.reconstruct(), before)
    with pytest.raises(FormatError):
        get_codec(entry.codec, entry.config).decode(entry.spec, {1: payload})


@pytest.mark.parametrize("codec", DEALT)
def test_fragments_that_disagree_about_it(codec: str) -> None:
    entry, fragments = encode_tensor(gaussian((60, 75)), codec, fragments=4, essential=0.4, compression="none")
    at = get_codec(entry.codec, entry.config).essential_nbytes(entry.spec) - 2  # type: ignore[attr-defined]
    payload = bytearray(fragments[1].payload)
    payload[at] ^= 1
    decoder = TensorDecoder(resealed(entry, 1, bytes(payload)))
    decoder.add(fragments[0])
    with pytest.raises(IntegrityError, match="differ"):
        decoder.add(Fragment(entry.name, 1, bytes(payload)))


def test_positions_grow_to_64_bits_beyond_2_32_elements() -> None:
    assert EssentialPart(3, (1 << 32) - 1, np.dtype("<f2")).nbytes == 3 * 6
    large = EssentialPart(2, 1 << 32, np.dtype("<f4"))
    packed = large.pack(np.array([1, (1 << 32) - 1]), np.array([2.5, -1.0]))
    positions, values = large.parse(packed.tobytes())
    assert (positions.tolist(), values.tolist()) == ([1, (1 << 32) - 1], [2.5, -1.0])
    with pytest.raises(FormatError):
        large.parse(large.pack(np.array([1, 1 << 32]), np.zeros(2)).tobytes())


@pytest.mark.parametrize("codec", DEALT)
@pytest.mark.parametrize("essential", [-1, 10**12])
def test_forged_counts(codec: str, essential: int) -> None:
    entry, _ = encode_tensor(gaussian((60, 75)), codec, essential=0.4)
    with pytest.raises(FormatError):
        get_codec(codec, dict(entry.config) | {"essential": essential}).check(entry.spec)


@pytest.mark.parametrize("codec", DEALT)
def test_every_subset_of_a_hill(codec: str) -> None:
    """A smooth matrix, all subsets of four fragments, from the books and from the decoder."""
    array = smooth(70)
    entry, fragments = encode_tensor(array, codec, fragments=4, essential=0.9)
    for k in range(1, 5):
        for subset in itertools.combinations(range(4), k):
            decoder = decoded(entry, fragments, subset)
            assert decoder.report.relative_error == pytest.approx(relative_error(decoder, array), rel=1e-2, abs=1e-6)
