"""Zeroed memory for weights, in large pages where the kernel has them: half of a load is touching its destination."""

from __future__ import annotations

import errno
import math
import mmap
from contextlib import suppress
from typing import Any, Final

import numpy as np

from holoray.tensor import Array

_LARGE: Final = 4 << 20


def zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """A zeroed array; raises MemoryError where there is no room.

    NumPy asks for large pages in `empty`, but not in `zeros`.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _LARGE:
        return np.zeros(shape, dtype)
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError(f"no room for {nbytes} bytes") from None
        raise
    with suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8).view(dtype).reshape(shape)
