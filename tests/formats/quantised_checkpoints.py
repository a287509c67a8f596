"""Small quantised checkpoints as their tools save them: safetensors files beside a config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from quantised_layers import Made, make_layer

from holoray.checkpoint import save_checkpoint
from holoray.tensor import Array

GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
INT8_CONFIG = {"quant_method": "compressed-tensors", "format": "int-quantized"}
CONFIGS = {"gptq": GPTQ_CONFIG, "awq": AWQ_CONFIG, "int8": INT8_CONFIG}


def tensors_of(name: str, made: Made) -> dict[str, Array]:
    """A layer's tensors under the names that its format gives them."""
    if made.packing.method == "int8":
        out = {f"{name}.weight": made.q, f"{name}.weight_scale": made.scales}
        return out if made.zeros is None else out | {f"{name}.weight_zero_point": made.zeros}
    assert made.zeros is not None
    out = {f"{name}.qweight": made.q, f"{name}.qzeros": made.zeros, f"{name}.scales": made.scales}
    return out if made.order is None else out | {f"{name}.g_idx": made.order}


def make_checkpoint(
    folder: Path, method: str, *, layers: int = 2, config: Mapping[str, Any] | None = None, rows: int = 64
) -> tuple[dict[str, Made], dict[str, Array]]:
    """Write model.safetensors and config.json into the folder; the layers by name, and all tensors as stored.

    Like safetensors' own writer, tensors of larger dtypes come first: the scales of all layers after all integers.
    """
    rng = np.random.default_rng(7)
    bits = 8 if method == "int8" else 4
    made = {
        f"model.layers.{n}.proj": make_layer(
            method, rng, bits=bits, rows=rows, columns=160, group=160 if method == "int8" else 32,
            ordered=n % 2 == 1, with_zeros=n % 2 == 1,
        )
        for n in range(layers)
    }  # fmt: skip
    tensors: dict[str, Array] = {
        "model.embed.weight": (0.05 * rng.standard_normal((300, 64))).astype(ml_dtypes.bfloat16),
        "model.norm.weight": np.ones(64, np.float16),
    }
    for name, layer in made.items():
        tensors |= tensors_of(name, layer)
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))
    save_checkpoint(folder / "model.safetensors", tensors, {"format": "pt"})
    config = {"model_type": "llama", "quantization_config": CONFIGS[method] if config is None else config}
    (folder / "config.json").write_text(json.dumps(config))
    return made, tensors
