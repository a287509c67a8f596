"""Quantised layers of a checkpoint: which of its tensors are integers of one weight matrix, and how they lie.

A layer `X` stands for a matrix `X.weight` [outputs, inputs] = (q - zero) * scale, one zero and one scale for a group
of inputs. Three ways to store it are known:

`gptq`  AutoGPTQ, GPTQModel: `X.qweight` int32 [inputs * bits / 32, outputs], the integers of consecutive inputs in one
        word, lowest bits first; `X.qzeros` int32 [groups, outputs * bits / 32], those of consecutive outputs in one
        word, each stored minus one modulo 2**bits (format "gptq") or as it is ("gptq_v2"); `X.scales` [groups,
        outputs]; `X.g_idx` int32 [inputs], the group of each input, which are consecutive where it is missing. Bits
        2, 4 or 8. https://github.com/ModelCloud/GPTQModel/wiki/Packing-Formats-and-Compatibility
`awq`   AutoAWQ, version "gemm": `X.qweight` int32 [inputs, outputs / 8], `X.qzeros` int32 [groups, outputs / 8], nibble
        n of a word is in both output `AWQ_ORDER[n]` of its eight; `X.scales` [groups, outputs]. Bits 4.
        https://github.com/casper-hansen/AutoAWQ/blob/main/awq/modules/linear/gemm.py
`int8`  compressed-tensors, format "int-quantized": `X.weight` int8 [outputs, inputs], `X.weight_scale` of one number,
        [outputs], [outputs, 1] or [outputs, groups], `X.weight_zero_point` int8 of that shape where not zero,
        `X.weight_g_idx` int32 [inputs], the group of each input, which are consecutive where it is missing or has a -1.
        https://github.com/vllm-project/compressed-tensors

Shapes do not tell everything (whether zeros are stored minus one), so a checkpoint's own configuration goes with it:
`quantization_config` of its config.json, or quantize_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from holoray.errors import FormatError, HolorayError, LimitError, UsageError
from holoray.tensor import TRANSFORMABLE, TensorSpec

CONFIG_KEY: Final = "quantization_config"
"""Under which the configuration, as JSON, is in the metadata of a safetensors file and of a manifest."""
GPTQ: Final = "gptq"
AWQ: Final = "awq"
INT8: Final = "int8"
AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
_CONFIG_FILES: Final = (("config.json", CONFIG_KEY), ("quantize_config.json", None), ("quant_config.json", None))
_MAX_CONFIG_BYTES: Final = 16 << 20
_WORD_BITS: Final = 32
_MARKS: Final = ("qweight", "qzeros", "weight_scale")
"""Last parts of names that only quantised checkpoints have."""
_FORMAT_KEYS: Final = ("checkpoint_format", "format")
"""Under which GPTQModel says how integers are packed; later versions write the second one."""
_NO_CONFIG_HINT: Final = "encode it again from a directory that holds its config.json or quantize_config.json"


@dataclass(frozen=True, slots=True)
class Packing:
    """How the integers of a matrix of `rows` outputs and `columns` inputs lie.

    `group` consecutive inputs share a scale (the last group may be shorter) unless the layer says it input by input.
    `zero_offset` is added to a stored zero, modulo 2**bits.
    """

    method: str
    bits: int
    rows: int
    columns: int
    group: int
    zero_offset: int = 0

    @property
    def groups(self) -> int:
        return -(-self.columns // self.group)


@dataclass(frozen=True, slots=True)
class QuantisedLayer:
    """The names of the tensors that stand for `weight`; `zeros` and `order` (each input's group) may be missing."""

    weight: str
    packing: Packing
    q: str
    scales: str
    zeros: str | None = None
    order: str | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(name for name in (self.q, self.scales, self.zeros, self.order) if name is not None)


@dataclass(frozen=True, slots=True)
class Quantisation:
    """What is quantised in a checkpoint: layers that can become floats, and why others cannot.

    `method` is what the configuration calls itself, also one that is not known here; empty without a configuration.
    """

    method: str
    layers: tuple[QuantisedLayer, ...]
    faults: tuple[HolorayError, ...]

    @property
    def tensors(self) -> frozenset[str]:
        """Names of all tensors of the layers."""
        return frozenset(name for layer in self.layers for name in layer.tensors)


def quantisation_metadata(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """The configuration beside a checkpoint, for its metadata; nothing where no name looks quantised or none is there.

    Raises FormatError for a file that is no JSON object.
    """
    if not any(_split(name)[1] in _MARKS for name in names):
        return {}
    for file, key in _CONFIG_FILES:
        config = _read_object(directory / file)
        if config is not None and key is not None:
            config = config.get(key)
        if config is not None:
            return {CONFIG_KEY: json.dumps(config, sort_keys=True, separators=(",", ":"))}
    return {}


def find_quantisation(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> Quantisation:
    """The quantised layers among tensors, in their order, by the configuration in the metadata."""
    by_name = {spec.name: spec for spec in specs}
    layers: list[QuantisedLayer] = []
    faults: list[HolorayError] = []
    try:
        config = _config(metadata)
    except FormatError as error:
        return Quantisation("", (), (error,))
    method = _method(config)
    for prefix in dict.fromkeys(_split(name)[0] for name in by_name if _split(name)[1] in _MARKS):
        try:
            layers.append(_LAYERS.get(method, _unknown)(_Parts(prefix, by_name, method, config)))
        except HolorayError as error:
            faults.append(error)
    return Quantisation(method, tuple(layers), tuple(faults))


def _supported(names: Iterable[str]) -> str:
    return f"supported: {', '.join(names)}; without --dequantise the tensors load as they are stored"


def _split(name: str) -> tuple[str, str]:
    """`a.b.qweight` -> (`a.b.`, `qweight`)."""
    head, dot, last = name.rpartition(".")
    return head + dot, last


def _read_object(path: Path) -> dict[str, Any] | None:
    """A small JSON object from a file, None where there is none."""
    try:
        size = path.stat().st_size
        text = path.read_bytes() if size <= _MAX_CONFIG_BYTES else b""
    except OSError:
        return None
    if size > _MAX_CONFIG_BYTES:
        raise LimitError(f"{path} is absurdly large", hint="it says how the checkpoint is quantised: repair it")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise FormatError(f"{path} is no JSON object", hint="it says how the checkpoint is quantised: repair it")
    return value


def _config(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        config = json.loads(metadata.get(CONFIG_KEY, "{}"))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise FormatError(f"the metadata's {CONFIG_KEY} is no JSON object", hint=_NO_CONFIG_HINT)
    return config


def _method(config: Mapping[str, Any]) -> str:
    """The quantiser's name; files of its own leave it out where only one tool wrote them."""
    for key in ("quant_method", "method"):  # the latter by later versions of GPTQModel
        if key in config:
            return str(config[key])
    return AWQ if "w_bit" in config else GPTQ if "bits" in config else ""


@dataclass(frozen=True, slots=True)
class _Parts:
    """The tensors `prefix`* of a layer and what the configuration says; every getter raises a typed error."""

    prefix: str
    specs: Mapping[str, TensorSpec]
    method: str
    config: Mapping[str, Any]

    def has(self, part: str) -> bool:
        return self.prefix + part in self.specs

    def name(self, part: str) -> str | None:
        return self.prefix + part if self.has(part) else None

    def matrix(self, part: str, dtypes: Iterable[str]) -> tuple[int, int]:
        """The shape of a part; raises FormatError unless it is there, a matrix, not empty, of one of the dtypes."""
        if not self.has(part):
            raise FormatError(
                f"{self.prefix}{part} is missing beside the other tensors of its quantised layer",
                hint="is the checkpoint complete?",
                tensor=self.prefix + part,
            )
        spec = self.specs[self.prefix + part]
        if spec.dtype not in dtypes or len(spec.shape) != 2 or not spec.size:
            raise self.wrong(part, f"a matrix of {' or '.join(sorted(dtypes))}")
        return spec.shape[0], spec.shape[1]

    def expect(self, part: str, shape: tuple[int, ...], dtypes: Iterable[str]) -> None:
        spec = self.specs.get(self.prefix + part)
        if spec is not None and (spec.shape != shape or spec.dtype not in dtypes):
            raise self.wrong(part, f"{' or '.join(sorted(dtypes))} of {shape}")

    def wrong(self, part: str, wanted: str) -> FormatError:
        spec = self.specs[self.prefix + part]
        return FormatError(
            f"{spec.name} is {spec.dtype} of {spec.shape}, where its layer ({self.method}) needs {wanted}",
            hint=f"does the checkpoint's {CONFIG_KEY} belong to it?",
            tensor=spec.name,
        )

    def number(self, *keys: str) -> int:
        value = next((self.config[key] for key in keys if key in self.config), None)
        if type(value) is not int:
            raise FormatError(f"the {CONFIG_KEY} has no whole number {keys[0]!r}", hint=_NO_CONFIG_HINT)
        return value

    def bits(self, known: tuple[int, ...], *keys: str) -> int:
        bits = self.number(*keys)
        if bits not in known:
            raise UsageError(
                f"{self.method} with {bits} bits is not supported",
                hint=_supported(map(str, known)),
                tensor=self.prefix + "qweight",
            )
        return bits

    def group(self, columns: int, *keys: str) -> int:
        group = self.number(*keys)
        if group < 1 and group != -1:
            raise FormatError(f"the {CONFIG_KEY} states groups of {group}", hint="-1 stands for one group")
        return columns if group == -1 else min(group, columns)

    def option(self, default: str, known: tuple[str, ...], *keys: str) -> str:
        key = next((key for key in keys if self.config.get(key)), keys[0])
        value = str(self.config.get(key) or default).lower()  # null stands for the default
        if value not in known:
            raise UsageError(
                f"{self.method} of {key} {value!r} is not supported",
                hint=_supported(known),
                tensor=self.prefix + "qweight",
            )
        return value

    def free(self) -> str:
        """The name of the weight; raises FormatError if a tensor has it already."""
        if self.has("weight"):
            raise FormatError(
                f"{self.prefix}weight is there beside its quantised form",
                hint="remove one of the two",
                tensor=self.prefix + "weight",
            )
        return self.prefix + "weight"


def _gptq(parts: _Parts) -> QuantisedLayer:
    words, rows = parts.matrix("qweight", {"I32"})
    bits = parts.bits((2, 4, 8), "bits")
    columns = words * (_WORD_BITS // bits)
    offset = int(parts.option("gptq", ("gptq", "gptq_v2"), *_FORMAT_KEYS) == "gptq")
    packing = Packing(GPTQ, bits, rows, columns, parts.group(columns, "group_size"), offset)
    parts.expect("g_idx", (columns,), {"I32"})
    return _packed_layer(parts, packing)


def _awq(parts: _Parts) -> QuantisedLayer:
    columns, words = parts.matrix("qweight", {"I32"})
    bits = parts.bits((4,), "bits", "w_bit")
    parts.option("gemm", ("gemm",), "version", *_FORMAT_KEYS)
    group = parts.group(columns, "group_size", "q_group_size")
    return _packed_layer(parts, Packing(AWQ, bits, words * (_WORD_BITS // bits), columns, group))


def _packed_layer(parts: _Parts, packing: Packing) -> QuantisedLayer:
    per_word = _WORD_BITS // packing.bits
    if packing.rows % per_word:
        raise parts.wrong("qweight", f"a multiple of {per_word} outputs")
    for part, shape, dtypes in (
        ("qzeros", (packing.groups, packing.rows // per_word), {"I32"}),
        ("scales", (packing.groups, packing.rows), TRANSFORMABLE),
    ):
        parts.matrix(part, dtypes)
        parts.expect(part, shape, dtypes)
    q, scales, zeros = (parts.prefix + part for part in ("qweight", "scales", "qzeros"))
    order = parts.name("g_idx") if packing.method == GPTQ else None
    return QuantisedLayer(parts.free(), packing, q, scales, zeros, order)


def _int8(parts: _Parts) -> QuantisedLayer:
    parts.option("int-quantized", ("int-quantized",), "format")
    rows, columns = parts.matrix("weight", {"I8"})
    if not parts.has("weight_scale"):
        parts.matrix("weight_scale", TRANSFORMABLE)
    scale = parts.specs[parts.prefix + "weight_scale"]
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    per_row = scale.shape in ((rows,), (rows, groups)) and groups and not columns % groups
    if scale.dtype not in TRANSFORMABLE or not (scale.size == 1 or per_row):
        raise parts.wrong("weight_scale", f"floats of one number, ({rows},) or ({rows}, groups)")
    parts.expect("weight_zero_point", scale.shape, {"I8"})
    parts.expect("weight_g_idx", (columns,), {"I32"})
    packing = Packing(INT8, 8, rows, columns, columns // groups)
    weight = parts.prefix + "weight"
    zeros, order = parts.name("weight_zero_point"), parts.name("weight_g_idx")
    return QuantisedLayer(weight, packing, weight, scale.name, zeros, order)


def _unknown(parts: _Parts) -> QuantisedLayer:
    if not parts.method:
        raise UsageError(
            f"nothing says how {parts.prefix}* is quantised", hint=_NO_CONFIG_HINT, tensor=parts.prefix.rstrip(".")
        )
    raise UsageError(
        f"quantisation by {parts.method!r} is not supported",
        hint=_supported(_LAYERS),
        tensor=parts.prefix.rstrip("."),
    )


_LAYERS: Final[dict[str, Callable[[_Parts], QuantisedLayer]]] = {
    GPTQ: _gptq,
    AWQ: _awq,
    "compressed-tensors": _int8,
}
