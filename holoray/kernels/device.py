"""What kernels run on: memory with addresses, copies, launches. The one with CUDA behind it is `cuda.device`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

MAX_GRID = (1 << 31) - 1
MAX_THREADS = 1024


@dataclass(frozen=True, slots=True)
class Geometry:
    """Thread blocks of a launch, threads of a block, bytes of dynamic shared memory. One dimension serves all."""

    grid: int
    block: int
    shared_bytes: int = 0

    def __post_init__(self) -> None:
        if not (1 <= self.grid <= MAX_GRID and 1 <= self.block <= MAX_THREADS and self.shared_bytes >= 0):
            raise ValueError(f"impossible launch {self}")


def grid_stride(items: int, threads: int, most_blocks: int) -> Geometry:
    """As many blocks as items ask for, at most `most_blocks`: the kernel's loop takes the rest."""
    return Geometry(max(1, min(-(-items // threads), most_blocks)), threads)


class Device(Protocol):
    """Arrays are CuPy's, or NumPy's in tests; bfloat16 is uint16 there, which CuPy knows."""

    number: int
    """Which device of this process it is."""
    multiprocessors: int

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """A zeroed array on the device, at a multiple of 256 bytes."""

    def segment(self, nbytes: int) -> Any:
        """Zeroed uint8 in an allocation of its own, so that `share` gives no neighbours away."""

    def share(self, segment: Any) -> bytes:
        """What another process passes to `attach`; good for as long as the segment is."""

    def attach(self, handle: bytes, nbytes: int) -> Any:
        """The bytes of a segment that another process shares; raises SourceError where it is gone.

        Let go of it before its owner frees it.
        """

    def address(self, array: Any) -> int:
        """Where a contiguous array lies on the device."""

    def upload(self, host: npt.NDArray[Any]) -> Any:
        """A copy of the array on the device. The host array may be reused once `synchronize` returned."""

    def download(self, array: Any) -> npt.NDArray[Any]:
        """A copy on the host, when all work queued before is done."""

    def launch(self, module: str, kernel: str, geometry: Geometry, arguments: Sequence[np.generic]) -> None:
        """Queue a kernel; NumPy scalars are passed by value, in their own width."""

    def matmul(self, a: Any, b: Any) -> Any:
        """The product of two float32 matrices, as a new one; the order of its sums is the library's."""

    def inverse_dct(self, coefficients: Any, axes: tuple[int, int]) -> Any:
        """The orthonormal inverse DCT-II of a float32 array over two axes, as a new contiguous array."""

    def synchronize(self) -> None:
        """Wait for all queued work."""
