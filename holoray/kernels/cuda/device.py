"""One CUDA device behind the interface `Device`, through CuPy.

The thread's stream is CuPy's current one, so expressions on CuPy arrays are queued in order with the verbs here. CuPy's
memory pool keeps freed memory by the stream it was allocated on and hands it out again on that stream only, and gives
all it keeps back to the driver (which waits for the device) before it says that there is no room. That makes the rule
of `Device` hold: a temporary array of a stream may be dropped while its work is still queued.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from holoray.errors import CapacityError, DeviceError, SourceError
from holoray.kernels import copies, xp
from holoray.kernels.cuda.source import OPTIONS, source
from holoray.kernels.device import Geometry
from holoray.kernels.pools import Bytes, Event, StagingPool, StreamPool, pinned_memory

_STATIC_LIMIT = 48 << 10
"""Dynamic shared memory beyond this has to be asked for."""
_MORE_STREAMS: Final = 2
"""Streams beyond one for each core: a thread that waits for its stream leaves a core to another one."""
_STAGED_PIECES: Final = 2
_PROBE_BYTES: Final = 64 << 20
_PROBES: Final = 5
_SHARED_ALIGNMENT: Final = 2 << 20
"""Bytes: the driver cuts smaller allocations out of ones of this size (CUDA programming guide, interprocess memory)."""
_NO_MEMORY: Final = 2
"""cudaErrorMemoryAllocation, for which CuPy has no name."""


class CudaDevice:
    """Device `number`. Kernels are compiled at their first launch (CuPy keeps cubins in its cache on disk).

    `streams`: how many threads may be inside `stream` at once (default: one a core and some more). Page-locked memory
    is bounded by two pieces a stream.
    """

    def __init__(self, number: int = 0, *, streams: int | None = None) -> None:
        self._cupy = xp.cupy()
        self.number = number
        self._device = self._cupy.cuda.Device(xp.check_device(number))
        self.multiprocessors = int(self._device.attributes["MultiProcessorCount"])
        self._nvtx = xp.nvtx()
        self._modules: dict[str, Any] = {}
        self._functions: dict[str, Any] = {}
        self._compiling = threading.Lock()
        count = streams or len(os.sched_getaffinity(0)) + _MORE_STREAMS
        with self._device:
            self._streams = StreamPool(count, lambda: self._cupy.cuda.Stream(non_blocking=True))
        self.staging = StagingPool(count * _STAGED_PIECES * copies.PIECE_BYTES, self._pinned)

    @contextmanager
    def stream(self) -> Iterator[None]:
        with self._streams.borrow() as stream, self._device, stream:
            try:
                yield
            finally:
                with self._errors():
                    stream.synchronize()

    @contextmanager
    def shared(self) -> Iterator[None]:
        stream = self._cupy.cuda.Stream.null
        with self._device, stream:
            yield
            with self._errors():
                stream.synchronize()

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        if self._nvtx is None:
            yield
            return
        self._nvtx.RangePush(name)
        try:
            yield
        finally:
            self._nvtx.RangePop()

    def free_bytes(self) -> int:
        with self._at_work():
            free, _ = self._cupy.cuda.runtime.memGetInfo()
            return int(free) + int(self._cupy.get_default_memory_pool().free_bytes())

    @property
    def stream_address(self) -> int:
        """The stream that work is queued on now, as the address that CUDA libraries take."""
        with self._device:
            return int(self._cupy.cuda.get_current_stream().ptr)

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        with self._at_work():
            return self._cupy.zeros(shape, dtype)

    def copy(self, array: Any, to: Any = None) -> Any:
        with self._at_work():
            if to is None:
                return array.copy()
            to[...] = array
            return to

    def clear(self, array: Any) -> None:
        with self._at_work():
            array[...] = 0

    def segment(self, nbytes: int) -> Any:
        # Not of CuPy's pool, whose allocations hold other arrays, too: a handle opens the whole allocation. What is
        # not a multiple of this size shares its allocation with others even so.
        room = -(-max(nbytes, 1) // _SHARED_ALIGNMENT) * _SHARED_ALIGNMENT
        with self._at_work("two generations must fit at a time: ask for fewer target qualities, or use larger devices"):
            # CuPy's pool gives back what it keeps only where it lacks memory itself.
            self._cupy.get_default_memory_pool().free_all_blocks()
            memory = self._cupy.cuda.MemoryPointer(self._cupy.cuda.Memory(room), 0)
            stream = self._cupy.cuda.get_current_stream()
            memory.memset_async(0, room, stream)
            stream.synchronize()  # or zeros come behind what other streams write
        return self._cupy.ndarray((nbytes,), self._cupy.uint8, memory)

    def share(self, segment: Any) -> bytes:
        with self._at_work():
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
        with self._at_work():
            copy = self._cupy.empty(host.shape, host.dtype)
        self.write(copy, host)
        return copy

    def write(self, array: Any, host: npt.NDArray[Any]) -> None:
        with self._at_work(), self.range("upload"):
            copies.write(self._copies(), self.staging, self.address(array), np.ascontiguousarray(host))

    def download(self, array: Any) -> npt.NDArray[Any]:
        host = np.empty(array.shape, array.dtype)
        with self._at_work(), self.range("download"):
            copies.read(self._copies(), self.staging, host, self.address(array))
        return host

    def launch(self, module: str, kernel: str, geometry: Geometry, arguments: Sequence[np.generic]) -> None:
        with self._at_work():
            function = self._function(module, kernel)
            if geometry.shared_bytes > _STATIC_LIMIT:
                function.max_dynamic_shared_size_bytes = geometry.shared_bytes
            function((geometry.grid,), (geometry.block,), tuple(arguments), shared_mem=geometry.shared_bytes)

    def matmul(self, a: Any, b: Any) -> Any:
        with self._at_work():
            return self._cupy.ascontiguousarray(self._cupy.matmul(a, b))

    def inverse_dct(self, coefficients: Any, axes: tuple[int, int]) -> Any:
        with self._at_work():
            weights = xp.fft().idctn(coefficients, type=2, axes=axes, norm="ortho")
            # The library hands out whatever order of axes its last transform left.
            return self._cupy.ascontiguousarray(weights, self._cupy.float32)

    def synchronize(self) -> None:
        with self._at_work():
            self._cupy.cuda.get_current_stream().synchronize()

    def _copies(self) -> CudaCopies:
        return CudaCopies(self._cupy, self._cupy.cuda.get_current_stream())

    def _pinned(self, nbytes: int) -> Bytes:
        with self._at_work("fewer page-locked bytes can be had: see `ulimit -l`, or use fewer threads"):
            return pinned_memory(self._cupy)(nbytes)

    @contextmanager
    def _at_work(self, hint: str = "free memory there, or load less") -> Iterator[None]:
        with self._device, self._errors(hint):
            yield

    @contextmanager
    def _errors(self, hint: str = "") -> Iterator[None]:
        """What CuPy raises, as errors of ours."""
        cuda = self._cupy.cuda
        try:
            yield
        except cuda.memory.OutOfMemoryError as error:
            raise CapacityError(f"no room on {self._device}: {error}", hint=hint) from None
        except (RuntimeError, ImportError, cuda.compiler.CompileException) as error:
            # Of the driver, the compiler, cuBLAS and cuFFT; ImportError is a library that is not found.
            if isinstance(error, cuda.runtime.CUDARuntimeError) and error.status == _NO_MEMORY:
                raise CapacityError(f"no room on {self._device}: {error}", hint=hint) from None
            raise DeviceError(f"{self._device} failed: {error}", hint="see `holoray doctor`") from error

    def _function(self, module: str, kernel: str) -> Any:
        with self._compiling:  # or several threads would compile the same
            if module not in self._modules:
                self._modules[module] = self._cupy.RawModule(code=source(module), options=OPTIONS, backend="nvrtc")
            if kernel not in self._functions:  # CuPy asks the driver each time
                self._functions[kernel] = self._modules[module].get_function(kernel)
            return self._functions[kernel]


class CudaCopies:
    """The copies of one CUDA stream, a `CopyStream`."""

    def __init__(self, cupy: Any, stream: Any) -> None:
        self._cuda, self._stream = cupy.cuda, stream

    def to_device(self, address: int, buffer: Bytes) -> None:
        kind = self._cuda.runtime.memcpyHostToDevice
        self._cuda.runtime.memcpyAsync(address, buffer.ctypes.data, buffer.size, kind, self._stream.ptr)

    def to_host(self, buffer: Bytes, address: int) -> None:
        kind = self._cuda.runtime.memcpyDeviceToHost
        self._cuda.runtime.memcpyAsync(buffer.ctypes.data, address, buffer.size, kind, self._stream.ptr)

    def record(self) -> Event:
        event: Event = self._stream.record(self._cuda.Event(disable_timing=True))
        return event

    def synchronize(self) -> None:
        self._stream.synchronize()


class _Attached:
    """Memory of another process, let go of with the last array on it."""

    def __init__(self, runtime: Any, address: int) -> None:
        self._close = weakref.finalize(self, runtime.ipcCloseMemHandle, address)


def pinned_copy_speed(cupy: Any) -> float:
    """Bytes a second from page-locked memory to the current device, the best of some copies of 64 MiB."""
    source, stream = pinned_memory(cupy)(_PROBE_BYTES), cupy.cuda.Stream(non_blocking=True)
    target = cupy.zeros(_PROBE_BYTES, cupy.uint8)
    cupy.cuda.Stream.null.synchronize()  # whose work a stream that does not block would not wait for
    best = float("inf")
    for _ in range(_PROBES):
        start = time.perf_counter()
        target.set(source, stream=stream)
        stream.synchronize()
        best = min(best, time.perf_counter() - start)
    return _PROBE_BYTES / best
