"""Quantised layers to floats: the Numba twin, and the kernel on the CPU (with `pytest -m gpu` on a GPU), bit for bit.

Both are held against layers that were packed from known integers by other code: `quantised_layers`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from on_cpu import COMPILER, NO_COMPILER, CpuDevice, kernels_on_cpu
from quantised_layers import Made, layers, make_layer

from holoray.errors import FormatError, UsageError
from holoray.kernels import dequant, launchers
from holoray.kernels.device import Device
from holoray.tensor import DTYPES, Array

ON_CPU = pytest.param("cpu", marks=pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER))
ON_GPU = pytest.param("gpu", marks=pytest.mark.gpu)
FLOATS = ("F32", "F16", "BF16")
SCALES = [DTYPES[name] for name in FLOATS]
HOST = CpuDevice(None)


@pytest.fixture(scope="module", params=[ON_CPU, ON_GPU])
def device(request: pytest.FixtureRequest) -> Device:
    if request.param == "cpu":
        return kernels_on_cpu()
    from holoray.kernels.cuda.device import CudaDevice

    return CudaDevice()


def on_host(made: Made, dtype: str) -> Array:
    out = np.full((made.packing.rows, made.packing.columns), 7, DTYPES[dtype])
    dequant.dequantise(made.packing, made.q, made.scales, made.zeros, made.order, out)
    return out


def on_device(device: Device, made: Made, dtype: str) -> Array:
    out = device.zeros((made.packing.rows, made.packing.columns), np.uint16 if dtype == "BF16" else DTYPES[dtype])
    scales = made.scales.view(np.uint16) if made.scales.dtype == DTYPES["BF16"] else made.scales
    zeros = None if made.zeros is None else device.upload(made.zeros)
    launchers.dequantise(device, made.packing, device.upload(made.q), device.upload(scales), zeros, made.order, out)
    return device.download(out).view(DTYPES[dtype])


def bits(array: Array) -> npt.NDArray[Any]:
    return array.reshape(-1).view(f"u{array.itemsize}")


@settings(deadline=None, max_examples=80, derandomize=True)
@given(made=layers(SCALES), dtype=st.sampled_from(FLOATS))
def test_the_twin_gives_what_was_packed(made: Made, dtype: str) -> None:
    assert np.array_equal(bits(on_host(made, dtype)), bits(made.expected(DTYPES[dtype])))


@settings(deadline=None, max_examples=30, derandomize=True)
@given(made=layers(SCALES), dtype=st.sampled_from(FLOATS))
def test_the_kernel_gives_what_was_packed(device: Device, made: Made, dtype: str) -> None:
    assert np.array_equal(bits(on_device(device, made, dtype)), bits(made.expected(DTYPES[dtype])))


@pytest.mark.parametrize("method", ["gptq", "awq", "int8"])
def test_layers_of_many_tiles(device: Device, method: str) -> None:
    """More rows and columns than a tile of the twin (64 x 4,096) and than all blocks of a launch take at once."""
    rng = np.random.default_rng(3)
    made = make_layer(method, rng, bits=8 if method == "int8" else 4, rows=136, columns=4096 + 200, group=128)
    expected = bits(made.expected(DTYPES["BF16"]))
    assert np.array_equal(bits(on_host(made, "BF16")), expected)
    assert np.array_equal(bits(on_device(device, made, "BF16")), expected)


def test_one_word_by_hand() -> None:
    """Both sides could share a misreading: the words of the formats' descriptions, in hexadecimal."""
    out = np.zeros((8, 8), np.float32)
    ones = np.ones((1, 8), np.float32)
    gptq = make_layer("gptq", np.random.default_rng(0)).packing
    lines = np.zeros((1, 8), np.int32)
    lines[0, 2] = 0x76543210  # output 2: inputs 0 to 7
    dequant.dequantise(gptq, lines, ones, np.array([[-1]], np.int32), None, out)  # 15 stored is a zero of 0
    assert out[2].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    dequant.dequantise(replace(gptq, zero_offset=0), lines, ones, np.array([[0x00000300]], np.int32), None, out)
    assert out[2].tolist() == [-3, -2, -1, 0, 1, 2, 3, 4]
    awq = make_layer("awq", np.random.default_rng(0)).packing
    lines = np.zeros((8, 1), np.int32)
    lines[5] = 0x76543210  # input 5: nibbles hold outputs 0, 2, 4, 6, 1, 3, 5, 7
    dequant.dequantise(awq, lines, ones, np.zeros((1, 1), np.int32), None, out)
    assert out[:, 5].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_kind_of_float_is_rounded_as_by_the_dtype(dtype: str) -> None:
    """int8 of 1 and any scale: 2^20 float32 of all sizes, ties, subnormals, infinities and NaN."""
    rng = np.random.default_rng(11)
    scales = rng.integers(0, 2**32, (1 << 18, 1), np.uint64).astype(np.uint32).view(np.float32)
    halves = np.arange(1 << 16, dtype=np.uint16).view(DTYPES[dtype]).astype(np.float32)[:, None]
    near = halves.view(np.uint32) + np.array([[-1, 0, 1, 1 << 12, (1 << 12) + 1, 1 << 15]], np.int32).view(np.uint32)
    scales = np.concatenate([scales, near.view(np.float32).reshape(-1, 1)])
    made = make_layer("int8", rng, rows=scales.size, columns=1, group=1, with_zeros=False)
    ones = replace(made, q=np.ones_like(made.q), scales=scales, integers=np.ones_like(made.integers))
    got, expected = on_host(ones, dtype), ones.expected(DTYPES[dtype])
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(got), nan)
    assert np.array_equal(bits(got[~nan]), bits(expected[~nan]))


def test_scales_without_end_are_no_trap(device: Device) -> None:
    made = make_layer("gptq", np.random.default_rng(1), rows=16, columns=64)
    scales = made.scales.copy()
    scales[0, :3] = np.inf, np.nan, -65504
    hostile = replace(made, scales=scales)
    expected = hostile.expected(np.float16)
    for got in (on_host(hostile, "F16"), on_device(device, hostile, "F16")):
        assert np.array_equal(got, expected, equal_nan=True)


def test_consecutive_groups_that_are_spelt_out_change_nothing() -> None:
    made = make_layer("gptq", np.random.default_rng(2), rows=8, columns=64, group=16)
    spelt = np.arange(64, dtype=np.int32) // 16
    assert dequant.check_order(made.packing, spelt) is None
    assert np.array_equal(on_host(replace(made, order=spelt), "F32"), on_host(made, "F32"))


def test_groups_that_nobody_has_set_are_consecutive() -> None:
    """compressed-tensors writes -1 then; to GPTQ it is a group that does not exist."""
    made = make_layer("int8", np.random.default_rng(2), rows=8, columns=64, group=16)
    unset = np.full(64, -1, np.int32)
    assert np.array_equal(on_host(replace(made, order=unset), "F32"), on_host(made, "F32"))


@pytest.mark.parametrize("bad", [-1, 2, 2**31 - 1])
def test_groups_that_do_not_exist_are_found_before_they_are_read(bad: int) -> None:
    made = make_layer("gptq", np.random.default_rng(2), rows=8, columns=16, group=8)
    order = np.zeros(16, np.int32)
    order[7] = bad
    for run in (on_host, lambda made, dtype: on_device(HOST, made, dtype)):
        with pytest.raises(FormatError, match="beyond the 2"):
            run(replace(made, order=order), "F32")
    assert HOST.launches == []


def test_arrays_that_do_not_fit_are_refused() -> None:
    made = make_layer("gptq", np.random.default_rng(2), rows=8, columns=16)
    for wrong in (
        replace(made, q=made.q[:, :4]),
        replace(made, q=made.q.astype(np.int64)),
        replace(made, scales=made.scales.astype(np.float64)),
        replace(made, zeros=None),
        replace(made, order=np.zeros(3, np.int32)),
        replace(made, packing=replace(made.packing, method="nf4")),
    ):
        for run in (on_host, lambda made, dtype: on_device(HOST, made, dtype)):
            with pytest.raises(UsageError):
                run(wrong, "F32")
    with pytest.raises(UsageError, match="contiguous"):
        on_host(replace(made, q=np.asfortranarray(made.q)), "F32")
    with pytest.raises(UsageError, match="int8"):
        dequant.dequantise(made.packing, made.q, made.scales, made.zeros, None, np.zeros((8, 16), np.int8))
