"""What `spectral`, `projection` and `lowrank` share: numbers that add up, dealt to N fragments."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from holoray.codecs.base import Codec
from holoray.codecs.dealing import MAX_FRAGMENTS
from holoray.errors import FormatError
from holoray.tensor import LARGEST, TRANSFORMABLE, Array, TensorSpec

MAX_EXPONENT: Final = 1100
VALUE_DTYPES: Final[dict[str, np.dtype[Any]]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
"""How coefficients and factors may be stored."""


@dataclass(frozen=True)
class DealtCodec(Codec):
    """`exponent`: the tensor is 2**exponent times what the numbers say; `coefficients`: how these are stored.

    `essential` coefficients or terms ride in every fragment, in front of its own share.
    """

    fragments: int
    exponent: int
    essential: int
    coefficients: str

    @property
    def carries_essential(self) -> bool:
        return self.essential > 0

    @property
    def value_dtype(self) -> np.dtype[Any]:
        return VALUE_DTYPES[self.coefficients]

    @abstractmethod
    def essential_nbytes(self, spec: TensorSpec) -> int:
        """Stored bytes of the essential part, before compression."""

    def can_reconstruct(self, spec: TensorSpec, present: frozenset[int]) -> bool:
        return bool(present)

    def check(self, spec: TensorSpec) -> None:
        if spec.dtype not in TRANSFORMABLE or spec.size == 0:
            raise FormatError(
                f"{spec.dtype} tensor {spec.name!r} of {spec.size} elements cannot be {self.name}", tensor=spec.name
            )
        if not (
            1 <= self.fragments <= MAX_FRAGMENTS
            and abs(self.exponent) <= MAX_EXPONENT
            and self.coefficients in VALUE_DTYPES
            and self._is_possible(spec)
        ):
            raise FormatError(f"tensor {spec.name!r} has an impossible {self.name} configuration", tensor=spec.name)

    @abstractmethod
    def _is_possible(self, spec: TensorSpec) -> bool:
        """Whether the numbers of the codec's own, and how many are essential, make sense."""

    def _rounded(self, weights: npt.NDArray[np.float64], spec: TensorSpec) -> Array:
        """Scaled, clipped to finite values of the spec's dtype and rounded to it, in its shape."""
        largest = LARGEST[spec.dtype]
        clipped = np.clip(np.ldexp(weights, self.exponent), -largest, largest)
        return clipped.astype(spec.numpy_dtype).reshape(spec.shape)
