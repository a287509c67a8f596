"""Every CUDA kernel against its twin: odd sizes, all dtypes, barriers included.

The very same text runs on the CPU, and with `pytest -m gpu` on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from on_cpu import CpuDevice, kernels
from planes_runs_of import Laid, layers_of

import holoray
from holoray.codecs import planes_layout as lay
from holoray.codecs.dealing import MAX_FRAGMENTS, Deal
from holoray.errors import UsageError
from holoray.kernels import dealing, hadamard, launchers, planes_launch, rounding
from holoray.kernels.cuda.source import MODULES
from holoray.kernels.device import Device, Geometry
from holoray.kernels.spectral import inverse_tiles
from holoray.pipelines.plan import Target
from holoray.stores import MemoryStore
from holoray.tensor import DTYPES, Array

HOST = CpuDevice(None)
SEED = st.integers(0, 2**32 - 1)
DTYPE = st.sampled_from(("F32", "F16", "BF16"))
few = settings(deadline=None, max_examples=12, derandomize=True)


def outputs(device: Device, shape: tuple[int, ...], dtype: str) -> tuple[Array, Any]:
    """Zeros for the twin, and zeros on the device, where bfloat16 is uint16."""
    on_device = "<u2" if dtype == "BF16" else DTYPES[dtype]
    return np.zeros(shape, DTYPES[dtype]), device.zeros(shape, on_device)


def bits(array: Array) -> npt.NDArray[Any]:
    return array.reshape(-1).view(f"u{array.itemsize}")


def test_every_kernel_is_run_here() -> None:
    own = {"cast_weights", "collect_shares", "inverse_dct", "inverse_rotation", "put_numbers"}
    own |= {f"inverse_dct_{side}" for side in (8, 16, 32, 64)}
    here = own | {k for _, k in planes_launch.ORDER}
    in_test_dequant = {"dequantise_gptq", "dequantise_awq", "dequantise_int8"}
    assert {name for module in MODULES for name in kernels(module)} == here | in_test_dequant


@few
@given(count=st.integers(0, 3000), dtype=DTYPE, exponent=st.sampled_from((0, 0, 3, -20, 120, -130)), seed=SEED)
def test_cast_rounds_as_the_cpu_does(device: Device, count: int, dtype: str, exponent: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 2**32, count, np.uint32).view(np.float32)
    weights[~np.isfinite(weights)] = 1.0
    expected, got = outputs(device, (count,), dtype)
    with np.errstate(over="ignore"):
        rounding.store(weights, expected, exponent)
    launchers.store(device, device.upload(weights), got, exponent)
    assert np.array_equal(bits(expected), bits(device.download(got)))


@few
@given(size=st.integers(1, 40) | st.sampled_from((4096, 5000, 12_288)), seed=st.integers(0, 2**63))
def test_rotation_is_the_same_bit_for_bit(device: Device, size: int, seed: int) -> None:
    x = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    got = device.upload(x)
    hadamard.inverse(x, seed)
    launchers.inverse_rotation(device, got, seed)
    assert np.array_equal(bits(x), bits(device.download(got)))


@few
@given(
    size=st.integers(1, 2000) | st.integers(1, 40_000),
    fragments=st.integers(1, 40) | st.sampled_from((256, 257, MAX_FRAGMENTS)),
    seed=st.integers(0, 2**63),
)
def test_shares_come_back_to_their_places(device: Device, size: int, fragments: int, seed: int) -> None:
    """Beside the twin, which scatters one share after the other; every number is another one, so none is mistaken."""
    deal = Deal(size, fragments, seed)
    offsets = deal.offsets(np.random.default_rng(size).integers(0, fragments, deal.groups))
    shares = [np.arange(deal.places(offsets, f).size, dtype=np.float32) + 65536 * f for f in range(fragments)]
    expected = np.zeros(deal.padded, np.float32)
    for fragment, share in enumerate(shares):
        dealing.scatter(expected, share, deal, offsets, fragment)
    starts = np.cumsum([0] + [share.size for share in shares[:-1]]).astype(np.uint64)
    raster = device.zeros((size,), np.float32)
    there = [device.upload(array) for array in (np.concatenate(shares), starts, offsets.astype(np.uint16))]
    launchers.collect_shares(device, there[0], there[1], there[2], deal, raster)
    assert np.array_equal(expected[:size], device.download(raster))


@few
@given(size=st.integers(1, 3000), share=st.floats(0, 1), wide=st.booleans(), seed=SEED)
def test_numbers_are_put_to_their_positions(device: Device, size: int, share: float, wide: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    positions = np.sort(rng.permutation(size)[: int(share * size)]).astype(np.uint64 if wide else np.uint32)
    values, raster = (rng.standard_normal(n).astype(np.float32) for n in (positions.size, size))
    got = device.upload(raster)
    launchers.put_numbers(device, device.upload(positions), device.upload(values), got)
    raster[positions] = values
    assert np.array_equal(raster, device.download(got))


@few
@given(
    rows=st.integers(1, 80),
    columns=st.integers(1, 80) | st.sampled_from((128, 144, 200)),
    tile=st.sampled_from((1, 7, 33)) | st.sampled_from((8, 16, 32, 64)),
    dtype=DTYPE,
    seed=SEED,
)
def test_inverse_dct_is_scipys_within_rounding(
    device: Device, rows: int, columns: int, tile: int, dtype: str, seed: int
) -> None:
    coefficients = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    expected, got = outputs(device, (rows, columns), dtype)
    rounding.store(inverse_tiles(coefficients, tile), expected, 2)
    launchers.inverse_dct(device, device.upload(coefficients), got, 2, tile)
    ulp = {"F32": 2e-6, "F16": 2.0**-10, "BF16": 2.0**-7}[dtype]
    wide = device.download(got).view(DTYPES[dtype]).astype(np.float64)
    np.testing.assert_allclose(wide, expected.astype(np.float64), rtol=ulp, atol=8 * ulp)


def test_runs_of_several_tensors_share_one_launch(device: Device) -> None:
    """Steps that no accumulator takes together: each run from its own layer to its own, beside the Numba twin."""
    cases = [
        (dtype, held, layers)
        for dtype in ("BF16", "F16", "F32")
        for held in range(7)
        for layers in range(held + 1, lay.LOW + (dtype == "F32") + 1)
        if held < lay.LAYERS + (dtype == "F32")
    ]
    runs = [layers_of(dtype, 5 + 613 * (i % 5)) for i, (dtype, _, _) in enumerate(cases)]
    expected = Laid(HOST, runs, cases)
    got = Laid(device, runs, cases)
    assert not planes_launch.launch_on_cpu(expected.records).any()
    assert not planes_launch.launch(device, got.records).any()
    for case, a, b in zip(cases, expected.outs, got.outs, strict=True):
        assert np.array_equal(bits(a), bits(device.download(b))), case


@pytest.mark.parametrize("held", [0, 1, 5])
@settings(deadline=None, max_examples=15, derandomize=True)
@given(data=st.data())
def test_lying_offsets_are_found_before_anything_is_written(device: Device, data: st.DataObject, held: int) -> None:
    """A stream that is not as long as its planes ask for is named by both, and the kernel touches no weight."""
    case = ([layers_of("BF16", 5000)], [("BF16", held, lay.LAYERS)])
    laid, twin = Laid(device, *case), Laid(HOST, *case)
    before = bits(device.download(laid.outs[0]))
    streams = range(lay.STREAM_TAIL if held else 0, lay.STREAMS)
    stream, off = data.draw(st.sampled_from(streams)), data.draw(st.sampled_from((1, 8, 2**31, 2**32 - 1)))
    for records in (laid.records, twin.records):
        records["offsets"][0, stream, 1] = (int(records["offsets"][0, stream, 1]) + off) % 2**32
    assert planes_launch.launch(device, laid.records).tolist() == [stream + 1]
    # Streams of an earlier step were true: only what this step would have written is untouched.
    assert held == 1 or np.array_equal(bits(device.download(laid.outs[0])), before)
    assert planes_launch.launch_on_cpu(twin.records)[0] != 0


@pytest.mark.parametrize("codec", ["planes", "raw"])
def test_they_load_a_store_step_by_step(device: Device, codec: str) -> None:
    """The kernels under the whole pipeline: several threads, partial targets, refinement in place."""
    rng, store = np.random.default_rng(5), MemoryStore()
    model = {
        dtype: (0.05 * rng.standard_normal((2, 2050 + size))).astype(DTYPES[dtype])
        for size, dtype in enumerate(("BF16", "F16", "F32"))
    } | {"ids": np.arange(9)}
    holoray.encode(model, store, codec=codec)
    sealed = holoray.open(store)
    there, here = sealed.loader(device=device), sealed.loader()
    for target in (Target(fragments=(0,)), Target(quality=0.99), Target()):
        there.load(target)
        here.load(target)
        for name, array in here.state_dict().items():
            assert np.array_equal(bits(device.download(there.state_dict()[name])), bits(array))


def test_what_does_not_fit_is_refused() -> None:
    device, x = HOST, np.zeros(8, np.float32)
    with pytest.raises(UsageError, match="not float32"):
        launchers.store(device, x.astype(np.float64), np.zeros(8, np.float16), 0)
    with pytest.raises(UsageError, match="cannot be written"):
        launchers.store(device, x, np.zeros(8, np.int8), 0)
    with pytest.raises(UsageError, match="multiple of 16"):
        launchers.store(device, device.zeros((9,), np.float32)[1:], np.zeros(8, np.float16), 0)
    with pytest.raises(UsageError, match="thread block"):
        launchers.inverse_dct(device, x.reshape(1, 8), x.reshape(1, 8), 0, launchers.MAX_TILE + 1)
    deal, starts, offsets = Deal(8, 2, 0), np.zeros(2, np.uint64), np.zeros(1, np.uint16)
    with pytest.raises(UsageError, match="8 were dealt"):
        launchers.collect_shares(device, x[:7], starts, offsets, deal, x)
    with pytest.raises(UsageError, match="vector of 1 uint16"):
        launchers.collect_shares(device, x, starts, offsets.astype(np.int64), deal, x)
    with pytest.raises(UsageError, match="vector of 8 uint32"):
        launchers.put_numbers(device, np.zeros(8, np.int64), x, x)
    with pytest.raises(UsageError, match="cannot go"):
        planes_launch.kernels_for(3, 3)
    with pytest.raises(ValueError, match="impossible launch"):
        Geometry(0, 32)
