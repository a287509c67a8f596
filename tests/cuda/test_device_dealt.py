"""`spectral`, `projection` and `lowrank` on a device, beside the same on the CPU.

The parity matrix has them too; here is what it has not: small and large tiles, states of both kinds side by side,
weights that are made in between. With `pytest -m gpu` all of it runs on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from on_cpu import CpuDevice

from holoray.codecs import get_codec
from holoray.errors import FormatError, UsageError
from holoray.fragment import Fragment, TensorEntry
from holoray.kernels import registry
from holoray.kernels.accumulator import Accumulator
from holoray.kernels.device import Device
from holoray.kernels.device_accumulators import device_dtype
from holoray.kernels.launchers import MAX_TILE
from holoray.kernels.registry import make_accumulator, make_device_accumulator
from holoray.kernels.scratch import Scratch
from holoray.pipelines.tensor_codec import encode_tensor
from holoray.tensor import DTYPES, Array, as_bytes

ROWS, COLUMNS, FRAGMENTS = 67, 131, 6
CODECS: Final[dict[str, dict[str, Any]]] = {
    "whole": {"codec": "spectral"},
    "whole, half, essential": {"codec": "spectral", "coefficients": "float16", "essential": 0.3},
    "small tiles": {"codec": "spectral", "tile": 31},
    "largest of our tiles, essential": {"codec": "spectral", "tile": MAX_TILE, "essential": 0.3},
    "larger tiles": {"codec": "spectral", "tile": MAX_TILE + 1},
    "tiles wider than the matrix": {"codec": "spectral", "tile": 200},
    "projection": {"codec": "projection"},
    "projection, half, essential": {"codec": "projection", "coefficients": "float16", "essential": 0.3},
    "lowrank": {"codec": "lowrank"},
    "lowrank, half, essential": {"codec": "lowrank", "coefficients": "float16", "essential": 0.3},
    "lowrank, truncated": {"codec": "lowrank", "rank": 3},
    "more fragments than terms": {"codec": "lowrank", "rank": 4, "fragments": 9},
}
ULP: Final = {"F32": 2e-6, "F16": 2.0**-10, "BF16": 2.0**-7}
few = settings(deadline=None, max_examples=4, derandomize=True)
cells = pytest.mark.parametrize("name", CODECS)
states = pytest.mark.parametrize("name", [name for name in CODECS if "tiles" not in name])
DTYPE = st.sampled_from(tuple(ULP))
Encoded = tuple[TensorEntry, list[Fragment]]


@cache
def encoded(name: str, dtype: str) -> Encoded:
    array = (0.05 * np.random.default_rng(7).standard_normal((ROWS, COLUMNS))).astype(DTYPES[dtype])
    entry, fragments = encode_tensor(array, **({"fragments": FRAGMENTS, "seed": 3} | CODECS[name]))
    assert entry.codec == CODECS[name]["codec"]
    return entry, fragments


def fresh(entry: TensorEntry, device: Device | None) -> Accumulator:
    """An accumulator on the device, or on the CPU."""
    codec = get_codec(entry.codec, entry.config)
    if device is None:
        return make_accumulator(entry.spec, codec, np.zeros(entry.spec.shape, entry.spec.numpy_dtype))
    out = device.zeros(entry.spec.shape, device_dtype(entry.spec))
    return make_device_accumulator(entry.spec, codec, out, device)


def add(accumulator: Accumulator, source: Encoded, indices: Iterable[int]) -> Accumulator:
    entry, fragments = source
    scratch = Scratch()
    for index in indices:
        known = entry.fragments[index]
        raw = accumulator.decompress([known], [memoryview(fragments[index].payload)], scratch)
        accumulator.accumulate(known.slot, raw, scratch)
    return accumulator


def weights(accumulator: Accumulator, device: Device | None) -> Array:
    accumulator.finalize()
    out = accumulator.out if device is None else device.download(accumulator.out)
    return out.view(accumulator.spec.numpy_dtype).copy()


def bits(array: Array) -> npt.NDArray[np.uint8]:
    return as_bytes(np.ascontiguousarray(array))


def split(data: st.DataObject, count: int) -> tuple[list[int], list[int]]:
    order = list(data.draw(st.permutations(range(count))))
    at = data.draw(st.integers(0, count))
    return order[:at], order[at:]


@cells
@few
@given(data=st.data(), dtype=DTYPE)
def test_subsets_give_what_the_cpu_gives(device: Device, data: st.DataObject, name: str, dtype: str) -> None:
    """Bit for bit for `projection`, whose kernel sums in the order of the CPU; else within rounding."""
    source = encoded(name, dtype)
    some, _ = split(data, len(source[1]))
    here, there = (add(fresh(source[0], where), source, some) for where in (None, device))
    expected, got = weights(here, None), weights(there, device)
    if source[0].codec == "projection":
        assert np.array_equal(bits(expected), bits(got))
    largest = float(np.max(np.abs(expected.astype(np.float64)), initial=0.0))
    ulp = ULP[dtype]
    np.testing.assert_allclose(got.astype(np.float64), expected.astype(np.float64), rtol=ulp, atol=ulp * largest)
    for slot in {source[0].fragments[i].slot for i in some}:
        assert np.array_equal(here.read_slot(slot), there.read_slot(slot))
        assert here.slot_nbytes(slot) == there.slot_nbytes(slot) == there.read_slot(slot).nbytes


@states
@few
@given(data=st.data(), dtype=DTYPE)
def test_weights_made_in_between_change_nothing(device: Device, data: st.DataObject, name: str, dtype: str) -> None:
    source = encoded(name, dtype)
    some, rest = split(data, len(source[1]))
    refined = add(fresh(source[0], device), source, some)
    first = weights(refined, device)
    assert np.array_equal(bits(first), bits(weights(refined, device)))
    got = weights(add(refined, source, rest + some), device)
    assert np.array_equal(bits(got), bits(weights(add(fresh(source[0], device), source, some + rest), device)))


@states
@few
@given(data=st.data(), dtype=DTYPE)
def test_slots_travel_between_cpu_and_device(device: Device, data: st.DataObject, name: str, dtype: str) -> None:
    """Whatever a state looks like inside, a slot that travels is the same bytes."""
    source = encoded(name, dtype)
    some, rest = split(data, len(source[1]))
    for giver, taker in ((None, device), (device, None)):
        sender, receiver = add(fresh(source[0], giver), source, some), fresh(source[0], taker)
        for slot in (source[0].fragments[i].slot for i in some):
            receiver.write_slot(slot, sender.read_slot(slot).copy())
            receiver.resume(slot, 1)
        got = weights(add(receiver, source, rest), taker)
        assert np.array_equal(bits(got), bits(weights(add(fresh(source[0], taker), source, some + rest), taker)))


@pytest.mark.parametrize("name", [name for name in CODECS if "essential" in name])
def test_essential_parts_that_differ_are_refused(device: Device, name: str) -> None:
    source = encoded(name, "F32")
    accumulator = add(fresh(source[0], device), source, [0])
    known, scratch = source[0].fragments[1], Scratch()
    raw = bytearray(accumulator.decompress([known], [memoryview(source[1][1].payload)], scratch))
    head = get_codec(source[0].codec, source[0].config).essential_nbytes(source[0].spec)  # type: ignore[attr-defined]
    raw[head - 1] ^= 1
    with pytest.raises(FormatError, match="essential part"):
        accumulator.accumulate(known.slot, bytes(raw), scratch)


def test_small_tiles_are_ours_and_large_ones_the_librarys(device: Device) -> None:
    if not isinstance(device, CpuDevice):
        pytest.skip("only the CPU's device keeps a record of launches")
    small = ("small tiles", "largest of our tiles, essential")
    for name in (*small, "larger tiles", "whole"):
        device.launches.clear()
        source = encoded(name, "BF16")
        weights(add(fresh(source[0], device), source, [0]), device)
        ran = {kernel for kernel, _ in device.launches}
        assert ("cast_weights" in ran) == (name not in small)
        assert any(kernel.startswith("inverse_dct") for kernel in ran) == (name in small)


def test_a_codec_that_no_device_has_is_refused(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(registry.DEVICE_ACCUMULATORS, "lowrank")
    with pytest.raises(UsageError, match="not accumulated on a device"):
        fresh(encoded("lowrank", "F32")[0], device)
