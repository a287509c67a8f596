"""Reused working memory of one thread: touching fresh pages costs more than reading or hashing what goes there."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


class Scratch:
    """Named buffers that only ever grow; a buffer's content is valid until the same name is asked for again."""

    def __init__(self) -> None:
        self._buffers: dict[str, npt.NDArray[np.uint8]] = {}

    def bytes(self, name: str, nbytes: int) -> npt.NDArray[np.uint8]:
        """At least `nbytes` writable bytes with whatever was left in them."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < nbytes:
            buffer = np.zeros(max(nbytes, 1), np.uint8)
            buffer.fill(0)  # np.zeros maps pages lazily; touch them now, once
            self._buffers[name] = buffer
        return buffer

    def array(self, name: str, count: int, dtype: Any) -> npt.NDArray[Any]:
        """The first `count` elements of the named buffer seen as `dtype`."""
        nbytes = count * np.dtype(dtype).itemsize
        return self.bytes(name, nbytes)[:nbytes].view(dtype)
