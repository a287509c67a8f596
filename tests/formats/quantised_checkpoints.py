"""Small quantised checkpoints as their tools save them: safetensors files beside a config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from quantised_layers import Made, make_layer

import holoray
from holoray.checkpoint import save_checkpoint
from holoray.stores import MemoryStore, fragment_file
from holoray.tensor import Array

GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
INT8_CONFIG = {"quant_method": "compressed-tensors", "format": "int-quantized"}
CONFIGS: dict[str, Mapping[str, Any]] = {"gptq": GPTQ_CONFIG, "awq": AWQ_CONFIG, "int8": INT8_CONFIG}


def tensors_of(name: str, made: Made) -> dict[str, Array]:
    """A layer's tensors under the names that its format gives them."""
    if made.packing.method == "int8":
        out = {f"{name}.weight": made.q, f"{name}.weight_scale": made.scales}
        out |= {} if made.zeros is None else {f"{name}.weight_zero_point": made.zeros}
        return out if made.order is None else out | {f"{name}.weight_g_idx": made.order}
    assert made.zeros is not None
    out = {f"{name}.qweight": made.q, f"{name}.qzeros": made.zeros, f"{name}.scales": made.scales}
    return out if made.order is None else out | {f"{name}.g_idx": made.order}


def save_layers(
    folder: Path,
    made: Mapping[str, Made],
    others: Mapping[str, Array],
    config: Mapping[str, Any],
    *,
    one_scale: bool = False,
) -> dict[str, Array]:
    """Write model.safetensors and config.json into the folder; all tensors as stored.

    Like safetensors' own writer, tensors of larger dtypes come first: the scales of all layers after all integers.
    `one_scale`: of int8 layers whose scales and zeros are all the same only one is stored.
    """
    tensors = dict(others)
    for name, layer in made.items():
        parts = tensors_of(name, layer)
        if one_scale:
            parts = {n: a[:1, 0].copy() if n.endswith(("_scale", "_zero_point")) else a for n, a in parts.items()}
        tensors |= parts
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))
    save_checkpoint(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    return tensors


def make_checkpoint(
    folder: Path, method: str, *, layers: int = 2, config: Mapping[str, Any] | None = None, rows: int = 64
) -> tuple[dict[str, Made], dict[str, Array]]:
    """A checkpoint in the folder; the layers by name, and all tensors as stored."""
    rng = np.random.default_rng(7)
    bits = 8 if method == "int8" else 4
    made = {
        f"model.layers.{n}.proj": make_layer(
            method, rng, bits=bits, rows=rows, columns=160, group=160 if method == "int8" else 32,
            ordered=n % 2 == 1, with_zeros=n % 2 == 1,
        )
        for n in range(layers)
    }  # fmt: skip
    others: dict[str, Array] = {
        "model.embed.weight": (0.05 * rng.standard_normal((300, 64))).astype(ml_dtypes.bfloat16),
        "model.norm.weight": np.ones(64, np.float16),
    }
    return made, save_layers(folder, made, others, CONFIGS[method] if config is None else config)


def corrupted(folder: Path, ending: str, index: int) -> MemoryStore:
    """A store of the checkpoint in which one fragment of the first tensor with such a name is damaged."""
    store = MemoryStore()
    holoray.encode(folder, store, compression="none")
    sealed = holoray.open(store)
    fragment = sealed.entry(next(t for t in sealed.manifest.by_name if t.endswith(ending))).fragments[index]
    file = fragment_file(fragment.file)
    data = bytearray(store.blobs[file])
    data[fragment.offset] ^= 1
    store.blobs[file] = bytes(data)
    return store
