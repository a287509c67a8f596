"""Curves say what decoding gives: every prefix and any subset, of tensors and stores, under every codec."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import holoray
from holoray.codecs import registry
from holoray.codecs.base import present_with_prerequisites
from holoray.codecs.registry import get_codec
from holoray.compression import decompress
from holoray.errors import CapacityError, QualityError, UsageError
from holoray.fragment import Fragment, TensorEntry
from holoray.pipelines.curve import QualityCurve, curve_of, store_curve
from holoray.pipelines.plan import Target, select
from holoray.pipelines.sealed_store import SealedStore
from holoray.quality import Quality
from holoray.stores.base import fragment_file
from holoray.tensor import DTYPES, Array

CODECS = sorted(registry._codecs)
Model = dict[str, Array]
Encoded = tuple[Array, TensorEntry, list[Fragment]]


@pytest.fixture(scope="module", params=[(codec, dtype) for codec in CODECS for dtype in ("F32", "BF16")], ids="-".join)
def encoded(request: pytest.FixtureRequest) -> Encoded:
    codec, dtype = request.param
    array = (0.05 * np.random.default_rng(5).standard_normal((700, 900))).astype(DTYPES[dtype])
    return array, *holoray.encode_tensor(array, codec, fragments=6, seed=3)


@pytest.fixture(scope="module", params=CODECS)
def sealed(request: pytest.FixtureRequest, model: Model) -> SealedStore:
    store = holoray.MemoryStore()
    holoray.encode(model, store, codec=request.param)
    return holoray.open(store)


def decode(entry: TensorEntry, payloads: dict[int, bytes]) -> Array:
    """What the codec's plain oracle makes of stored payloads."""
    codec = get_codec(entry.codec, entry.config)
    present = present_with_prerequisites(codec, entry.spec, frozenset(payloads))
    return codec.decode(
        entry.spec,
        {i: decompress(entry.fragments[i].compression, payloads[i], entry.fragments[i].raw_bytes) for i in present},
    )


def squared_error(got: Array, truth: Array) -> tuple[float, float]:
    """Squared error and energy over the finite elements of a floating tensor."""
    if truth.dtype.kind == "i":
        return 0.0, 0.0
    wide = truth.astype(np.float64)
    finite = np.isfinite(wide)
    error = got.astype(np.float64)[finite] - wide[finite]
    return float(error @ error), float(wide[finite] @ wide[finite])


def assert_true(quality: Quality, error: float, energy: float) -> None:
    assert quality.ratio == pytest.approx(1 - error / energy, abs=1e-4)
    assert quality.relative_error == pytest.approx(math.sqrt(error / energy), rel=1e-2, abs=1e-6)


@pytest.mark.fault("missing")
def test_every_prefix_and_random_subsets_of_a_tensor_have_their_true_quality(encoded: Encoded) -> None:
    array, entry, fragments = encoded
    curve = curve_of(entry)
    rng = random.Random(1)
    subsets = [rng.sample(curve.order, rng.randrange(len(curve.order) + 1)) for _ in range(8)]
    for count, quality in enumerate(curve.qualities):
        prefix = curve.order[:count]
        assert curve.nbytes[count] == sum(len(fragments[i].payload) for i in prefix)
        assert curve.quality_of(prefix).error == pytest.approx(quality.error, rel=1e-9, abs=1e-12 * quality.energy)
        subsets.append(list(prefix))
    for subset in subsets:
        got = decode(entry, {i: fragments[i].payload for i in subset})
        assert_true(curve.quality_of(subset), *squared_error(got, array))


def test_random_subsets_of_a_store_have_their_true_quality(sealed: SealedStore, model: Model) -> None:
    curve = sealed.curve()
    rng = random.Random(2)
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        subset = [f for f in curve.order if rng.random() < share]
        error = energy = 0.0
        for name, truth in model.items():
            payloads = {i: payload(sealed, name, i) for tensor, i in subset if tensor == name}
            more = squared_error(decode(sealed.entry(name), payloads), truth)
            error, energy = error + more[0], energy + more[1]
        assert_true(curve.quality_of(subset), error, energy)


def payload(sealed: SealedStore, name: str, index: int) -> bytes:
    fragment = sealed.entry(name).fragments[index]
    into = bytearray(fragment.stored_bytes)
    assert sealed.store.read_into(fragment_file(fragment.file), fragment.offset, memoryview(into)) == len(into)
    return bytes(into)


def test_the_curve_of_a_store_is_the_one_that_loads_follow(sealed: SealedStore) -> None:
    curve = sealed.curve()
    assert sealed.quality_curve() == list(curve.points)
    assert curve.points[-1] == (curve.nbytes[-1], curve.qualities[-1].ratio)
    assert curve.nbytes[0] == len(sealed.manifest.encoded)
    assert curve.sufficient_fragments == sealed.manifest.fragment_count
    for quality in (0.1, 0.7, 0.95, 0.999, 1.0):
        count = curve.fragments_for_quality(quality)
        keys = select(sealed.manifest, Target(quality=quality))
        assert [(sealed.manifest.tensors[t].name, i) for t, i in keys] == list(curve.order[:count])
        assert curve.qualities[count].reaches(quality)
        loader = sealed.loader()
        loader.load(Target(quality=quality))
        assert loader.bytes_read == curve.bytes_for_quality(quality)
        assert loader.quality.ratio == pytest.approx(curve.qualities[count].ratio, abs=1e-12)


def test_counts_are_the_smallest_by_brute_force(sealed: SealedStore) -> None:
    curve = sealed.curve()
    usable = range(curve.floor, len(curve.order) + 1)
    for quality in (0.05, 0.5, 0.9, 0.99):
        first = next(k for k in usable if curve.qualities[k].ratio >= quality)
        assert curve.fragments_for_quality(quality) == first
    rng = random.Random(3)
    for _ in range(20):
        budget = rng.randint(curve.nbytes[curve.floor], curve.nbytes[-1] - 1)
        within = curve.fragments_within(budget)
        best = max(curve.qualities[k].ratio for k in usable if curve.nbytes[k] <= budget)
        assert curve.nbytes[within] <= budget
        assert curve.qualities[within].ratio == best
    assert curve.fragments_within(curve.nbytes[-1]) == len(curve.order)


def test_minimum_fragments_by_brute_force() -> None:
    array = np.random.default_rng(0).standard_normal(2**20 + 5).astype(np.float32)  # three runs of `planes`
    for codec in CODECS:
        entry, _ = holoray.encode_tensor(array, codec, fragments=5)
        usable = get_codec(entry.codec, entry.config).can_reconstruct
        curve = curve_of(entry)
        least = next(
            size
            for size in range(len(entry.fragments) + 1)
            if any(usable(entry.spec, frozenset(c)) for c in itertools.combinations(range(len(entry.fragments)), size))
        )
        assert curve.minimum_fragments == least
        assert usable(entry.spec, frozenset(curve.order[: curve.floor]))
        assert not usable(entry.spec, frozenset(curve.order[: curve.floor - 1]))
        decoder = holoray.TensorDecoder(entry)
        assert decoder.curve.order == curve.order


def test_minimum_of_a_store_needs_all_of_the_mandatory_tensors(sealed: SealedStore) -> None:
    tensors = sealed.manifest.tensors
    mandatory = sum(len(t.fragments) for t in tensors if t.mandatory)
    others = sum(sealed.curve(t.name).minimum_fragments for t in tensors if not t.mandatory)
    assert sealed.curve().minimum_fragments == mandatory + others
    assert sealed.curve().floor == mandatory


def test_mandatory_tensors_come_first_all_of_them() -> None:
    """A bias of three fragments that alone has the quality asked for: nothing less than all of it is loaded."""
    rng = np.random.default_rng(0)
    store = holoray.MemoryStore()
    holoray.encode({"bias": rng.standard_normal(600_000).astype(np.float32), "w": np.ones((80, 80), np.float32)}, store)
    curve = holoray.open(store).curve()
    assert curve.order[:3] == (("bias", 0), ("bias", 1), ("bias", 2))
    assert curve.floor == 3
    assert curve.minimum_fragments == 4
    assert curve.qualities[1].ratio > 0.3
    assert curve.fragments_for_quality(0.3) == 3
    with pytest.raises(CapacityError):
        curve.fragments_within(curve.nbytes[2])
    assert holoray.open(store).curve("bias").minimum_fragments == 3


def test_a_prefix_that_loses_is_not_taken() -> None:
    entry, _ = holoray.encode_tensor(np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32))
    gains = (10.0, -4.0, 8.0, -1.0, 3.0, 1.0, 1.0)
    lossy = replace(entry, fragments=tuple(replace(f, gain=g) for f, g in zip(entry.fragments, gains, strict=True)))
    curve = curve_of(lossy)
    assert [q.ratio for q in curve.qualities] == pytest.approx(
        [0, 10 / 18, 6 / 18, 14 / 18, 13 / 18, 16 / 18, 17 / 18, 1]
    )
    assert [curve.fragments_within(n) for n in curve.nbytes[1:]] == [1, 1, 3, 3, 5, 6, 7]
    assert curve.fragments_for_quality(0.6) == 3
    assert curve.quality_of([0, 1, 3]) == curve.quality_of([1, 0])  # layer 3 waits for layer 2


def test_the_curve_of_one_codec_has_its_tensors_alone() -> None:
    store = holoray.MemoryStore()
    rng = np.random.default_rng(0)
    names = ("a.planes", "b.raw", "c.planes")
    model = {n: rng.standard_normal((100, 100)).astype(np.float32) for n in names}
    holoray.encode(model | {"bias": np.ones(9, np.float32)}, store, pattern={"*.raw": "raw"})
    sealed = holoray.open(store)
    raw = store_curve(sealed.manifest, "raw")
    assert raw.order == (("b.raw", 0),)
    assert raw.nbytes == (0, sealed.entry("b.raw").stored_bytes)
    planes = store_curve(sealed.manifest, "planes")
    assert {name for name, _ in planes.order} == {"a.planes", "c.planes"}
    assert planes.floor == 0
    assert planes.qualities[-1].complete
    with pytest.raises(UsageError, match="spectral"):
        store_curve(sealed.manifest, "spectral")


def hull(points: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """The upper concave hull of points sorted by bytes (monotone chain)."""
    kept: list[tuple[int, float]] = []
    for x, y in points:
        while len(kept) > 1 and (kept[-1][1] - kept[-2][1]) * (x - kept[-2][0]) <= (y - kept[-2][1]) * (
            kept[-1][0] - kept[-2][0]
        ):
            kept.pop()
        kept.append((x, y))
    return kept


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32), share=st.floats(0, 1))
def test_no_subset_lies_above_the_hull_of_the_curve(sealed: SealedStore, seed: int, share: float) -> None:
    curve = sealed.curve()
    rng = random.Random(seed)
    chosen = {f for f in curve.order[curve.floor :] if rng.random() < share} | set(curve.order[: curve.floor])
    nbytes = curve.nbytes[0] + sum(sealed.entry(name).fragments[i].stored_bytes for name, i in chosen)
    best = hull(curve.points[curve.floor :])
    limit = float(np.interp(nbytes, [x for x, _ in best], [y for _, y in best]))
    assert curve.quality_of(chosen).ratio <= limit + 1e-12


def test_the_curve_touches_its_hull_and_rises_along_it(sealed: SealedStore) -> None:
    points = sealed.curve().points[sealed.curve().floor :]
    best = hull(points)
    assert all(b.bytes >= a.bytes for a, b in itertools.pairwise(points))
    assert all(b[1] >= a[1] for a, b in itertools.pairwise(best))
    largest = max(sealed.manifest.tensors, key=lambda t: t.energy)
    most = max(f.gain for f in largest.fragments) / sum(t.energy for t in sealed.manifest.tensors)
    for point in points:  # below the hull by less than one step
        reached = max(p.quality for p in points if p.bytes <= point.bytes)
        limit = float(np.interp(point.bytes, [x for x, _ in best], [y for _, y in best]))
        assert reached >= limit - most - 1e-12


def test_unreachable_targets() -> None:
    array = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    curve = curve_of(holoray.encode_tensor(array, "spectral", fragments=4)[0])
    assert 0 < curve.qualities[-1].relative_error < 1e-6
    with pytest.raises(QualityError, match="not reachable"):
        curve.fragments_for_quality(math.nextafter(1.0, 0.0))
    assert curve.fragments_for_quality(1.0) == 4
    with pytest.raises(CapacityError, match="do not hold"):
        curve.fragments_within(curve.nbytes[curve.floor] - 1)


@pytest.mark.parametrize("quality", [0.0, -1.0, 1.5, math.nan])
def test_qualities_without_meaning(quality: float) -> None:
    curve = curve_of(holoray.encode_tensor(np.ones((64, 64), np.float32))[0])
    with pytest.raises(UsageError, match=r"\(0, 1\]"):
        curve.bytes_for_quality(quality)


def test_what_there_is_not(sealed: SealedStore) -> None:
    with pytest.raises(UsageError, match="no tensor"):
        sealed.curve("nope")
    for fragment in (("nope", 0), ("embed.weight", -1), ("embed.weight", 10**6)):
        with pytest.raises(UsageError, match="no fragment"):
            sealed.curve().quality_of([fragment])
    of_tensor: QualityCurve[int] = sealed.curve("embed.weight")
    for index in (-1, 10**6):
        with pytest.raises(UsageError, match="no fragment"):
            of_tensor.quality_of([index])


def test_a_fragment_counts_once_and_a_tensor_of_zeros_is_whole_only_at_the_end() -> None:
    curve = curve_of(holoray.encode_tensor(np.zeros((64, 64), np.float32), "raw")[0])
    assert [q.ratio for q in curve.qualities] == [0.0, 1.0]
    entry, _ = holoray.encode_tensor(np.ones((64, 64), np.float32), "spectral", fragments=3)
    twice = curve_of(entry).quality_of([1, 1])
    assert twice == curve_of(entry).quality_of([1])
