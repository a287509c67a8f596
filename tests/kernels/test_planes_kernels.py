"""The kernels of `planes`: orders, refinement in place, tables against instructions, forged streams, combining."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planes_cases import SHAPES, UNSIGNED, Case, bits_of, gaussian, with_outliers

from holoray.errors import FormatError, UsageError
from holoray.kernels import bits
from holoray.kernels.planes_decode import PlanesAccumulator, RunLayers
from holoray.kernels.scratch import Scratch

DTYPES = ("BF16", "F16", "F32")
WORD = st.integers(0, 2**64 - 1)


@settings(deadline=None)  # the first example compiles
@given(word=WORD, mask=WORD)
def test_tables_do_what_the_instructions_do(word: int, mask: int) -> None:
    places = [p for p in range(64) if mask >> p & 1]
    deposited = sum((word >> n & 1) << p for n, p in enumerate(places))
    extracted = sum((word >> p & 1) << n for n, p in enumerate(places))
    a, m = np.uint64(word), np.uint64(mask)
    assert bits.deposit(a, m, False) == deposited
    assert bits.extract(a, m, False) == extracted
    if bits.HARDWARE:
        assert bits.deposit(a, m, True) == deposited
        assert bits.extract(a, m, True) == extracted


@pytest.mark.parametrize("dtype", DTYPES)
def test_tables_and_instructions_make_the_same_bytes(dtype: str) -> None:
    bits_in = SHAPES["outliers"](dtype)
    case, other = Case(dtype, bits_in), Case(dtype, bits_in, hardware=False)
    assert case.payloads == other.payloads
    for layers in range(1, case.layers + 1):
        assert np.array_equal(case.decoded(layers, hardware=False), case.decoded(layers))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layers_in_place_read_like_layers_from_scratch(dtype: str, shape: str) -> None:
    case = Case(dtype, SHAPES[shape](dtype))
    scratch = Scratch()
    for first, last in itertools.combinations(range(1, case.layers + 1), 2):
        accumulator = case.accumulator()
        case.add(accumulator, case.upto(first, 0), scratch)
        case.add(accumulator, case.upto(last, 0, first=first), scratch)
        assert np.array_equal(bits_of(accumulator), case.oracle(last))
        assert accumulator.reached[0] == last


def test_any_order_ends_the_same() -> None:
    case = Case("F32", gaussian("F32", (1 << 19) + 5000))
    rng = np.random.default_rng(0)
    for _ in range(4):
        accumulator, scratch = case.accumulator(), Scratch()
        for index in rng.permutation(list(case.entries)):
            case.add(accumulator, [int(index)], scratch)
            case.add(accumulator, [int(index)], scratch)
        assert np.array_equal(bits_of(accumulator), case.bits)
        assert not accumulator.waiting


def test_an_early_layer_waits_and_owns_its_bytes() -> None:
    case = Case("BF16", gaussian("BF16", 9000))
    accumulator, scratch = case.accumulator(), Scratch()
    buffer = bytearray(case.payloads[2])
    ready = accumulator.decompress([case.entries[2]], [memoryview(buffer)], scratch)
    accumulator.accumulate(0, ready, scratch)
    del ready
    buffer[:] = bytes(len(buffer))
    assert accumulator.reached[0] == 0
    assert not bits_of(accumulator).any()
    case.add(accumulator, [0], scratch)
    assert accumulator.reached[0] == 1
    assert list(accumulator.waiting[0]) == [2]
    case.add(accumulator, [1], scratch)
    assert accumulator.reached[0] == 3
    assert not accumulator.waiting
    assert np.array_equal(bits_of(accumulator), case.oracle(3))


def test_a_run_that_another_process_left_is_resumed() -> None:
    case = Case("F16", gaussian("F16", 70_000))
    first, scratch = case.accumulator(), Scratch()
    case.add(first, case.upto(2, 0), scratch)
    second = PlanesAccumulator(case.spec, case.codec, first.out)
    second.resume(0, 2)
    case.add(second, case.upto(6, 0), scratch)
    assert np.array_equal(bits_of(second), case.bits)
    with pytest.raises(UsageError):
        second.resume(0, 7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_failed_step_leaves_the_run_as_it_was(dtype: str) -> None:
    case, scratch = Case(dtype, gaussian(dtype, 70_000)), Scratch()
    layout = case.codec.layout(case.spec, 3, 0)
    forged = bytearray(case.payloads[3])
    forged[layout.directory.size + 4] ^= 1  # where the second block's signs begin
    accumulator = case.accumulator()
    case.add(accumulator, case.upto(3, 0), scratch)
    before = bits_of(accumulator).copy()
    ready = accumulator.decompress([case.entries[3]], [bytes(forged)], scratch)
    with pytest.raises(FormatError) as caught:
        accumulator.accumulate(0, ready, scratch)
    assert (caught.value.tensor, caught.value.fragment) == ("weights", 3)
    assert accumulator.reached[0] == 3
    assert np.array_equal(bits_of(accumulator), before)
    case.add(accumulator, case.upto(case.layers, 0, first=3), scratch)
    assert np.array_equal(bits_of(accumulator), case.bits)


def test_combine_merges_runs_and_what_waits() -> None:
    case = Case("BF16", gaussian("BF16", (1 << 19) + 5000))
    one, two, scratch = case.accumulator(), case.accumulator(), Scratch()
    case.add(one, case.upto(6, 0), scratch)
    case.add(two, case.upto(2, 1), scratch)
    case.add(two, [case.upto(4, 1)[-1]], scratch)
    one.combine(two)
    assert one.reached.tolist() == [6, 2]
    case.add(one, [case.upto(3, 1)[-1]], scratch)
    assert one.reached.tolist() == [6, 4]
    case.add(one, case.upto(6, 1, first=4), scratch)
    assert np.array_equal(bits_of(one), case.bits)
    with pytest.raises(UsageError):
        one.combine(two)


def test_slots_are_ranges_of_the_tensor() -> None:
    case = Case("F32", gaussian("F32", (1 << 19) + 5))
    accumulator = case.accumulator()
    assert [accumulator.slot_range(s) for s in range(2)] == [(0, 1 << 21), (1 << 21, (1 << 21) + 20)]


def test_odd_shapes_and_outputs() -> None:
    case = Case("BF16", gaussian("BF16", 4096).reshape(2, 64, 32))
    assert np.array_equal(case.decoded(6), case.bits)
    scalar = Case("F32", np.array(np.float32(-3.7)).view(np.uint32))
    assert np.array_equal(scalar.decoded(7), scalar.bits)
    with pytest.raises(UsageError):
        PlanesAccumulator(case.spec, case.codec, np.zeros((4096,), case.array.dtype))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), dtype=st.sampled_from(DTYPES))
def test_forged_streams_stay_inside_the_run(seed: int, dtype: str) -> None:
    """Well-formed bodies with lying offsets and contents: refused or some array, and nothing written beside it."""
    case = Case(dtype, with_outliers(dtype, 70_001), compression="none")
    rng = np.random.default_rng(seed)
    guarded = np.full(70_001 + 2 * 4096, 0x5A5A, UNSIGNED[dtype])
    out = guarded[4096:-4096].view(case.array.dtype)
    accumulator, scratch = PlanesAccumulator(case.spec, case.codec, out), Scratch()
    for held in (0, int(rng.integers(1, case.layers))):
        accumulator.resume(0, held)
        run = RunLayers(0)
        for layer in range(held, case.layers):
            layout = case.codec.layout(case.spec, layer, 0)
            body = bytearray(case.payloads[layer])
            start = layout.directory.size if rng.random() < 0.3 else layout.head_bytes
            for place in rng.integers(start, len(body), int(rng.integers(0, 200))):
                body[place] = int(rng.integers(0, 256))
            run.add(case.codec, case.spec, {layer: bytes(body)}, scratch)
        try:
            accumulator.accumulate(0, run, scratch)
        except FormatError:
            assert accumulator.reached[0] == held
        assert (guarded[:4096] == 0x5A5A).all()
        assert (guarded[-4096:] == 0x5A5A).all()
