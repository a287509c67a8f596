"""`planes`: configuration, layout, and that fragments mean the same to the oracle and to the kernels."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planes_cases import SHAPES, UNSIGNED, Case, gaussian, with_outliers

from holoray.codecs import planes_layout as lay
from holoray.codecs.planes import PlanesCodec
from holoray.codecs.registry import get_codec
from holoray.errors import FormatError, HolorayError, TruncatedError
from holoray.kernels.scratch import Scratch
from holoray.tensor import Array, TensorSpec

DTYPES = ("BF16", "F16", "F32")
SIZES = (1, 17, 4095, 4096, 4097, 65536, 65537, 1 << 19, (1 << 19) + 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_prefix_of_layers_reads_the_same_everywhere(dtype: str, shape: str) -> None:
    case = Case(dtype, SHAPES[shape](dtype))
    for layers in range(1, case.layers + 1):
        expected = case.oracle(layers)
        assert np.array_equal(case.decoded(layers), expected)
    assert np.array_equal(expected, case.bits)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_round_trip(size: int) -> None:
    dtype = DTYPES[size % 3]
    case = Case(dtype, gaussian(dtype, size))
    assert np.array_equal(case.oracle(case.layers), case.bits)
    assert np.array_equal(case.decoded(case.layers), case.bits)
    assert np.array_equal(case.decoded(2), case.oracle(2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gains_are_the_true_squared_errors(dtype: str, shape: str) -> None:
    case = Case(dtype, SHAPES[shape](dtype))
    left = case.error(0)[1]
    energy = left
    for layers in range(1, case.layers + 1):
        left -= sum(case.gains[i] for i in case.upto(layers, first=layers - 1))
        assert left == pytest.approx(case.error(layers)[0], rel=1e-9, abs=1e-12 * energy)
    assert abs(left) <= 1e-12 * energy


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_describe_the_fragments(dtype: str) -> None:
    case = Case(dtype, gaussian(dtype, (1 << 19) + 70_000))
    shapes = list(case.codec.shapes(case.spec))
    assert [s.index for s in shapes] == sorted(case.entries) == list(range(len(shapes)))
    for shape in shapes:
        entry = case.entries[shape.index]
        assert (shape.layer, shape.slot, shape.requires) == (entry.layer, entry.slot, entry.requires)
        assert shape.min_bytes <= entry.raw_bytes == len(case.payloads[shape.index]) <= shape.max_bytes


def test_sizes_of_a_gaussian_tensor() -> None:
    for dtype, share in (("BF16", 0.672), ("F16", 0.86), ("F32", 0.84)):
        case = Case(dtype, gaussian(dtype, 1 << 19))
        assert sum(map(len, case.payloads.values())) < share * case.array.nbytes


def test_zeros_and_sparse_tensors_are_small() -> None:
    zeros = Case("BF16", np.zeros(1 << 19, np.uint16))
    assert sum(map(len, zeros.payloads.values())) < 5000
    sparse = Case("BF16", SHAPES["sparse"]("BF16"))
    assert sum(map(len, sparse.payloads.values())) < 0.25 * sparse.array.nbytes


def test_configuration_round_trips_through_json() -> None:
    codec = PlanesCodec(threshold=120, top=3, tail_cut=-6)
    assert get_codec("planes", json.loads(json.dumps(codec.get_config()))) == codec
    with pytest.raises(FormatError):
        get_codec("planes", {"threshold": 120, "top": 3})


@pytest.mark.parametrize(
    ("dtype", "threshold", "top", "tail_cut"),
    [
        ("BF16", 7, 3, -6),
        ("BF16", 241, 3, -6),
        ("BF16", 240, 16, -4),
        ("BF16", 120, -1, -6),
        ("BF16", 120, 3, -3),
        ("BF16", 120, 3, -11),
        ("BF16", 120, 10, -7),
        ("BF16", 8, 3, -8),
        ("F32", -(10**30), 3, -6),
        ("F16", 116, 3, -4),
        ("F16", 144, 0, -4),
        ("F16", 143, 1, -4),
        ("F16", 118, 3, -6),
    ],
)
def test_impossible_configurations_are_refused(dtype: str, threshold: int, top: int, tail_cut: int) -> None:
    with pytest.raises(FormatError):
        PlanesCodec(threshold, top, tail_cut).check(TensorSpec("t", dtype, (5,)))


@pytest.mark.parametrize(("dtype", "shape"), [("BF16", (0,)), ("F64", (4,)), ("I32", (4,)), ("F32", (3, 0))])
def test_tensors_that_planes_cannot_hold_are_refused(dtype: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(FormatError):
        PlanesCodec(120, 3, -6).check(TensorSpec("t", dtype, shape))


def test_usable_from_the_first_layer_of_every_run() -> None:
    spec = TensorSpec("t", "BF16", (3 * lay.RUN,))
    codec = PlanesCodec(120, 3, -6)
    assert codec.can_reconstruct(spec, frozenset({0, 1, 2}))
    assert not codec.can_reconstruct(spec, frozenset({0, 1, 3, 4}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_compressions(dtype: str, compression: str) -> None:
    case = Case(dtype, SHAPES["outliers"](dtype), compression=compression)
    assert np.array_equal(case.oracle(case.layers), case.bits)
    assert np.array_equal(case.decoded(case.layers), case.bits)


def test_fragments_without_their_prerequisites_do_not_count() -> None:
    case = Case("BF16", gaussian("BF16", 5000))
    payloads = {index: case.payloads[index] for index in (0, 1, 3, 4, 5)}
    decoded = case.codec.decode(case.spec, payloads).view(np.uint16)
    assert np.array_equal(decoded, case.oracle(2))
    assert not case.codec.decode(case.spec, {}).view(np.uint16).any()


@pytest.mark.fault("not-finite")
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_bits_under_any_configuration(data: st.DataObject) -> None:
    """Configurations with few planes and with 16, weights anywhere: exact, and the same layer by layer."""
    dtype = data.draw(st.sampled_from(DTYPES))
    low, high, smallest, special = (117, 143, 113, 143) if dtype == "F16" else (8, 240, 1, 255)
    threshold = data.draw(st.integers(low, high))
    tail_cut = data.draw(st.integers(max(-10, smallest - threshold), -4))
    top = data.draw(st.integers(0, min(special - threshold, 16 + tail_cut)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    count = data.draw(st.sampled_from([1, 100, 4096, 5000, 66_000]))
    bits: Array = rng.integers(0, 1 << 16, count, dtype=np.uint32)
    if dtype == "F32":
        near = rng.integers(threshold - 12, threshold + top + 3, count).clip(0, 255) << 23
        bits = (near | rng.integers(0, 1 << 23, count) | rng.integers(0, 2, count) << 31).astype(np.uint32)
    elif dtype == "BF16":
        near = rng.integers(threshold - 12, threshold + top + 3, count).clip(0, 255) << 7
        bits = near | rng.integers(0, 128, count) | rng.integers(0, 2, count) << 15
    case = Case(dtype, bits.astype(UNSIGNED[dtype]), PlanesCodec(threshold, top, tail_cut))
    stepwise = case.accumulator()

    for layers in range(1, case.layers + 1):
        expected = case.oracle(layers)
        assert np.array_equal(case.decoded(layers), expected)
        case.add(stepwise, case.upto(layers, 0, first=layers - 1), Scratch())
        assert np.array_equal(stepwise.out.view(UNSIGNED[dtype]), expected)
    assert np.array_equal(expected, case.bits)


@pytest.mark.fault("malformed")
def test_malformed_bodies_are_refused() -> None:
    case = Case("BF16", with_outliers("BF16", 5000))
    layout = case.codec.layout(case.spec, 0, 0)
    body = bytearray(case.payloads[0])

    def decode(payload: bytes | bytearray) -> None:
        case.codec.decode(case.spec, {0: bytes(payload)})

    with pytest.raises(TruncatedError):
        decode(body[: layout.head_bytes - 1])
    for broken in (body[:-1], body + b"\0"):
        with pytest.raises(FormatError):
            decode(broken)
    for raw in (0, 1 << 29, 0xFFFFFFFF):
        with pytest.raises(FormatError):
            decode(body[:4] + struct.pack("<I", raw) + body[8:])


@pytest.mark.fault("malformed")
@pytest.mark.parametrize("dtype", DTYPES)
def test_mutated_bodies_are_refused_or_read_but_never_crash(dtype: str) -> None:
    """The oracle and the kernels refuse the same bodies."""
    case = Case(dtype, with_outliers(dtype, 9000))
    rng = np.random.default_rng(7)
    refused = 0
    for _ in range(400):
        index = int(rng.integers(0, case.layers))
        body = bytearray(case.payloads[index])
        head = case.codec.layout(case.spec, index, 0).head_bytes
        for _ in range(int(rng.integers(1, 4))):
            place = int(rng.integers(0, head if rng.random() < 0.5 and head else len(body)))
            body[place] ^= 1 << int(rng.integers(0, 8))
        payloads = {**case.payloads, index: bytes(body)}
        try:
            case.codec.decode(case.spec, payloads)
            oracle = True
        except HolorayError:
            oracle = False
        refused += not oracle
        mutated = case.accumulator()

        scratch = Scratch()
        chosen = [case.entries[i] for i in range(case.layers)]
        try:
            mutated.accumulate(0, mutated.decompress(chosen, [payloads[e.index] for e in chosen], scratch), scratch)
            kernels = True
        except FormatError:
            kernels = False
        assert oracle == kernels
        assert mutated.reached[0] == (case.layers if kernels else 0)
    assert refused > 50
