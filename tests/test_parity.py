"""The parity matrix: codec with options x dtype x shape x fragments x order x split x backend, against the oracle.

Laws, for every cell: fast decode of a subset equals the NumPy oracle's; reported quality is true quality; order and
duplicates change nothing; accumulators of disjoint slots combine to the accumulator of the union, bit for bit.
A backend joins by a line in BACKENDS, a codec or an option by a line in CODECS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from on_cpu import COMPILER, NO_COMPILER, kernels_on_cpu

from holoray.codecs import get_codec
from holoray.codecs.base import present_with_prerequisites
from holoray.compression import decompress
from holoray.errors import IntegrityError, QualityError, UsageError
from holoray.fragment import Fragment, TensorEntry
from holoray.integrity import Digests
from holoray.kernels.accumulator import Accumulator
from holoray.kernels.device_accumulators import device_dtype
from holoray.kernels.registry import ACCUMULATORS, DEVICE_ACCUMULATORS, make_accumulator, make_device_accumulator
from holoray.kernels.scratch import Scratch
from holoray.pipelines.tensor_codec import TensorDecoder, encode_tensor
from holoray.tensor import DTYPES, Array, as_bytes

Backend = Callable[[TensorEntry], Accumulator]
Encoded = tuple[Array, TensorEntry, list[Fragment]]


def on_cpu(entry: TensorEntry) -> Accumulator:
    out = np.zeros(entry.spec.shape, entry.spec.numpy_dtype)
    return make_accumulator(entry.spec, get_codec(entry.codec, entry.config), out)


def on_device(entry: TensorEntry) -> Accumulator:
    """The CUDA kernels themselves, compiled for the CPU."""
    device = kernels_on_cpu()
    out = device.zeros(entry.spec.shape, device_dtype(entry.spec))
    return make_device_accumulator(entry.spec, get_codec(entry.codec, entry.config), out, device)


BACKENDS: dict[str, Backend] = {"cpu": on_cpu, "cuda kernels": on_device}
CODECS: dict[str, dict[str, Any]] = {
    "raw": {"codec": "raw"},
    "planes": {"codec": "planes"},
    "spectral": {"codec": "spectral"},
    "spectral, tiled, essential": {"codec": "spectral", "tile": 100, "essential": 0.3},
    "projection": {"codec": "projection"},
    "projection, half, essential": {"codec": "projection", "coefficients": "float16", "essential": 0.3},
    "lowrank": {"codec": "lowrank"},
    "lowrank, half, essential": {"codec": "lowrank", "coefficients": "float16", "essential": 0.3},
    "lowrank, truncated": {"codec": "lowrank", "rank": 3, "fragments": 2},
}
DTYPE_NAMES = ("F32", "F16", "BF16")
SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "one element": (1,),
    "empty": (3, 0),
    "1-D": (1000,),
    "primes": (67, 131),
    "5-D": (3, 4, 5, 6, 7),
    "several runs": (3, 190_000),
}
EXACT = ("raw", "planes")
# Tolerance of a float32 transform against the float64 oracle, relative to the tensor's largest weight, and of the
# rounding to the tensor's own dtype. planes and raw are exact.
ULP = {"F32": 2e-6, "F16": 2.0**-10, "BF16": 2.0**-7}

_cache: dict[tuple[str, str, str], Encoded] = {}


def encoded(codec: str, dtype: str, shape: str) -> Encoded:
    if (codec, dtype, shape) not in _cache:
        rng = np.random.default_rng(len(shape) * 7 + len(dtype))
        array = (0.05 * rng.standard_normal(SHAPES[shape])).astype(DTYPES[dtype])
        entry, fragments = encode_tensor(array, seed=3, **({"fragments": 6} | CODECS[codec]))
        _cache[codec, dtype, shape] = (array, entry, fragments)
    return _cache[codec, dtype, shape]


def backends(entry: TensorEntry) -> list[Backend]:
    """Those that take a tensor: threads of a GPU are slow on a CPU."""
    small = entry.spec.size <= 10_000 and COMPILER is not None
    return [backend for name, backend in BACKENDS.items() if name == "cpu" or small]


def fill(
    accumulator: Accumulator, entry: TensorEntry, fragments: list[Fragment], indices: Iterable[int]
) -> Accumulator:
    scratch = Scratch()
    for index in indices:
        known = entry.fragments[index]
        raw = accumulator.decompress([known], [memoryview(fragments[index].payload)], scratch)
        accumulator.accumulate(known.slot, raw, scratch)
    return accumulator


def result(accumulator: Accumulator) -> Array:
    accumulator.finalize()
    return accumulator.out.view(accumulator.spec.numpy_dtype)  # bfloat16 is uint16 on a device


def same_bits(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(as_bytes(a), as_bytes(b))


def oracle(entry: TensorEntry, fragments: list[Fragment], indices: Iterable[int]) -> Array:
    codec = get_codec(entry.codec, entry.config)
    present = present_with_prerequisites(codec, entry.spec, frozenset(indices))
    payloads = {}
    for index in present:
        known = entry.fragments[index]
        raw = fragments[index].payload
        payloads[index] = decompress(known.compression, raw, known.raw_bytes)
    return codec.decode(entry.spec, payloads)


def some_indices(data: st.DataObject, count: int) -> list[int]:
    """A random subset in a random order."""
    order = data.draw(st.permutations(range(count)))
    return list(order[: data.draw(st.integers(0, count))])


def cells(test: Any) -> Any:
    for name, values in (("shape", SHAPES), ("dtype", DTYPE_NAMES), ("codec", CODECS)):
        test = pytest.mark.parametrize(name, values)(test)
    return settings(deadline=None, max_examples=4, derandomize=True)(test)


@pytest.mark.fault("missing")
@cells
@given(data=st.data())
def test_subsets_decode_as_the_oracle_says(data: st.DataObject, codec: str, dtype: str, shape: str) -> None:
    array, entry, fragments = encoded(codec, dtype, shape)
    indices = some_indices(data, len(fragments))
    for backend in backends(entry):
        got = result(fill(backend(entry), entry, fragments, indices))
        expected = oracle(entry, fragments, indices)
        if entry.codec not in EXACT:
            atol = ULP[dtype] * float(np.max(np.abs(array.astype(np.float64)), initial=0.0))
            np.testing.assert_allclose(got.astype(np.float64), expected.astype(np.float64), rtol=ULP[dtype], atol=atol)
        else:
            assert same_bits(got, expected)


@pytest.mark.fault("missing")
@cells
@given(data=st.data())
def test_reported_quality_is_true_quality(data: st.DataObject, codec: str, dtype: str, shape: str) -> None:
    array, entry, fragments = encoded(codec, dtype, shape)
    decoder = TensorDecoder(entry)
    for index in some_indices(data, len(fragments)):
        decoder.add(fragments[index])
    if not decoder.can_reconstruct:
        with pytest.raises(QualityError):
            decoder.reconstruct()
        return
    truth = array.astype(np.float64)
    error = float(np.linalg.norm(decoder.reconstruct().astype(np.float64) - truth))
    energy = float(np.linalg.norm(truth))
    if energy == 0:
        assert decoder.quality in (0.0, 1.0)
        return
    assert decoder.quality == pytest.approx(1 - (error / energy) ** 2, abs=1e-4)
    assert decoder.report.relative_error == pytest.approx(error / energy, rel=1e-2, abs=1e-6)


@pytest.mark.fault("duplicated", "reordered")
@cells
@given(data=st.data())
def test_order_and_duplicates_change_nothing(data: st.DataObject, codec: str, dtype: str, shape: str) -> None:
    _, entry, fragments = encoded(codec, dtype, shape)
    indices = some_indices(data, len(fragments))
    again = data.draw(st.permutations(indices)) + data.draw(
        st.lists(st.sampled_from(indices), max_size=4) if indices else st.just([])
    )
    for backend in backends(entry):
        once = result(fill(backend(entry), entry, fragments, indices))
        assert same_bits(once, result(fill(backend(entry), entry, fragments, again)))


@cells
@given(data=st.data())
def test_disjoint_accumulators_combine_to_the_union(data: st.DataObject, codec: str, dtype: str, shape: str) -> None:
    _, entry, fragments = encoded(codec, dtype, shape)
    indices = some_indices(data, len(fragments))
    holders = data.draw(st.integers(1, 3))
    slots = sorted({f.slot for f in entry.fragments})
    owner = {slot: data.draw(st.integers(0, holders - 1)) for slot in slots}
    for backend in backends(entry):
        parts = [
            fill(backend(entry), entry, fragments, [i for i in indices if owner[entry.fragments[i].slot] == holder])
            for holder in range(holders)
        ]
        for part in parts[1:]:
            parts[0].combine(part)
        assert same_bits(result(parts[0]), result(fill(backend(entry), entry, fragments, indices)))


@cells
@given(data=st.data())
def test_slots_travel_between_accumulators(data: st.DataObject, codec: str, dtype: str, shape: str) -> None:
    """What one node ingested reaches another by read_slot and write_slot, and refinement goes on there."""
    _, entry, fragments = encoded(codec, dtype, shape)
    slots = sorted({f.slot for f in entry.fragments})
    depth = data.draw(st.integers(1, 1 + max(f.layer for f in entry.fragments)))
    for backend in backends(entry):
        first = fill(backend(entry), entry, fragments, [f.index for f in entry.fragments if f.layer < depth])
        second = backend(entry)
        for slot in slots:
            second.write_slot(slot, first.read_slot(slot).copy())
            second.resume(slot, depth)
        fill(second, entry, fragments, [f.index for f in entry.fragments if f.layer >= depth])
        everything = fill(backend(entry), entry, fragments, range(len(fragments)))
        assert same_bits(result(second), result(everything))


@pytest.mark.fault("duplicated")
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("codec", CODECS)
def test_overlapping_accumulators_are_refused(codec: str, dtype: str) -> None:
    for shape in ("several runs", "primes"):
        _, entry, fragments = encoded(codec, dtype, shape)
        for backend in backends(entry):
            a, b = (fill(backend(entry), entry, fragments, [0]) for _ in range(2))
            with pytest.raises(UsageError, match="same slot"):
                a.combine(b)


@pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)
def test_the_matrix_has_the_cuda_kernels() -> None:
    assert set(DEVICE_ACCUMULATORS) == set(ACCUMULATORS)
    assert BACKENDS["cuda kernels"] in backends(encoded("planes", "BF16", "primes")[1])


@pytest.mark.fault("odd-tensor")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("codec", CODECS)
def test_everything_gives_the_tensor_back(codec: str, dtype: str, shape: str) -> None:
    array, entry, fragments = encoded(codec, dtype, shape)
    decoder = TensorDecoder(entry)
    for fragment in fragments:
        quality = decoder.add(fragment)
    assert "truncated" in codec or quality == pytest.approx(1.0, abs=1e-6 if "half" in codec else 1e-12)
    got = decoder.reconstruct()
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    if entry.codec not in EXACT:
        error = np.linalg.norm(got.astype(np.float64) - array.astype(np.float64))
        allowed = 1e-3 if "half" in codec else 1e-6
        assert "truncated" in codec or error <= allowed * np.linalg.norm(array.astype(np.float64))
    else:
        assert same_bits(got, array)


@pytest.mark.fault("odd-tensor")
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", sorted(set(DTYPES) - set(DTYPE_NAMES)))
def test_other_dtypes_go_raw_and_stay_exact(codec: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2 if dtype == "BOOL" else 256, 999 * DTYPES[dtype].itemsize).astype(np.uint8)
    array = bits.view(DTYPES[dtype])
    entry, fragments = encode_tensor(array, **CODECS[codec])
    assert entry.codec == "raw"
    decoder = TensorDecoder(entry)
    for fragment in fragments:
        decoder.add(fragment)
    assert same_bits(decoder.reconstruct(), array)


@pytest.mark.fault("not-finite")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_nan_and_inf_survive_bit_for_bit(codec: str, dtype: str, value: float) -> None:
    array = np.linspace(-1, 1, 5000).astype(DTYPES[dtype])
    array[17] = value
    entry, fragments = encode_tensor(array, **CODECS[codec])
    assert entry.codec == ("planes" if codec == "planes" else "raw")
    assert math.isfinite(entry.energy)
    decoder = TensorDecoder(entry)
    for fragment in fragments:
        decoder.add(fragment)
    assert same_bits(decoder.reconstruct(), array)


@pytest.mark.fault("not-finite")
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("codec", CODECS)
def test_every_bit_pattern_survives(codec: str, dtype: str) -> None:
    """All NaN payloads, signed zeros and subnormal values of 16 bits; of 32 bits the same in the upper half."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    bits = patterns if dtype != "F32" else patterns.astype(np.uint32) << 16 | 0x5A5A
    array = bits.view(DTYPES[dtype]).reshape(256, 256)
    entry, fragments = encode_tensor(array, **CODECS[codec])
    decoder = TensorDecoder(entry)
    for fragment in fragments:
        decoder.add(fragment)
    assert same_bits(decoder.reconstruct(), array)


@pytest.mark.fault("malformed")
def test_a_malformed_layer_behind_a_good_digest_changes_nothing() -> None:
    """Whoever seals a store can write nonsense under true digests; what was loaded before must stay usable."""
    array, entry, fragments = encoded("planes", "BF16", "several runs")
    runs = sum(f.layer == 0 for f in entry.fragments)
    forged = bytearray(fragments[runs].payload)
    forged[-200:] = bytes(200)
    payload = bytes(forged[:-3])
    digests = Digests.of(payload)
    known = replace(entry.fragments[runs], stored_bytes=len(payload), raw_bytes=len(payload), xxh3_64=digests.xxh3_64)
    lying = replace(
        entry,
        fragments=tuple(replace(known, sha256=digests.sha256) if f.index == runs else f for f in entry.fragments),
    )
    decoder = TensorDecoder(lying)
    for index in (*range(runs), 2 * runs):
        decoder.add(fragments[index])
    quality, weights = decoder.quality, decoder.reconstruct()
    with pytest.raises(IntegrityError, match="malformed"):
        decoder.add(Fragment(entry.name, runs, payload))
    assert decoder.quality == quality
    assert same_bits(decoder.reconstruct(), weights)
    assert array.size


@pytest.mark.fault("flipped", "spliced")
def test_a_bad_fragment_changes_nothing() -> None:
    array, entry, fragments = encoded("planes", "BF16", "several runs")
    decoder = TensorDecoder(entry)
    decoder.add(fragments[0])
    before = decoder.quality
    flipped = bytearray(fragments[1].payload)
    flipped[100] ^= 1
    for bad in (
        Fragment(entry.name, 1, bytes(flipped)),
        Fragment(entry.name, 1, fragments[1].payload[:-1]),
        Fragment(entry.name, 2, fragments[1].payload),
        Fragment("other", 1, fragments[1].payload),
        Fragment(entry.name, 10**6, fragments[1].payload),
        Fragment(entry.name, -1, fragments[1].payload),
    ):
        with pytest.raises(IntegrityError):
            decoder.add(bad)
    assert decoder.quality == before
    for fragment in fragments:
        decoder.add(fragment)
    assert same_bits(decoder.reconstruct(), array)
