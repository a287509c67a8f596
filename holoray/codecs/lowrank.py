"""`lowrank`: a matrix as a sum of rank-one terms, dealt snake-wise by energy.

Term t is a column times a row, stored as one vector of rows + columns numbers: what it adds to the matrix is
2**exponent times their outer product. Terms are sorted by falling gain and are orthogonal to each other, so their gains
add up. The first `essential` of them ride in every fragment; the others are dealt like cards to players who sit in
a row, there and back: 0, 1, … N-1, N-1, … 1, 0, 0, 1, …
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from holoray.codecs.base import FragmentShape
from holoray.codecs.dealt import DealtCodec
from holoray.codecs.registry import register_codec
from holoray.errors import FormatError
from holoray.fragment import NO_PREREQUISITE
from holoray.tensor import Array, TensorSpec, matrix_shape


@register_codec
@dataclass(frozen=True)
class LowRankCodec(DealtCodec):
    """`rank` terms, the first `essential` of them in every fragment."""

    name: ClassVar[str] = "lowrank"

    rank: int

    def _is_possible(self, spec: TensorSpec) -> bool:
        return 0 <= self.essential <= self.rank and 1 <= self.rank <= min(matrix_shape(spec.shape))

    def width(self, spec: TensorSpec) -> int:
        """Numbers of a term: rows + columns."""
        return sum(matrix_shape(spec.shape))

    def essential_nbytes(self, spec: TensorSpec) -> int:
        return self.essential * self.width(spec) * self.value_dtype.itemsize

    def factor_nbytes(self, spec: TensorSpec) -> int:
        """Bytes of all terms, each counted once."""
        return self.rank * self.width(spec) * self.value_dtype.itemsize

    def terms(self, fragment: int) -> npt.NDArray[np.int64]:
        """The terms of a fragment's own share, ascending."""
        n, dealt = self.fragments, self.rank - self.essential
        rounds = np.arange(-(-dealt // n))
        terms = rounds * n + np.where(rounds % 2, n - 1 - fragment, fragment)
        return self.essential + terms[terms < dealt]

    def shapes(self, spec: TensorSpec) -> Iterator[FragmentShape]:
        term = self.width(spec) * self.value_dtype.itemsize
        rounds, rest = divmod(self.rank - self.essential, self.fragments)
        for index in range(self.fragments):
            place = self.fragments - 1 - index if rounds % 2 else index
            nbytes = term * (self.essential + rounds + (place < rest))
            yield FragmentShape(index, 0, index, NO_PREREQUISITE, nbytes, nbytes)

    def decode(self, spec: TensorSpec, payloads: Mapping[int, Any]) -> Array:
        rows, columns = matrix_shape(spec.shape)
        weights = np.zeros((rows, columns))
        held: dict[int, npt.NDArray[np.float64]] = {}
        for index, payload in payloads.items():
            own = [*range(self.essential), *self.terms(index).tolist()]
            values = np.frombuffer(payload, self.value_dtype)
            if values.size != len(own) * (rows + columns):
                raise FormatError(f"lowrank fragment {index} of {spec.name!r} has {values.size} numbers")
            held |= dict(zip(own, values.astype(np.float64).reshape(len(own), rows + columns), strict=True))
        for term in held.values():
            weights += np.multiply.outer(term[:rows], term[rows:])
        return self._rounded(weights, spec)
