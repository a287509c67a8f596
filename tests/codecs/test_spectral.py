"""`spectral`: which fragments arrive does not matter, and what is reported is true."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.fft
from hypothesis import given, settings
from hypothesis import strategies as st

from holoray.codecs import SpectralCodec
from holoray.codecs.dealing import Deal
from holoray.codecs.spectral import tiles
from holoray.errors import FormatError, UsageError
from holoray.kernels.encoder import EncodeOptions
from holoray.kernels.registry import make_accumulator, make_encoder
from holoray.kernels.scratch import Scratch
from holoray.pipelines.tensor_codec import TensorDecoder, encode_tensor
from holoray.tensor import DTYPES, Array, TensorSpec, matrix_shape

N = 8


def gaussian(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def falling_spectrum() -> Array:
    """Gaussian coefficients scaled by 1/sqrt(1 + column frequency): where a stride that divides the width fails."""
    coefficients = np.random.default_rng(1).standard_normal((512, 512)) / np.sqrt(1 + np.arange(512))
    array: Array = scipy.fft.idctn(coefficients, norm="ortho").astype(np.float32)
    return array


INPUTS = {
    "white": gaussian((512, 512)),
    "white, no power of two": gaussian((601, 450)),
    "white, one row": gaussian((1 << 18,)),
    "falling with the column": falling_spectrum(),
    "falling with the row": np.ascontiguousarray(falling_spectrum().T),
}


@pytest.mark.parametrize("name", INPUTS)
def test_every_subset_has_the_error_of_its_size(name: str) -> None:
    """All 255 subsets of 8: within 3 % of sqrt(1 - k/N), reported = true, 1e-6 at the end."""
    array = INPUTS[name]
    entry, fragments = encode_tensor(array, "spectral", fragments=N)
    transform = scipy.fft.dctn(array.astype(np.float64).reshape(matrix_shape(array.shape)), norm="ortho").reshape(-1)
    energy = float(transform @ transform)
    codec = SpectralCodec.from_config(entry.config)
    # The oracle of the error: the energy of the missing coefficients, from a float64 transform of our own.
    deal = codec.deal(array.size)
    offsets = deal.offsets(codec.group_shifts)
    share = [float(np.sum(transform[deal.places(offsets, i)] ** 2)) for i in range(N)]
    for k in range(1, N + 1):
        for subset in itertools.combinations(range(N), k):
            missing = math.fsum(share[i] for i in range(N) if i not in subset)
            if k < N:
                assert math.sqrt(missing / energy) == pytest.approx(math.sqrt(1 - k / N), rel=0.03)
    rng = np.random.default_rng(2)
    for k in (1, 3, 7, 8):
        subset = tuple(rng.permutation(N)[:k])
        decoder = TensorDecoder(entry)
        for index in subset:
            decoder.add(fragments[index])
        error = np.linalg.norm(decoder.reconstruct().astype(np.float64) - array) / math.sqrt(energy)
        assert decoder.quality == pytest.approx(1 - error**2, abs=1e-4)
        assert decoder.report.relative_error == pytest.approx(error, rel=1e-2, abs=1e-6)
    assert error <= 1e-6


def test_a_plain_stride_would_fail() -> None:
    """The yardstick of the test above: the naive dealing is off by more than 30 % on the same input."""
    transform = scipy.fft.dctn(INPUTS["falling with the column"].astype(np.float64), norm="ortho").reshape(-1)
    missing = np.sum(transform[0::N] ** 2) / np.sum(transform**2)
    assert math.sqrt(missing) / math.sqrt(1 / N) > 1.3


@given(st.integers(1, 5000), st.integers(1, 40), st.integers(0, 2**64 - 1), st.data())
@settings(deadline=None)
def test_every_coefficient_is_dealt_once(size: int, fragments: int, seed: int, data: st.DataObject) -> None:
    deal = Deal(size, fragments, seed)
    shifts = np.array(data.draw(st.lists(st.integers(0, 65535), min_size=deal.groups, max_size=deal.groups)), np.int64)
    offsets = deal.offsets(shifts)
    places = [deal.places(offsets, i) for i in range(fragments)]
    np.testing.assert_array_equal(np.sort(np.concatenate(places)), np.arange(size))
    for i, own in enumerate(places):
        assert own.size == deal.count((int(offsets[-1]) + i) % fragments)
        assert (np.diff(own) > 0).all()


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 17))
def test_tiles_cover_the_matrix_once(rows: int, columns: int, tile: int) -> None:
    count = np.zeros((rows, columns), int)
    for place in tiles((rows, columns), tile):
        count[place] += 1
    assert (count == 1).all()


@pytest.mark.parametrize("tile", [1, 16, 100])
def test_tiled_transforms(tile: int) -> None:
    array = gaussian((90, 130))
    spec = TensorSpec.of("t", array)
    encoder = make_encoder("spectral", spec, array, EncodeOptions(tile=tile))
    accumulator = make_accumulator(spec, encoder.codec, np.zeros_like(array))
    for fragment in encoder.encode(0):
        accumulator.accumulate(fragment.slot, fragment.payload, Scratch()) if fragment.compression == "none" else None
    accumulator.finalize()
    assert isinstance(encoder.codec, SpectralCodec)
    assert encoder.codec.tile == tile
    payloads = {f.index: f.payload for f in encoder.encode(0) if f.compression == "none"}
    np.testing.assert_allclose(encoder.codec.decode(spec, payloads), accumulator.out, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [("F32", 1e37), ("F32", 1e-42), ("F32", 1.0), ("F16", 2e4), ("F16", 1e-4), ("BF16", 1e38), ("BF16", 1e-36)],
)
def test_extreme_scales_stay_finite_and_exact(dtype: str, scale: float) -> None:
    array = (np.clip(gaussian((70, 90)), -3, 3) * scale).astype(DTYPES[dtype])
    entry, fragments = encode_tensor(array, "spectral", fragments=4)
    assert entry.codec == "spectral"
    decoder = TensorDecoder(entry)
    truth = array.astype(np.float64)
    for fragment in fragments:
        decoder.add(fragment)
        got = decoder.reconstruct().astype(np.float64)
        assert np.isfinite(got).all()
        error = np.linalg.norm(got - truth) / np.linalg.norm(truth)
        assert decoder.quality == pytest.approx(1 - error**2, abs=1e-4)
    assert error <= 1e-6


@pytest.mark.parametrize(("dtype", "scale"), [("F16", 1e-6), ("BF16", 1e-39), ("F32", 1e-44)])
def test_values_at_the_edge_of_a_dtype_go_raw(dtype: str, scale: float) -> None:
    """Rounding a partial sum to such a dtype would be an error that nobody measured."""
    array = (gaussian((70, 90)) * scale).astype(DTYPES[dtype])
    assert np.count_nonzero(array)
    assert encode_tensor(array, "spectral")[0].codec == "raw"
    assert encode_tensor(np.zeros_like(array), "spectral")[0].codec == "spectral"


ROUNDED = {
    "a large mean": 1 + 0.01 * gaussian((512, 512)),
    "a larger one": 1 + 0.001 * gaussian((512, 512)),
    "smooth": np.arange(4096).reshape(64, 64),
    "an outlier": np.where(np.arange(1 << 18) == 5, 200, gaussian((1 << 18,))).reshape(512, 512),
    "spikes": np.where(np.arange(1 << 18) % 40_000 == 7, 60, gaussian((1 << 18,))).reshape(512, 512),
    "the unit matrix": np.eye(64),
    "few": gaussian((7,)),
    "white": gaussian((512, 512)),
    "small and white": gaussian((64, 64)),
}


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("name", ROUNDED)
def test_rounding_to_the_dtype_never_falsifies_what_is_reported(name: str, dtype: str) -> None:
    """A tensor whose partial results would be felt to be rounded goes raw; for the others the numbers are true."""
    array = ROUNDED[name].astype(DTYPES[dtype])
    truth = array.astype(np.float64)
    entry, fragments = encode_tensor(array, "spectral", fragments=8)
    if "white" in name:
        assert entry.codec == "spectral"
    for order in (range(len(fragments)), reversed(range(len(fragments)))):
        decoder = TensorDecoder(entry)
        for index in order:
            decoder.add(fragments[index])
            error = np.linalg.norm(decoder.reconstruct().astype(np.float64) - truth) / np.linalg.norm(truth)
            assert decoder.quality == pytest.approx(1 - error**2, abs=1e-4)
            assert decoder.report.relative_error == pytest.approx(error, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 1, 1)])
def test_more_fragments_than_coefficients(shape: tuple[int, ...]) -> None:
    array = gaussian(shape)
    entry, fragments = encode_tensor(array, "spectral", fragments=8)
    assert len(fragments) == 8
    decoder = TensorDecoder(entry)
    for fragment in reversed(fragments):
        decoder.add(fragment)
    np.testing.assert_allclose(decoder.reconstruct(), array, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fragments", [0, 4097])
def test_fragment_counts_out_of_range(fragments: int) -> None:
    with pytest.raises(UsageError):
        encode_tensor(gaussian((70, 70)), "spectral", fragments=fragments)


@pytest.mark.parametrize(
    "change",
    [
        {"fragments": 0},
        {"fragments": 1 << 40},
        {"seed": -1},
        {"seed": 1 << 64},
        {"tile": -1},
        {"exponent": 10**9},
        {"shifts": "!"},
        {"shifts": "AAA="},
        {"shifts": ""},
        {"fragments": True},
        {"tile": 1.0},
        {"extra": 1},
    ],
    ids=str,
)
def test_forged_configurations(change: dict[str, object]) -> None:
    entry, _ = encode_tensor(gaussian((70, 70)), "spectral")
    with pytest.raises(FormatError):
        SpectralCodec.from_config(dict(entry.config) | change).check(entry.spec)
