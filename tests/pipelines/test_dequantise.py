"""Quantised checkpoints through a store: the very same tensors, or the weights that they stand for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantised_checkpoints import GPTQ_CONFIG, corrupted, make_checkpoint
from quantised_layers import Made

import holoray
from holoray.checkpoint import open_checkpoint, save_checkpoint
from holoray.errors import FormatError, QualityError, UsageError
from holoray.formats.quantised import CONFIG_KEY
from holoray.formats.safetensors import SafetensorsFile
from holoray.pipelines import fragment_pipeline, loader
from holoray.pipelines.api import load_file
from holoray.pipelines.dequantise import Dequantised
from holoray.pipelines.fault_policy import FaultPolicy
from holoray.pipelines.fragment_pipeline import FragmentPipeline
from holoray.pipelines.plan import units
from holoray.pipelines.sealed_store import SealedStore
from holoray.stores import MemoryStore
from holoray.tensor import DTYPES, Array

METHODS = ["gptq", "awq", "int8"]
FLOATS = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
Checkpoint = tuple[Path, dict[str, Made], dict[str, Array]]


@pytest.fixture(scope="module", params=METHODS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp(request.param)
    return (folder, *make_checkpoint(folder, request.param))


def encoded(source: Path, **options: Any) -> SealedStore:
    store = MemoryStore()
    holoray.encode(source, store, **options)
    return holoray.open(store)


def read_all(path: Path) -> dict[str, Array]:
    file = SafetensorsFile(path)
    return {spec.name: file.read(spec.name) for spec in file.specs}


def same(got: dict[str, Array], expected: dict[str, Array]) -> bool:
    return got.keys() == expected.keys() and all(
        (got[n].dtype, got[n].shape, got[n].tobytes()) == (a.dtype, a.shape, a.tobytes()) for n, a in expected.items()
    )


def as_floats(made: dict[str, Made], tensors: dict[str, Array], dtype: str) -> dict[str, Array]:
    """What a dequantising load has to give."""
    others = {name: array for name, array in tensors.items() if name.rpartition(".")[0] not in made}
    return others | {f"{name}.weight": layer.expected(DTYPES[FLOATS[dtype]]) for name, layer in made.items()}


def test_without_the_option_the_very_same_tensors_come_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, _, tensors = checkpoint
    sealed = encoded(folder)
    assert same(sealed.load(), tensors)
    load_file(sealed, tmp_path / "out.safetensors")
    assert same(read_all(tmp_path / "out.safetensors"), tensors)
    again = open_checkpoint(tmp_path / "out.safetensors")  # the file says itself how it is packed
    assert json.loads(again.metadata[CONFIG_KEY]) == json.loads(sealed.manifest.metadata[CONFIG_KEY])


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_layers_are_stored_raw_and_first_and_are_no_larger(method: str, tmp_path: Path) -> None:
    """Also scales of more elements than are mandatory anyway, so that the lowest target has every layer whole."""
    made, tensors = make_checkpoint(tmp_path, method, rows=1024, layers=1)
    sealed = encoded(tmp_path)
    for tensor in sealed.manifest.tensors:
        if tensor.name.rpartition(".")[0] in made:
            assert (tensor.codec, tensor.mandatory) == ("raw", True)
            assert tensor.stored_bytes <= tensors[tensor.name].nbytes
    got = sealed.load(fragments=[0], dequantise="bf16")
    assert got["model.embed.weight"].tobytes() != tensors["model.embed.weight"].tobytes()
    for name, layer in made.items():
        assert got[f"{name}.weight"].tobytes() == layer.expected(DTYPES["BF16"]).tobytes()


@pytest.mark.parametrize("dtype", FLOATS)
def test_layers_become_weights(checkpoint: Checkpoint, dtype: str, tmp_path: Path) -> None:
    folder, made, tensors = checkpoint
    sealed, expected = encoded(folder), as_floats(made, tensors, dtype)
    assert same(sealed.load(dequantise=dtype), expected)
    seen: list[str] = []
    report = load_file(
        sealed, tmp_path / "out", None, lambda tensor, index, quality: seen.append(tensor), dequantise=dtype
    )
    assert same(read_all(tmp_path / "out"), expected)
    assert report.quality == 1
    assert set(seen) == tensors.keys()
    assert SafetensorsFile(tmp_path / "out").metadata == {"format": "pt"}  # which nobody takes for packed any more


def test_the_command_line_does_the_same(tmp_path: Path) -> None:
    made, tensors = make_checkpoint(tmp_path, "gptq")

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "holoray", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    holoray.encode(tmp_path, tmp_path / "store")
    done = run("load", tmp_path / "store", tmp_path / "out", "--dequantise", "f16", "--json")
    assert done.returncode == 0, done.stderr
    assert same(read_all(tmp_path / "out"), as_floats(made, tensors, "f16"))
    told = json.loads(run("inspect", tmp_path / "store", "--json").stdout)["quantised"]
    assert told["layers"] == [{"packing": "gptq", "bits": 4, "group": 32, "count": 2}]
    assert (told["method"], told["faults"]) == ("gptq", [])
    assert "quantised: 2 layers of gptq, 4 bits, a scale for 32 inputs" in run("inspect", tmp_path / "store").stderr


def test_a_cast_of_the_checkpoint_leaves_scales_alone(checkpoint: Checkpoint) -> None:
    folder, made, _ = checkpoint
    sealed = encoded(folder, dtype="bf16")
    got = sealed.load(dequantise="f32")
    for name, layer in made.items():
        assert got[f"{name}.weight"].tobytes() == layer.expected(np.float32).tobytes()
    assert got["model.norm.weight"].dtype == DTYPES["BF16"]


def test_tensors_of_a_layer_come_one_after_another(tmp_path: Path) -> None:
    """In the file all scales follow all integers: read in that order, every layer would wait in memory."""
    make_checkpoint(tmp_path, "gptq", layers=8)
    manifest = encoded(tmp_path).manifest
    work = units(manifest, [(t, f.index) for t, tensor in enumerate(manifest.tensors) for f in tensor.fragments])
    ordered = Dequantised(manifest, "bf16", check=False).order(work)
    assert sorted(map(id, ordered)) == sorted(map(id, work))
    names = [manifest.tensors[unit.tensor].name.rpartition(".")[0] for unit in ordered]
    changes = sum(a != b for a, b in pairwise(names))
    assert changes == len(set(names)) - 1
    ranks = [manifest.tensors[unit.tensor].mandatory for unit in ordered]
    assert ranks == sorted(ranks, reverse=True)


def test_few_layers_are_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of layers that are open or wait for others, while layers of more than a batch each go by."""
    make_checkpoint(tmp_path, "awq", layers=24, rows=256)
    sealed = encoded(tmp_path)
    alive: dict[str, int] = {}
    seen: list[int] = []
    opened, used = loader.FileDestination.open, Dequantised.weight_of

    def counting_open(self: Any, tensor: int) -> Any:
        accumulator = opened(self, tensor)
        if ".proj." in accumulator.spec.name:
            alive[accumulator.spec.name] = accumulator.spec.nbytes
            seen.append(sum(list(alive.values())))
        return accumulator

    def counting_use(self: Any, layer: Any, tensors: Any) -> Any:
        weight = used(self, layer, tensors)
        for name in layer.tensors:
            del alive[name]
        return weight

    monkeypatch.setattr(fragment_pipeline, "MAX_BATCH_BYTES", 16 << 10)
    monkeypatch.setattr(loader.FileDestination, "open", counting_open)
    monkeypatch.setattr(Dequantised, "weight_of", counting_use)
    monkeypatch.setattr(loader, "FragmentPipeline", partial(FragmentPipeline, cores=2))
    load_file(sealed, tmp_path / "out", dequantise="bf16")
    layer = sum(t.spec.nbytes for t in sealed.manifest.tensors if ".0.proj." in t.name)
    assert max(seen) <= 8 * layer  # three batches of up to two layers, and what waits for one of them


def damaged(folder: Path, method: str, change: Callable[[dict[str, Array]], None]) -> SealedStore:
    _, tensors = make_checkpoint(folder, method)
    change(tensors)
    save_checkpoint(folder / "model.safetensors", tensors)
    return encoded(folder)


@pytest.mark.fault("malformed")
def test_a_group_that_does_not_exist_is_a_format_error(tmp_path: Path) -> None:
    def change(tensors: dict[str, Array]) -> None:
        tensors["model.layers.1.proj.g_idx"][5] = 99

    sealed = damaged(tmp_path, "gptq", change)
    with pytest.raises(FormatError, match="beyond the 5") as caught:
        load_file(sealed, tmp_path / "out", dequantise="bf16")
    assert caught.value.tensor == "model.layers.1.proj.g_idx"
    assert not (tmp_path / "out").exists()
    assert len(sealed.load()) == 9  # as stored they can still be had


@pytest.mark.fault("malformed")
def test_a_layer_that_lacks_a_tensor_is_told_before_anything_is_read(tmp_path: Path) -> None:
    sealed = damaged(tmp_path, "awq", lambda tensors: tensors.__delitem__("model.layers.0.proj.qzeros"))
    with pytest.raises(FormatError, match="qzeros is missing") as caught:
        sealed.load(dequantise="bf16")
    assert caught.value.tensor == "model.layers.0.proj.qzeros"


def test_an_encode_says_at_once_what_cannot_become_floats(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "gptq", config=GPTQ_CONFIG | {"bits": 3})
    (note,) = holoray.encode(tmp_path, MemoryStore()).notes
    assert note.startswith("2 quantised layers load only as they are stored: gptq with 3 bits is not supported")


def test_what_cannot_be_dequantised_is_refused(tmp_path: Path) -> None:
    store = MemoryStore()
    holoray.encode({"w": np.ones((4, 4), np.float32)}, store)
    with pytest.raises(UsageError, match="no quantised layers"):
        holoray.open(store).load(dequantise="bf16")
    make_checkpoint(tmp_path, "gptq")
    with pytest.raises(UsageError, match="unknown dtype 'int4'"):
        encoded(tmp_path).load(dequantise="int4")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(UsageError, match="'bitsandbytes' is not supported"):
        encoded(tmp_path).load(dequantise="bf16")


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_with_a_corrupt_tensor_is_zeros(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Corrupt integers would be read as zeros, and stand for weights of -zero * scale: were they not mandatory."""
    monkeypatch.setattr("holoray.pipelines.loader.check_mandatory", lambda *_: None)
    made, _ = make_checkpoint(tmp_path, method)
    store = corrupted(tmp_path, "0.proj.weight" if method == "int8" else "0.proj.qweight", 0)
    got = holoray.open(store, fault_policy=FaultPolicy(skip_corrupted=True)).load(dequantise="bf16")
    assert not got["model.layers.0.proj.weight"].any()
    expected = made["model.layers.1.proj"].expected(DTYPES["BF16"])
    assert got["model.layers.1.proj.weight"].tobytes() == expected.tobytes()


@pytest.mark.parametrize(("method", "ending"), [("gptq", "0.proj.qweight"), ("int8", "0.proj.weight")])
def test_corrupt_integers_are_not_skipped(method: str, ending: str, tmp_path: Path) -> None:
    """They have no energy, so the quality would be 1 without them."""
    make_checkpoint(tmp_path, method)
    store = corrupted(tmp_path, ending, 0)
    with pytest.raises(QualityError, match="cannot be skipped") as caught:
        holoray.open(store, fault_policy=FaultPolicy(skip_corrupted=True)).load(dequantise="bf16")
    assert str(caught.value.tensor).endswith(ending)
