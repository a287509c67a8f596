"""One CUDA device behind the interface `Device`, through CuPy, on the current stream."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from holoray.errors import CapacityError, SourceError
from holoray.kernels import xp
from holoray.kernels.cuda.source import OPTIONS, source
from holoray.kernels.device import Geometry

_STATIC_LIMIT = 48 << 10
"""Dynamic shared memory beyond this has to be asked for."""
_NO_MEMORY = 2
"""cudaErrorMemoryAllocation, for which CuPy has no name."""


class CudaDevice:
    """Device `number`. Kernels are compiled at their first launch (CuPy keeps cubins in its cache on disk)."""

    def __init__(self, number: int = 0) -> None:
        self._cupy = xp.cupy()
        self.number = number
        self._device = self._cupy.cuda.Device(xp.check_device(number))
        self.multiprocessors = int(self._device.attributes["MultiProcessorCount"])
        self._modules: dict[str, Any] = {}

    @property
    def stream(self) -> int:
        """The stream that work is queued on now, as the address that CUDA libraries take."""
        with self._device:
            return int(self._cupy.cuda.get_current_stream().ptr)

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        with self._device, self._room():
            return self._cupy.zeros(shape, dtype)

    def segment(self, nbytes: int) -> Any:
        # Not of CuPy's pool, whose allocations hold other arrays, too: a handle opens the whole allocation.
        try:
            with self._device:
                memory = self._cupy.cuda.MemoryPointer(self._cupy.cuda.Memory(max(nbytes, 1)), 0)
                memory.memset(0, max(nbytes, 1))
        except self._cupy.cuda.runtime.CUDARuntimeError as error:
            if error.status != _NO_MEMORY:
                raise
            raise CapacityError(
                f"{nbytes} bytes do not fit on {self._device}: {error}",
                hint="two generations must fit at a time: ask for fewer target qualities, or use larger devices",
            ) from None
        return self._cupy.ndarray((nbytes,), self._cupy.uint8, memory)

    def share(self, segment: Any) -> bytes:
        with self._device:
            return bytes(self._cupy.cuda.runtime.ipcGetMemHandle(segment.data.ptr))

    def attach(self, handle: bytes, nbytes: int) -> Any:
        runtime = self._cupy.cuda.runtime
        try:
            with self._device:
                address = runtime.ipcOpenMemHandle(handle)
        except runtime.CUDARuntimeError as error:
            raise SourceError(
                f"the weights of another process cannot be opened on {self._device}: {error}",
                hint="open them on the device they are on, in a process other than their own",
            ) from None
        owner = _Attached(runtime, address)
        memory = self._cupy.cuda.UnownedMemory(address, max(nbytes, 1), owner, self._device.id)
        return self._cupy.ndarray((nbytes,), self._cupy.uint8, self._cupy.cuda.MemoryPointer(memory, 0))

    def address(self, array: Any) -> int:
        return int(array.data.ptr)

    def upload(self, host: npt.NDArray[Any]) -> Any:
        copy = self.zeros(host.shape, host.dtype)
        with self._device:
            copy.set(host)
        return copy

    def download(self, array: Any) -> npt.NDArray[Any]:
        with self._device:
            host: npt.NDArray[Any] = self._cupy.asnumpy(array)
        return host

    def launch(self, module: str, kernel: str, geometry: Geometry, arguments: Sequence[np.generic]) -> None:
        with self._device:
            function = self._module(module).get_function(kernel)
            if geometry.shared_bytes > _STATIC_LIMIT:
                function.max_dynamic_shared_size_bytes = geometry.shared_bytes
            function((geometry.grid,), (geometry.block,), tuple(arguments), shared_mem=geometry.shared_bytes)

    def matmul(self, a: Any, b: Any) -> Any:
        with self._device, self._room():
            return self._cupy.ascontiguousarray(self._cupy.matmul(a, b))

    def inverse_dct(self, coefficients: Any, axes: tuple[int, int]) -> Any:
        with self._device, self._room():
            weights = xp.fft().idctn(coefficients, type=2, axes=axes, norm="ortho")
            # The library hands out whatever order of axes its last transform left.
            return self._cupy.ascontiguousarray(weights, self._cupy.float32)

    def synchronize(self) -> None:
        with self._device:
            self._cupy.cuda.get_current_stream().synchronize()

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except self._cupy.cuda.memory.OutOfMemoryError as error:
            raise CapacityError(f"no room on {self._device}: {error}", hint="free memory there, or load less") from None

    def _module(self, name: str) -> Any:
        if name not in self._modules:
            self._modules[name] = self._cupy.RawModule(code=source(name), options=OPTIONS, backend="nvrtc")
        return self._modules[name]


class _Attached:
    """Memory of another process, let go of with the last array on it."""

    def __init__(self, runtime: Any, address: int) -> None:
        self._close = weakref.finalize(self, runtime.ipcCloseMemHandle, address)
