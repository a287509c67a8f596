"""What a tensor is: name, dtype, shape, and the table of dtypes a checkpoint may hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from holoray.errors import FormatError, LimitError

Array = npt.NDArray[Any]

# Names as safetensors writes them. Sub-byte dtypes (F4, F6_*) have no whole-byte element and are refused.
DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "C64": np.dtype("<c8"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
FLOATING: Final = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0"})
TRANSFORMABLE: Final = frozenset({"F32", "F16", "BF16"})
LARGEST: Final = {name: float(ml_dtypes.finfo(DTYPES[name]).max) for name in TRANSFORMABLE}  # type: ignore[no-untyped-call]
"""The largest finite values."""

MAX_RANK: Final = 32
RESERVED_NAME: Final = "__metadata__"
MAX_NAME_BYTES: Final = 4096
MAX_TENSOR_BYTES: Final = 1 << 44


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype (safetensors name) and shape of one tensor; limits are checked here, once."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise FormatError(
                f"tensor {self.name!r} has dtype {self.dtype!r}, which holoray does not know",
                hint=f"known dtypes: {', '.join(DTYPES)}",
                tensor=self.name,
            )
        if not self.name or len(self.name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
            raise LimitError(f"a tensor name must have 1 to {MAX_NAME_BYTES} bytes")
        if self.name == RESERVED_NAME:
            raise FormatError(f"no tensor can be called {self.name!r}: safetensors files keep their metadata there")
        if len(self.shape) > MAX_RANK or any(d < 0 for d in self.shape):
            raise LimitError(f"tensor {self.name!r} has an impossible shape", tensor=self.name)
        if self.nbytes > MAX_TENSOR_BYTES or any(d > MAX_TENSOR_BYTES for d in self.shape):
            raise LimitError(f"tensor {self.name!r} states {self.nbytes} bytes", tensor=self.name)

    @property
    def size(self) -> int:
        """Number of elements (1 for a 0-d tensor)."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * DTYPES[self.dtype].itemsize

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return DTYPES[self.dtype]

    @property
    def is_floating(self) -> bool:
        return self.dtype in FLOATING

    @classmethod
    def of(cls, name: str, array: Array) -> TensorSpec:
        """The spec of an array; big-endian dtypes count as their little-endian twin."""
        return cls(name, dtype_name(array.dtype), tuple(int(d) for d in array.shape))


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The safetensors name of a NumPy dtype; raises FormatError for one that has none."""
    little = dtype.newbyteorder("<") if dtype.kind in "fiuc" and dtype.byteorder == ">" else dtype
    if little not in _NAMES:
        raise FormatError(f"dtype {dtype} cannot be stored", hint=f"convert to one of {', '.join(DTYPES)} first")
    return _NAMES[little]


def canonical(array: Array) -> Array:
    """The same values as a little-endian, C-contiguous array (a copy only where needed)."""
    array = np.asarray(array)
    return np.asarray(array, dtype=DTYPES[dtype_name(array.dtype)], order="C")


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """What a tensor is as a matrix: 0-d -> (1, 1); 1-D -> (1, n); n-D -> (d0, product of the rest)."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def as_bytes(array: Array) -> npt.NDArray[np.uint8]:
    """The bytes of a contiguous array as a flat uint8 view."""
    return array.reshape(-1).view(np.uint8)
