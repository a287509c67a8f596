"""What kernels run on: memory with addresses, copies, launches. The one with CUDA behind it is `cuda.device`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
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
    """Arrays are CuPy's, or NumPy's in tests; bfloat16 is uint16 there, which CuPy knows.

    Verbs raise CapacityError where memory lacks, and DeviceError where the device, its driver or a library fails.
    Expressions on arrays run on the first device of the process, unless they are inside `stream` or `shared`.

    Work is queued on the calling thread's stream: the one of `stream`, else that of `shared`. An array belongs to the
    stream it was made on: freed, its memory goes to the next array of that stream, behind all work queued there. So
    what is made inside `stream` must only be used there, and needs no waiting when it is dropped; what several
    streams use is made inside `shared`, and dropped when all of them have been waited for.
    """

    number: int
    """Which device of this process it is."""
    multiprocessors: int

    def stream(self) -> AbstractContextManager[None]:
        """A stream of the thread's own for the length of a `with`; leaving waits for its work."""

    def shared(self) -> AbstractContextManager[None]:
        """For making arrays that all streams use: whatever is queued inside is done when it is left."""

    def range(self, name: str) -> AbstractContextManager[None]:
        """Names what the thread does inside in a profiler's trace; costs next to nothing without a profiler."""

    def free_bytes(self) -> int:
        """Bytes that can still be allocated."""

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """A zeroed array on the device, at a multiple of 256 bytes; raises CapacityError where there is no room."""

    def copy(self, array: Any, to: Any = None) -> Any:
        """Queue a copy of a contiguous array on the device, to another one or a new one, and return that."""

    def clear(self, array: Any) -> None:
        """Queue zeros into a contiguous array."""

    def segment(self, nbytes: int) -> Any:
        """Zeroed uint8, done when this returns, in an allocation of its own: `share` gives no neighbours away."""

    def share(self, segment: Any) -> bytes:
        """What another process passes to `attach`; good for as long as the segment is."""

    def attach(self, handle: bytes, nbytes: int) -> Any:
        """The bytes of a segment that another process shares; raises SourceError where it is gone.

        Let go of it before its owner frees it.
        """

    def address(self, array: Any) -> int:
        """Where a contiguous array lies on the device."""

    def upload(self, host: npt.NDArray[Any]) -> Any:
        """A copy of the array on the device, queued; the host array may be reused at once. CapacityError: no room."""

    def write(self, array: Any, host: npt.NDArray[Any]) -> None:
        """Queue a copy of as many bytes into a contiguous array of the device; the host's may be reused at once."""

    def download(self, array: Any) -> npt.NDArray[Any]:
        """A copy on the host of a contiguous array, when all work queued before on this stream is done."""

    def launch(self, module: str, kernel: str, geometry: Geometry, arguments: Sequence[np.generic]) -> None:
        """Queue a kernel; NumPy scalars are passed by value, in their own width."""

    def matmul(self, a: Any, b: Any) -> Any:
        """The product of two float32 matrices, as a new one; the order of its sums is the library's."""

    def inverse_dct(self, coefficients: Any, axes: tuple[int, int]) -> Any:
        """The orthonormal inverse DCT-II of a float32 array over two axes, as a new contiguous array."""

    def synchronize(self) -> None:
        """Wait for all work queued on this stream, and for no other."""
