"""Which tensors are one quantised layer: found by their shapes and the checkpoint's configuration, or told why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantised_checkpoints import AWQ_CONFIG, GPTQ_CONFIG, INT8_CONFIG, make_checkpoint

from holoray.checkpoint import open_checkpoint, save_checkpoint
from holoray.errors import FormatError, HolorayError, LimitError, UsageError
from holoray.formats.quantised import CONFIG_KEY, Packing, Quantisation, find_quantisation
from holoray.tensor import TensorSpec

Shapes = dict[str, tuple[str, tuple[int, ...]]]
GPTQ: Shapes = {
    "a.qweight": ("I32", (8, 32)),
    "a.qzeros": ("I32", (2, 4)),
    "a.scales": ("F16", (2, 32)),
    "a.g_idx": ("I32", (64,)),
}
AWQ: Shapes = {"a.qweight": ("I32", (64, 4)), "a.qzeros": ("I32", (2, 4)), "a.scales": ("F16", (2, 32))}
INT8: Shapes = {"a.weight": ("I8", (32, 64)), "a.weight_scale": ("BF16", (32, 1))}

INT8_GROUPS = INT8 | {"a.weight_scale": ("F32", (32, 4)), "a.weight_zero_point": ("I8", (32, 4))}


def words(lines: int, groups: int, zero_words: int) -> Shapes:
    """The three matrices of a GPTQ layer of 32 outputs."""
    return {
        "a.qweight": ("I32", (lines, 32)),
        "a.qzeros": ("I32", (groups, zero_words)),
        "a.scales": ("F16", (groups, 32)),
    }


def find(shapes: Shapes, config: object) -> Quantisation:
    specs = [TensorSpec(name, dtype, shape) for name, (dtype, shape) in shapes.items()]
    return find_quantisation(specs, {} if config is None else {CONFIG_KEY: json.dumps(config)})


def only_fault(shapes: Shapes, config: object) -> HolorayError:
    found = find(shapes, config)
    assert found.layers == ()
    (fault,) = found.faults
    return fault


@pytest.mark.parametrize(
    ("shapes", "config", "packing"),
    [
        (GPTQ, GPTQ_CONFIG, Packing("gptq", 4, 32, 64, 32, 1)),
        (GPTQ, GPTQ_CONFIG | {"checkpoint_format": "gptq_v2"}, Packing("gptq", 4, 32, 64, 32, 0)),
        (GPTQ, GPTQ_CONFIG | {"checkpoint_format": None}, Packing("gptq", 4, 32, 64, 32, 1)),
        (GPTQ, {"method": "gptq", "format": "gptq_v2", "bits": 4, "group_size": 32}, Packing("gptq", 4, 32, 64, 32, 0)),
        (GPTQ, {"bits": 4, "group_size": 32}, Packing("gptq", 4, 32, 64, 32, 1)),
        (GPTQ | words(16, 2, 8), GPTQ_CONFIG | {"bits": 8}, Packing("gptq", 8, 32, 64, 32, 1)),
        (GPTQ | words(4, 2, 2), GPTQ_CONFIG | {"bits": 2}, Packing("gptq", 2, 32, 64, 32, 1)),
        (GPTQ | words(8, 1, 4), GPTQ_CONFIG | {"group_size": -1}, Packing("gptq", 4, 32, 64, 64, 1)),
        (GPTQ | words(8, 3, 4), GPTQ_CONFIG | {"group_size": 24}, Packing("gptq", 4, 32, 64, 24, 1)),
        (AWQ, AWQ_CONFIG, Packing("awq", 4, 32, 64, 32)),
        (AWQ, {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}, Packing("awq", 4, 32, 64, 32)),
        (INT8, INT8_CONFIG, Packing("int8", 8, 32, 64, 64)),
        (INT8 | {"a.weight_scale": ("F32", (1,))}, INT8_CONFIG, Packing("int8", 8, 32, 64, 64)),
        (INT8 | {"a.weight_scale": ("F32", (32,))}, INT8_CONFIG, Packing("int8", 8, 32, 64, 64)),
        (INT8_GROUPS, INT8_CONFIG, Packing("int8", 8, 32, 64, 16)),
    ],
)  # fmt: skip
def test_layers_are_found(shapes: Shapes, config: object, packing: Packing) -> None:
    found = find(shapes | {"b.weight": ("F16", (4, 4)), "b.scales": ("F16", (4,))}, config)
    assert found.faults == ()
    (layer,) = found.layers
    assert (layer.packing, layer.weight) == (packing, "a.weight")
    assert found.tensors == set(shapes)
    assert layer.order == ("a.g_idx" if "a.g_idx" in shapes else None)


def without(shapes: Shapes, name: str) -> Shapes:
    return {key: value for key, value in shapes.items() if key != name}


@pytest.mark.parametrize(
    ("shapes", "config", "kind", "told"),
    [
        (without(GPTQ, "a.qweight"), GPTQ_CONFIG, FormatError, "a.qweight is missing"),
        (without(GPTQ, "a.qzeros"), GPTQ_CONFIG, FormatError, "a.qzeros is missing"),
        (without(AWQ, "a.scales"), AWQ_CONFIG, FormatError, "a.scales is missing"),
        (without(INT8, "a.weight"), INT8_CONFIG, FormatError, "a.weight is missing"),
        (GPTQ | {"a.scales": ("F16", (2, 31))}, GPTQ_CONFIG, FormatError, "a.scales is F16 of (2, 31)"),
        (GPTQ | {"a.scales": ("F64", (2, 32))}, GPTQ_CONFIG, FormatError, "a.scales is F64"),
        (GPTQ | {"a.qzeros": ("I32", (2, 8))}, GPTQ_CONFIG, FormatError, "a.qzeros is I32 of (2, 8)"),
        (GPTQ | {"a.g_idx": ("I32", (63,))}, GPTQ_CONFIG, FormatError, "a.g_idx is I32 of (63,)"),
        (GPTQ | {"a.qweight": ("I16", (8, 32))}, GPTQ_CONFIG, FormatError, "a.qweight is I16"),
        (GPTQ | {"a.qweight": ("I32", (8, 0))}, GPTQ_CONFIG, FormatError, "a.qweight is I32 of (8, 0)"),
        (GPTQ | {"a.qweight": ("I32", (8, 33))}, GPTQ_CONFIG, FormatError, "a multiple of 8 outputs"),
        (GPTQ | {"a.weight": ("F16", (32, 64))}, GPTQ_CONFIG, FormatError, "a.weight is there beside"),
        (INT8 | {"a.weight_scale": ("F16", (31,))}, INT8_CONFIG, FormatError, "a.weight_scale is F16 of (31,)"),
        (INT8 | {"a.weight_scale": ("F16", (32, 5))}, INT8_CONFIG, FormatError, "a.weight_scale is F16 of (32, 5)"),
        (INT8 | {"a.weight_scale": ("I32", (32, 1))}, INT8_CONFIG, FormatError, "a.weight_scale is I32"),
        (INT8 | {"a.weight_zero_point": ("I8", (32,))}, INT8_CONFIG, FormatError, "a.weight_zero_point is I8 of (32,)"),
        (INT8 | {"a.weight": ("F8_E4M3", (32, 64))}, INT8_CONFIG, FormatError, "a.weight is F8_E4M3"),
        (GPTQ, GPTQ_CONFIG | {"bits": 3}, UsageError, "gptq with 3 bits is not supported"),
        (AWQ, AWQ_CONFIG | {"bits": 8}, UsageError, "awq with 8 bits is not supported"),
        (AWQ, AWQ_CONFIG | {"version": "gemv"}, UsageError, "version 'gemv' is not supported"),
        (GPTQ, GPTQ_CONFIG | {"checkpoint_format": "marlin"}, UsageError, "checkpoint_format 'marlin' is not"),
        (INT8, INT8_CONFIG | {"format": "float-quantized"}, UsageError, "format 'float-quantized' is not supported"),
        (GPTQ, GPTQ_CONFIG | {"quant_method": "quip"}, UsageError, "by 'quip' is not supported"),
        (GPTQ, None, UsageError, "nothing says how a.* is quantised"),
        (GPTQ, {"quant_method": "gptq", "bits": 4}, FormatError, "no whole number 'group_size'"),
        (GPTQ, GPTQ_CONFIG | {"bits": "4"}, FormatError, "no whole number 'bits'"),
        (GPTQ, GPTQ_CONFIG | {"group_size": 0}, FormatError, "groups of 0"),
        (GPTQ, [4], FormatError, "is no JSON object"),
    ],
)  # fmt: skip
def test_what_is_no_layer_is_told(shapes: Shapes, config: object, kind: type[HolorayError], told: str) -> None:
    fault = only_fault(shapes, config)
    assert type(fault) is kind
    assert told in fault.message
    assert fault.hint


@pytest.mark.parametrize(
    ("shapes", "config"),
    [
        (GPTQ, {"method": "gptq", "format": "marlin", "bits": 4, "group_size": 32}),
        (AWQ, {"method": "awq", "format": "gemv", "bits": 4, "group_size": 32}),
    ],
)
def test_other_packings_are_refused_under_either_name(shapes: Shapes, config: object) -> None:
    assert "of format" in only_fault(shapes, config).message


def test_the_group_of_each_input_of_int8_belongs_to_the_layer() -> None:
    ordered = INT8_GROUPS | {"a.weight_g_idx": ("I32", (64,))}
    (layer,) = find(ordered, INT8_CONFIG).layers
    assert layer.order == "a.weight_g_idx"
    assert "a.weight_g_idx" in str(only_fault(ordered | {"a.weight_g_idx": ("I32", (32,))}, INT8_CONFIG))


def test_nothing_is_quantised_where_no_name_looks_so() -> None:
    assert find({"a.weight": ("F16", (4, 4)), "a.scales": ("F16", (4,))}, None) == Quantisation("", (), ())


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"quantization_config": GPTQ_CONFIG}),
        ("quantize_config.json", GPTQ_CONFIG),
        ("quant_config.json", GPTQ_CONFIG),
    ],
)
def test_the_configuration_beside_a_checkpoint_goes_with_it(file: str, content: dict[str, Any], tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "gptq")
    (tmp_path / "config.json").unlink()
    for place in (tmp_path, tmp_path / "model.safetensors"):
        assert CONFIG_KEY not in open_checkpoint(place).metadata
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # quantised, but does not say how
    (tmp_path / file).write_text(json.dumps(content))
    for place in (tmp_path, tmp_path / "model.safetensors"):
        metadata = open_checkpoint(place).metadata
        assert json.loads(metadata[CONFIG_KEY]) == GPTQ_CONFIG
        assert metadata["format"] == "pt"


def test_a_file_that_carries_its_configuration_is_believed(tmp_path: Path) -> None:
    _, tensors = make_checkpoint(tmp_path, "gptq")
    save_checkpoint(tmp_path / "model.safetensors", tensors, {CONFIG_KEY: '{"quant_method":"mine"}'})
    assert open_checkpoint(tmp_path).metadata == {CONFIG_KEY: '{"quant_method":"mine"}'}


@pytest.mark.parametrize(("text", "kind"), [("[1]", FormatError), ("{", FormatError), ("[" * 99_999, FormatError)])
def test_a_broken_configuration_is_told(text: str, kind: type[HolorayError], tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "awq")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(kind, match=r"config\.json is no JSON object"):
        open_checkpoint(tmp_path)
    save_checkpoint(tmp_path / "model.safetensors", {"a.weight": np.zeros(3, np.float32)})
    assert open_checkpoint(tmp_path).metadata == {}  # of which only quantised checkpoints need to know


def test_an_absurdly_large_configuration_is_not_read(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "awq")
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(LimitError, match="absurdly large"):
        open_checkpoint(tmp_path)
