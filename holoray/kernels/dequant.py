"""Quantised weights to floats on the CPU: the twin of `cuda/dequant.cu`."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from holoray.errors import UsageError
from holoray.kernels.rounding import store

BITS: Final = (4, 8)


def check_quantised(q: Any, scales: Any, zeros: Any, out: Any, *, bits: int, group: int) -> None:
    """Raise UsageError unless shapes and dtypes are those that `dequantise` documents."""
    rows, columns = out.shape
    groups = -(-columns // group) if group > 0 else 0
    if bits not in BITS or group < 1:
        raise UsageError(f"{bits} bits in groups of {group}: bits are 4 or 8, a group has at least one weight")
    stored = (rows, columns if bits == 8 else -(-columns // 2))
    wanted = ((q, stored, np.int8 if bits == 8 else np.uint8), (scales, (rows, groups), np.float32))
    for array, shape, dtype in (*wanted, (zeros, (rows, groups), np.int8)):
        if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
            raise UsageError(
                f"a {array.dtype} array of {array.shape} where a contiguous {dtype.__name__} {shape} should be"
            )


def dequantise(
    q: npt.NDArray[Any],
    scales: npt.NDArray[np.float32],
    zeros: npt.NDArray[np.int8],
    out: npt.NDArray[Any],
    *,
    bits: int,
    group: int,
) -> None:
    """out[r, c] = (q[r, c] - zeros[r, c // group]) * scales[r, c // group], in float32, then rounded to `out`'s dtype.

    `q` is int8[rows, columns] (bits 8) or uint8[rows, columns / 2 rounded up] of two numbers 0 to 15 each, the lower
    nibble first (bits 4). `scales` float32, `zeros` int8, both [rows, groups of a row]. Formula: Jacob et al.,
    Quantization and training of neural networks (2018), equation 1.
    """
    check_quantised(q, scales, zeros, out, bits=bits, group=group)
    columns = out.shape[1]
    values = q if bits == 8 else np.stack([q & 15, q >> 4], axis=-1).reshape(q.shape[0], -1)[:, :columns]
    of_column = np.arange(columns) // group
    difference = values.astype(np.int32) - zeros.astype(np.int32)[:, of_column]
    with np.errstate(over="ignore", invalid="ignore"):  # whoever sealed a store chose the scales
        store(difference.astype(np.float32) * scales[:, of_column], out, 0)
