"""Loads that make weights of quantised layers on a device: those of the host, with no more than a layer beside them.

Layers come from known integers, packed by other code (`quantised_layers`), so the host is not the only oracle.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import nvcomp_stand_in
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from late_device import LateDevice
from on_cpu import COMPILER, NO_COMPILER, kernels_on_cpu
from quantised_checkpoints import corrupted, make_checkpoint, save_layers
from quantised_layers import Made, make_layer
from test_device_frames import count_groups
from typer.testing import CliRunner

import holoray
from holoray.checkpoint import save_checkpoint
from holoray.cli import main
from holoray.errors import CapacityError, FormatError, UsageError
from holoray.formats.quantised import Quantisation
from holoray.kernels.device import Device, Geometry
from holoray.kernels.device_accumulators import device_dtype
from holoray.pipelines import device_layers, encode, fragment_pipeline
from holoray.pipelines.api import load_file
from holoray.pipelines.fault_policy import FaultPolicy
from holoray.pipelines.sealed_store import SealedStore
from holoray.stores import MemoryStore
from holoray.tensor import DTYPES, Array, as_bytes

pytestmark = pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)
METHODS = ["gptq", "awq", "int8"]
FLOATS = {"bf16": "BF16", "f16": "F16", "f32": "F32"}


class KernelDevice(LateDevice):
    """A late device that has the kernels of `dequant`, which run as late as all else."""

    stream_address = 7

    def launch(self, module: str, kernel: str, geometry: Geometry, arguments: Sequence[np.generic]) -> None:
        if module == "dequant":
            self._stream.put(partial(kernels_on_cpu().launch, module, kernel, geometry, arguments))
        else:
            super().launch(module, kernel, geometry, arguments)


def encoded(source: Path, **options: Any) -> SealedStore:
    store = MemoryStore()
    holoray.encode(source, store, **options)
    return holoray.open(store)


def there(sealed: SealedStore, device: Device, dtype: str = "bf16", **options: Any) -> dict[str, Any]:
    return sealed.load(dequantise=dtype, device=device, **{"device_bytes": 1 << 30} | options)


def assert_same(got: dict[str, Any], expected: dict[str, Array]) -> None:
    """Names in their order, shapes, dtypes as a device has them, and every bit."""
    assert list(got) == list(expected)
    for name, array in expected.items():
        spec = holoray.TensorSpec.of(name, array)
        assert (got[name].shape, got[name].dtype) == (array.shape, device_dtype(spec))
        assert as_bytes(got[name]).tobytes() == as_bytes(array).tobytes(), name


def part_bytes(sealed: SealedStore) -> list[int]:
    """Of the tensors of each layer."""
    layers: dict[str, int] = {}
    for tensor in sealed.manifest.tensors:
        layer = tensor.name.rpartition(".")[0]
        if layer.endswith(".proj"):
            layers[layer] = layers.get(layer, 0) + tensor.spec.nbytes
    return list(layers.values())


@dataclass(frozen=True)
class Drawn:
    method: str
    config: dict[str, Any]
    layers: dict[str, Made]
    one_scale: bool


@st.composite
def checkpoints(draw: st.DrawFn) -> Drawn:
    """Up to four layers of one method: all packings and orders, shapes of little more than a tile, small stages."""
    method = draw(st.sampled_from(METHODS))
    bits = {"awq": 4, "int8": 8}.get(method) or draw(st.sampled_from((2, 4, 8)))
    offset, per_word = draw(st.sampled_from((0, 1))), 32 // bits
    group = draw(st.sampled_from((8, 32, 64)))
    one_scale = method == "int8" and draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale_dtype = DTYPES[draw(st.sampled_from(("F32", "F16", "BF16")))]
    layers: dict[str, Made] = {}
    for n in range(draw(st.integers(1, 4))):
        rows = draw(st.integers(1, 6)) * (1 if method == "int8" else per_word)
        columns = draw(st.integers(1, 5)) * (per_word if method == "gptq" else group if method == "int8" else 7)
        made = make_layer(
            method,
            rng,
            bits=bits,
            rows=rows,
            columns=columns,
            group=columns if one_scale else min(group, columns),
            zero_offset=offset,
            ordered=method != "awq" and draw(st.booleans()),
            scale_dtype=scale_dtype,
            with_zeros=draw(st.booleans()),
        )
        if one_scale:
            made.scales[:] = made.scales[0]
            if made.zeros is not None:
                made.zeros[:] = made.zeros[0]
                made.zero_integers[:] = made.zero_integers[:, :1]
        layers[f"model.layers.{n}.proj"] = made
    configs: dict[str, dict[str, Any]] = {
        "gptq": {"quant_method": "gptq", "bits": bits, "group_size": group, "format": ("gptq_v2", "gptq")[offset]},
        "awq": {"quant_method": "awq", "bits": 4, "group_size": group},
        "int8": {"quant_method": "compressed-tensors", "format": "int-quantized"},
    }
    return Drawn(method, configs[method], layers, one_scale)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(drawn=checkpoints(), dtype=st.sampled_from(list(FLOATS)))
def test_weights_are_those_of_the_host_and_of_what_was_packed(drawn: Drawn, dtype: str) -> None:
    embed = np.arange(-32, 32, dtype=np.float32).reshape(8, 8)
    with tempfile.TemporaryDirectory() as folder:
        save_layers(Path(folder), drawn.layers, {"model.embed": embed}, drawn.config, one_scale=drawn.one_scale)
        sealed = encoded(Path(folder))
    got = there(sealed, KernelDevice(), dtype)
    assert_same(got, sealed.load(dequantise=dtype))
    for name, made in drawn.layers.items():
        assert as_bytes(got[f"{name}.weight"]).tobytes() == made.expected(DTYPES[FLOATS[dtype]]).tobytes()
    assert np.array_equal(got["model.embed"], embed)


@pytest.mark.parametrize("method", METHODS)
def test_no_more_than_the_largest_layer_lies_beside_the_weights(method: str, tmp_path: Path) -> None:
    """Counted to the byte: `raw` takes nothing for a moment, so what was planned is all."""
    make_checkpoint(tmp_path, method, layers=8, rows=256)
    sealed = encoded(tmp_path, codec="raw")
    expected, parts = sealed.load(dequantise="bf16"), part_bytes(sealed)
    final = sum(array.nbytes for array in expected.values())
    least = final + max(parts)
    device = KernelDevice()
    got = there(sealed, device)
    assert final < device.peak_bytes <= least < final + sum(parts) / 4
    assert_same(there(sealed, KernelDevice(), device_bytes=least), expected)
    with pytest.raises(CapacityError, match="on the device") as caught:
        there(sealed, KernelDevice(), device_bytes=least - 1)
    assert "device_bytes" in caught.value.hint
    gc.collect()
    assert device.used_bytes == sum(array.nbytes for array in got.values()) == final


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers of three tensors each stage had."""
    seen: list[int] = []
    finish = device_layers.DeviceLayers.finish

    def note(self: Any, held: Any) -> None:
        seen.append(len(self._parts) // 3)
        finish(self, held)

    monkeypatch.setattr(device_layers.DeviceLayers, "finish", note)
    return seen


def awq_layers(folder: Path, rows: Sequence[int]) -> SealedStore:
    rng = np.random.default_rng(1)
    layers = {f"l{n:03}.proj": make_layer("awq", rng, rows=r, columns=64) for n, r in enumerate(rows)}
    save_layers(folder, layers, {}, {"quant_method": "awq", "bits": 4, "group_size": 8})
    return encoded(folder)


def test_small_layers_share_a_stage(tmp_path: Path, stages: list[int]) -> None:
    """As many as take what the largest takes."""
    there(awq_layers(tmp_path, (8, 8, 32, 8, 8, 8)), KernelDevice())
    assert stages == [2, 1, 3]


def test_stages_are_a_small_share_of_the_weights_where_there_is_room(tmp_path: Path, stages: list[int]) -> None:
    sealed = awq_layers(tmp_path, [8] * 80)
    (part, *_), final, device = part_bytes(sealed), 80 * 8 * 64 * 2, KernelDevice()
    expected = there(sealed, device)
    assert set(stages[:-1]) == {final // 32 // part} == {6}
    assert device.peak_bytes <= final + final // 32
    for spare in (0, 2 * part):
        stages.clear()
        device = KernelDevice()
        got = there(sealed, device, device_bytes=final + part + spare)
        assert {name: array.tobytes() for name, array in got.items()} == {n: a.tobytes() for n, a in expected.items()}
        assert set(stages[:-1]) == {1 + spare // part}
        assert device.peak_bytes <= final + part + spare


@pytest.fixture
def by_older_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders that did not know layers: large scales are `planes`, and not mandatory."""
    monkeypatch.setattr(encode, "find_quantisation", lambda *_: Quantisation("", (), ()))


def test_a_layer_that_is_not_whole_stays_zeros(tmp_path: Path, by_older_versions: None) -> None:
    made, _ = make_checkpoint(tmp_path, "gptq", rows=1024)
    sealed = encoded(tmp_path)
    assert not sealed.entry("model.layers.0.proj.scales").mandatory
    got = there(sealed, KernelDevice(), fragments=[0])
    assert_same(got, sealed.load(fragments=[0], dequantise="bf16"))
    assert not any(got[f"{name}.weight"].any() for name in made)
    assert got["model.embed.weight"].any()
    assert_same(there(sealed, KernelDevice()), sealed.load(dequantise="bf16"))
    changes = [t.name.rpartition(".")[0] for t in sealed.manifest.tensors]
    assert sum(a != b for a, b in pairwise(changes)) >= len(set(changes)), "layers lie apart in the store"


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_with_a_corrupt_tensor_stays_zeros(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holoray.pipelines.loader.check_mandatory", lambda *_: None)
    make_checkpoint(tmp_path, method)
    store = corrupted(tmp_path, "0.proj.weight" if method == "int8" else "0.proj.qweight", 0)
    sealed = holoray.open(store, fault_policy=FaultPolicy(skip_corrupted=True))
    got = there(sealed, KernelDevice())
    assert_same(got, sealed.load(dequantise="bf16"))
    assert not got["model.layers.0.proj.weight"].any()
    assert got["model.layers.1.proj.weight"].any()


@pytest.mark.fault("malformed")
def test_a_group_that_does_not_exist_is_found_before_a_kernel_reads_it(tmp_path: Path) -> None:
    _, tensors = make_checkpoint(tmp_path, "gptq")
    tensors["model.layers.1.proj.g_idx"][5] = 99
    save_checkpoint(tmp_path / "model.safetensors", tensors)
    device = KernelDevice()
    with pytest.raises(FormatError, match="beyond the 5") as caught:
        there(encoded(tmp_path), device)
    assert caught.value.tensor == "model.layers.1.proj.g_idx"


@pytest.mark.fault("no-device-memory")
@pytest.mark.parametrize("lacks", [lambda nbytes: nbytes == 128 * 160 // 2, lambda nbytes: nbytes == 4 * 160])
def test_a_device_with_less_memory_than_promised_says_so(lacks: Callable[[int], bool], tmp_path: Path) -> None:
    """For the integers of a layer, and for its order when the kernels are to run; nothing is left there."""
    make_checkpoint(tmp_path, "gptq", rows=128)
    sealed, device = encoded(tmp_path), KernelDevice()
    device.lack = lacks
    with pytest.raises(CapacityError, match="no room"):
        there(sealed, device)
    gc.collect()
    assert device.used_bytes == 0
    device.lack = lambda nbytes: False
    assert_same(there(sealed, device), sealed.load(dequantise="bf16"))


def test_frames_are_opened_there_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcomp_stand_in.install(monkeypatch)
    groups = count_groups(monkeypatch)
    rng = np.random.default_rng(2)
    made = make_layer("int8", rng, bits=8, rows=64, columns=512, group=512, ordered=True)
    few = replace(made, q=made.q & 1)
    save_layers(tmp_path, {"l.proj": few}, {"ids": np.arange(9_000)}, {"quant_method": "compressed-tensors"})
    sealed = encoded(tmp_path, codec="raw")
    frames = sum(f.compression == "zstd" for t in sealed.manifest.tensors for f in t.fragments)
    assert_same(there(sealed, KernelDevice(), decompress="device"), sealed.load(dequantise="bf16"))
    assert sum(groups) == frames - 1 > 0  # the order is opened, and looked at, on the host
    with pytest.raises(UsageError, match="no device"):
        sealed.load(dequantise="bf16", decompress="device")


def test_kernels_of_both_kinds_beside_each_other(tmp_path: Path) -> None:
    """The text of all kernels, `planes` among them, on one device."""
    make_checkpoint(tmp_path, "awq")
    sealed = encoded(tmp_path)
    assert_same(there(sealed, kernels_on_cpu()), sealed.load(dequantise="bf16"))


def test_a_file_is_made_on_the_host_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holoray.cli.load.open_device", lambda name: LateDevice())
    monkeypatch.setattr(fragment_pipeline, "MIN_BATCH_BYTES", 8 << 10)
    make_checkpoint(tmp_path, "gptq")
    holoray.encode(tmp_path, tmp_path / "store")
    arguments = ["load", tmp_path / "store", tmp_path / "there", "--dequantise", "f16", "--device", "cuda"]
    result = CliRunner().invoke(main.app, [*map(str, arguments), "--device-bytes", str(1 << 29)])
    assert result.exit_code == 0, result.stderr
    load_file(holoray.open(tmp_path / "store"), tmp_path / "here", dequantise="f16")
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()
