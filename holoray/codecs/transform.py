"""What `spectral` and `projection` share: coefficients of an orthonormal transform, dealt to fragments.

A tensor is a matrix (0-d: 1 x 1, 1-D: 1 x n, n-D: first dimension x the rest). Because the transform is orthonormal,
the squared error of any subset is the energy of the coefficients that are missing; the inverse is the transpose, so
what it makes of any subset is the least-squares solution of minimal norm.

A fragment holds the essential part, if there is one, and then its share of the coefficients in raster order.
"""

from __future__ import annotations

import base64
import binascii
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from holoray.codecs.base import FragmentShape
from holoray.codecs.dealing import Deal
from holoray.codecs.dealt import DealtCodec
from holoray.codecs.essential import EssentialPart
from holoray.errors import FormatError
from holoray.fragment import NO_PREREQUISITE
from holoray.tensor import Array, TensorSpec, matrix_shape


@dataclass(frozen=True)
class TransformCodec(DealtCodec):
    """`seed` and `shifts` (base64 of one little-endian u16 a group of strips) say how coefficients are dealt."""

    seed: int
    shifts: str

    @abstractmethod
    def inverse(self, coefficients: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The weights behind float64[rows, columns] coefficients, same shape."""

    def essential_part(self, size: int) -> EssentialPart:
        return EssentialPart(self.essential, size, self.value_dtype)

    def essential_nbytes(self, spec: TensorSpec) -> int:
        return self.essential_part(spec.size).nbytes

    def deal(self, size: int) -> Deal:
        return Deal(size, self.fragments, self.seed)

    def _is_possible(self, spec: TensorSpec) -> bool:
        possible = 0 <= self.seed < 1 << 64 and 0 <= self.essential <= spec.size
        return possible and self.group_shifts.size == self.deal(spec.size).groups

    @cached_property
    def group_shifts(self) -> npt.NDArray[np.int64]:
        try:
            raw = base64.b64decode(self.shifts, validate=True)
        except (binascii.Error, ValueError):
            raise FormatError(f"{self.name} shifts are not base64") from None
        if len(raw) % 2:
            raise FormatError(f"{self.name} shifts are not u16 values")
        return np.frombuffer(raw, "<u2").astype(np.int64)

    def shapes(self, spec: TensorSpec) -> Iterator[FragmentShape]:
        deal = self.deal(spec.size)
        last = deal.last_offset(self.group_shifts)
        head = self.essential_nbytes(spec)
        for index in range(self.fragments):
            nbytes = head + self.value_dtype.itemsize * deal.count((last + index) % self.fragments)
            yield FragmentShape(index, 0, index, NO_PREREQUISITE, nbytes, nbytes)

    def decode(self, spec: TensorSpec, payloads: Mapping[int, Any]) -> Array:
        deal, essential = self.deal(spec.size), self.essential_part(spec.size)
        offsets = deal.offsets(self.group_shifts)
        coefficients = np.zeros(deal.padded)
        leading = None
        for index, payload in payloads.items():
            places = deal.places(offsets, index)
            leading = essential.parse(payload)
            values = np.frombuffer(payload, self.value_dtype, offset=essential.nbytes)
            if values.size != places.size:
                raise FormatError(f"{self.name} fragment {index} of {spec.name!r} has {values.size} coefficients")
            coefficients[places] = values
        if leading is not None:
            coefficients[leading[0].astype(np.int64)] = leading[1]
        weights = self.inverse(coefficients[: spec.size].reshape(matrix_shape(spec.shape)))
        return self._rounded(weights, spec)
