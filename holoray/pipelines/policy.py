"""Which codec a tensor gets, and which tensors load first."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import ml_dtypes
import numpy as np

from holoray.compression import ZSTD
from holoray.errors import FormatError, UsageError
from holoray.kernels.encoder import EncodeOptions
from holoray.kernels.registry import check_codec_name
from holoray.tensor import DTYPES, TRANSFORMABLE, Array, TensorSpec

MANDATORY_1D_ELEMENTS: Final = 1 << 20
MANDATORY_ELEMENTS: Final = 1 << 12
AUTO: Final = "auto"
"""Not a codec, but a choice: the codec with the best measured gain per byte, tensor by tensor."""
CASTS: Final = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
_ROUNDING_FELT: Final = 128
_CASTABLE: Final = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class EncodePolicy:
    """What a user chose for an encode; validated here, once. `patterns`: (glob, codec), the first match wins."""

    codec: str = "planes"
    fragments: int = 8
    seed: int = 0
    dtype: str | None = None
    patterns: tuple[tuple[str, str], ...] = field(default=())
    compression: str = ZSTD
    tile: int = 0
    essential: float = 0.0
    rank: int = 0
    energy: float = 0.0
    coefficients: str = "float32"

    def __post_init__(self) -> None:
        for codec in (self.codec, *(codec for _, codec in self.patterns)):
            check_choice(codec)
        if self.dtype is not None and self.dtype not in CASTS:
            raise UsageError(f"unknown dtype {self.dtype!r}", hint=f"choose one of {', '.join(CASTS)}")
        for name in ("fragments", "seed", "tile", "essential", "rank", "energy"):  # checked, and made plain numbers
            object.__setattr__(self, name, getattr(self.options, name))

    @property
    def options(self) -> EncodeOptions:
        return EncodeOptions(
            fragments=self.fragments,
            seed=self.seed,
            compression=self.compression,
            tile=self.tile,
            essential=self.essential,
            rank=self.rank,
            energy=self.energy,
            coefficients=self.coefficients,
        )

    def get_config(self) -> dict[str, Any]:
        """The policy as JSON values, kept in the manifest."""
        return asdict(self) | {"patterns": [list(pattern) for pattern in self.patterns]}

    def codec_of(self, name: str) -> str:
        return next((codec for glob, codec in self.patterns if fnmatch.fnmatchcase(name, glob)), self.codec)

    def cast(self, name: str, array: Array) -> Array:
        """The array in the chosen dtype (round to nearest even); raises FormatError where finite values overflow."""
        if self.dtype is None or TensorSpec.of(name, array).dtype not in _CASTABLE:
            return array
        with np.errstate(over="ignore", invalid="ignore"):
            out = array.astype(DTYPES[CASTS[self.dtype]])
        if not np.array_equal(_finite(out), _finite(array)):
            raise FormatError(
                f"tensor {name!r} has values beyond the range of {self.dtype}",
                hint="choose bf16 or f32, or leave --dtype out",
                tensor=name,
            )
        return out


def check_choice(codec: str) -> str:
    """Return the name of a codec, or `auto`, unchanged; raises UsageError for any other."""
    return codec if codec == AUTO else check_codec_name(codec)


def effective_codec(codec: str, array: Array, spec: TensorSpec) -> str:
    """The named codec, or `raw` where it cannot represent the tensor.

    That is: other dtypes and empty tensors; under a transform also NaN, Inf, and values so close to the dtype's
    smallest that rounding a partial sum would be felt (`planes` keeps all of those exactly).
    """
    if codec == "raw" or spec.dtype not in TRANSFORMABLE or spec.size == 0:
        return "raw"
    return codec if codec in ("planes", AUTO) or suits_transforms(array) else "raw"


def suits_transforms(array: Array) -> bool:
    """Whether sums of a transform's parts can stand for the array: finite values, none lost in the dtype's steps."""
    if not np.all(_finite(array)):
        return False
    step = float(ml_dtypes.finfo(array.dtype).smallest_subnormal)  # type: ignore[no-untyped-call]
    largest = float(np.max(np.abs(array.astype(np.float32)), initial=0.0))
    if largest == 0.0 or largest > step * _ROUNDING_FELT * array.size:
        return True
    # Rounding errors have a variance of step^2 / 12: at 128 steps rms that is 5e-6 of the energy.
    rms = np.sqrt(np.mean(np.square(array.astype(np.float64))))
    return bool(rms >= step * _ROUNDING_FELT)


def _finite(array: Array) -> Array:
    with np.errstate(invalid="ignore"):  # signalling NaNs of bfloat16, which is widened on the way
        return np.asarray(np.isfinite(array))


def is_mandatory(spec: TensorSpec, array: Array, codec: str) -> bool:
    """Small and 1-D tensors, and what the codec cannot represent: stored raw, loaded first."""
    if spec.size < MANDATORY_ELEMENTS or (len(spec.shape) == 1 and spec.size <= MANDATORY_1D_ELEMENTS):
        return True
    if spec.dtype not in TRANSFORMABLE:
        return True
    return codec != "raw" and effective_codec(codec, array, spec) == "raw"


def parse_patterns(texts: str | Mapping[str, str] | Sequence[str]) -> tuple[tuple[str, str], ...]:
    """`GLOB=CODEC` texts (or a mapping) as pairs; raises UsageError for one without `=`."""
    if isinstance(texts, Mapping):
        return tuple(texts.items())
    pairs = []
    for text in [texts] if isinstance(texts, str) else texts:
        glob, separator, codec = text.rpartition("=")
        if not separator or not glob:
            raise UsageError(f"pattern {text!r} is not of the form GLOB=CODEC", hint="e.g. '*.embed*=spectral'")
        pairs.append((glob, codec))
    return tuple(pairs)
