"""The essential part: the leading coefficients, which ride in every fragment in front of its own share.

Stored as `count` positions in raster order (little-endian u32, u64 from 2^32 elements on, strictly ascending) and then
`count` values. Zeros stand in the shares where an essential coefficient was taken out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from holoray.errors import FormatError


@dataclass(frozen=True, slots=True)
class EssentialPart:
    """Layout of the essential part of a tensor of `size` coefficients, of which `count` are essential."""

    count: int
    size: int
    value_dtype: np.dtype[Any]

    @property
    def position_dtype(self) -> np.dtype[Any]:
        return np.dtype("<u4") if self.size < 1 << 32 else np.dtype("<u8")

    @property
    def nbytes(self) -> int:
        return self.count * (self.position_dtype.itemsize + self.value_dtype.itemsize)

    def pack(self, positions: npt.NDArray[Any], values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """uint8[nbytes]: how the part is stored."""
        places = np.ascontiguousarray(positions, self.position_dtype).view(np.uint8)
        return np.concatenate([places, np.ascontiguousarray(values, self.value_dtype).view(np.uint8)])

    def parse(self, payload: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Positions and values at the head of a raw payload; raises FormatError unless they make sense."""
        positions = np.frombuffer(payload, self.position_dtype, self.count)
        values = np.frombuffer(payload, self.value_dtype, self.count, offset=positions.nbytes)
        if self.count and (int(positions[-1]) >= self.size or not (positions[1:] > positions[:-1]).all()):
            raise FormatError("positions of essential coefficients are out of order or out of range")
        return positions, values
