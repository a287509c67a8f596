"""Quality, its bookkeeping and the plans made from it, against brute force."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holoray.errors import UsageError
from holoray.fragment import NO_PREREQUISITE, FragmentEntry, TensorEntry
from holoray.pipelines.ledger import QualityLedger
from holoray.pipelines.plan import Target, _steps, with_streaming_order
from holoray.quality import Quality, finite_energy
from holoray.tensor import DTYPES, TensorSpec


def fragment(
    index: int, gain: float, nbytes: int = 1, *, slot: int = 0, requires: int = NO_PREREQUISITE
) -> FragmentEntry:
    return FragmentEntry(index, 0, slot, requires, "none", nbytes, nbytes, gain, 0, bytes(32))


def tensor(*fragments: FragmentEntry, name: str = "t", residual: float = 0.0, mandatory: bool = False) -> TensorEntry:
    return TensorEntry(TensorSpec(name, "F32", (4,)), "x", {}, residual, mandatory, bytes(32), fragments)


def chain(gains: list[float], sizes: list[int], slots: int = 1) -> TensorEntry:
    """A layered tensor: index = layer * slots + slot, each layer requires the one before."""
    return tensor(
        *(
            fragment(
                layer * slots + slot,
                gain,
                size,
                slot=slot,
                requires=(layer - 1) * slots + slot if layer else NO_PREREQUISITE,
            )
            for layer, (gain, size) in enumerate(zip(gains, sizes, strict=True))
            for slot in range(slots)
        )
    )


def test_faces_of_quality() -> None:
    quality = Quality(energy=100.0, error=1.0)
    assert quality.ratio == 0.99
    assert quality.relative_error == pytest.approx(0.1)
    assert quality.snr_db == pytest.approx(20.0)
    assert not quality.reaches(1.0)
    assert quality.reaches(0.99)
    assert Quality(100.0, 0.0, complete=True).snr_db == math.inf
    assert (Quality(0.0, 0.0).ratio, Quality(0.0, 0.0, complete=True).ratio) == (0.0, 1.0)


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.0001, math.nan, math.inf])
def test_targets_outside_zero_to_one(bad: float) -> None:
    with pytest.raises(UsageError):
        Target(quality=bad)


def test_only_one_kind_of_target() -> None:
    with pytest.raises(UsageError):
        Target(quality=0.5, bytes=3)
    for bad in ({"bytes": -1}, {"fragments": ()}, {"fragments": (-1,)}):
        with pytest.raises(UsageError):
            Target(**bad)


@given(st.permutations(range(12)), st.integers(0, 11))
def test_a_fragment_counts_once_its_prerequisites_count(order: list[int], cut: int) -> None:
    entry = chain([8.0, -1.0, 4.0, 2.0], [1, 1, 1, 1], slots=3)
    ledger = QualityLedger([entry])
    added: set[int] = set()
    for index in order[:cut]:
        assert ledger.add(0, index)
        assert not ledger.add(0, index)
        added.add(index)
        counted = {i for i in added if all(j in added for j in range(i, -1, -3))}
        expected = sum(entry.fragments[i].gain for i in counted)
        assert ledger.quality.ratio == pytest.approx(expected / entry.energy)
        assert ledger.tensor_quality(0).ratio == pytest.approx(expected / entry.energy)


def test_the_running_sum_keeps_its_precision() -> None:
    """The last fragments of a huge model: errors 1e-13 of the energy must not drown in rounding."""
    gains = [10.0 ** -random.Random(7).uniform(0, 13) for _ in range(5000)]
    entries = [tensor(*(fragment(i, g) for i, g in enumerate(gains)))]
    ledger = QualityLedger(entries)
    for index in sorted(range(5000), key=lambda i: -gains[i]):
        ledger.add(0, index)
        left = math.fsum(g for i, g in enumerate(gains) if i not in ledger._tensors[0].added)
        if left > 1e-9:
            assert ledger.quality.error == pytest.approx(left, rel=1e-6)
    assert ledger.quality.complete
    assert ledger.quality.error == 0.0


def test_the_residual_is_what_remains() -> None:
    ledger = QualityLedger([tensor(fragment(0, 9.0), residual=1.0)])
    assert ledger.quality.energy == 10.0
    ledger.add(0, 0)
    assert ledger.quality.relative_error == pytest.approx(math.sqrt(0.1))
    assert ledger.quality.reaches(1.0)


@given(
    st.lists(st.lists(st.tuples(st.floats(-2, 10), st.integers(1, 9)), min_size=1, max_size=4), min_size=1, max_size=3)
)
def test_the_streaming_order_is_as_good_as_any_at_its_steps(chains: list[list[tuple[float, int]]]) -> None:
    """At every step boundary no other downward-closed set of at most as many bytes gains more (brute force)."""
    tensors = [chain([g for g, _ in c], [b for _, b in c]) for c in chains]
    depths = itertools.product(*(range(len(c) + 1) for c in chains))
    taken = [[row for c, d in zip(chains, depth, strict=True) for row in c[:d]] for depth in depths]
    sets = [(sum(b for _, b in rows), sum(g for g, _ in rows)) for rows in taken]
    steps = sorted((-rate, t, first, indices) for t, e in enumerate(tensors) for rate, first, indices in _steps(e))
    nbytes, gain = 0, 0.0
    for falling_rate, t, _, indices in steps:
        if falling_rate >= 0:
            break
        nbytes += sum(tensors[t].fragments[i].stored_bytes for i in indices)
        gain += sum(tensors[t].fragments[i].gain for i in indices)
        assert gain >= max(g for b, g in sets if b <= nbytes) - 1e-9
    placed = with_streaming_order(tensors)
    in_order = sorted((f.order, t, f.index) for t, e in enumerate(placed) for f in e.fragments)
    assert [(t, i) for _, t, i in in_order] == [(t, i) for _, t, _, indices in steps for i in indices]


def test_mandatory_tensors_stream_first() -> None:
    small = replace(tensor(fragment(0, 0.0), name="bias"), mandatory=True)
    big = chain([100.0, 1.0], [1, 1])
    ordered = with_streaming_order([big, small])
    assert ordered[1].fragments[0].order == 0
    assert [f.order for f in ordered[0].fragments] == [1, 2]


@pytest.mark.fault("not-finite")
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "I8", "BOOL"])
def test_energy_counts_finite_floating_elements(dtype: str) -> None:
    array = np.array([1, 0, 1, 1]).astype(DTYPES[dtype])
    assert finite_energy(array) == (3.0 if dtype.startswith(("F", "BF")) and dtype != "BOOL" else 0.0)
    if dtype in ("F64", "F32", "F16", "BF16"):
        assert finite_energy(np.array([np.nan, np.inf, -np.inf, 2.0]).astype(DTYPES[dtype])) == 4.0
