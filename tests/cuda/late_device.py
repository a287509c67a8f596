"""A device on which nothing happens before somebody waits for it, with little memory of which every byte is counted.

Copies and kernels wait in the queue of their stream until that is waited for, or an event behind them was asked for.
Memory follows the rule of `Device`: what is freed goes to the next array of the stream that it was made on. So a
staging buffer that is reused too early, an array that is used on another stream too early or read before its work was
waited for: each gives wrong bytes. Of kernels it has the quick twins of `planes`.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.fft

from holoray.errors import CapacityError
from holoray.kernels import copies
from holoray.kernels.device import Geometry
from holoray.kernels.planes_launch import RUN, kernels_for, launch_on_cpu
from holoray.kernels.pools import Bytes, Event, StagingPool, StreamPool, host_memory

POISON = 0xA5
ALIGNMENT = 256


class LateStream:
    """Work in order, none of it done yet."""

    def __init__(self) -> None:
        self._queue: list[Callable[[], object]] = []
        self._begun = self._done = 0
        self._lock = threading.RLock()
        self.free: dict[int, list[Bytes]] = defaultdict(list)
        self.most_queued = 0

    def put(self, work: Callable[[], object]) -> None:
        with self._lock:
            self._queue.append(work)
            self._begun += 1
            self.most_queued = max(self.most_queued, len(self._queue))

    def to_device(self, address: int, buffer: Bytes) -> None:
        self.put(partial(ctypes.memmove, address, buffer.ctypes.data, buffer.size))

    def to_host(self, buffer: Bytes, address: int) -> None:
        self.put(partial(ctypes.memmove, buffer.ctypes.data, address, buffer.size))

    def record(self) -> Event:
        return LateEvent(self, self._begun)

    def synchronize(self) -> None:
        self.run_to(self._begun)

    def run_to(self, place: int) -> None:
        with self._lock:
            while self._done < place:
                self._queue.pop(0)()
                self._done += 1

    def has_done(self, place: int) -> bool:
        return self._done >= place


class LateEvent:
    """Done when its stream got there: some time after it was asked for."""

    ASKED = 3

    def __init__(self, stream: LateStream, place: int) -> None:
        self._stream, self._place, self._asked = stream, place, 0

    @property
    def done(self) -> bool:
        self._asked += 1
        if self._asked > self.ASKED:
            self._stream.run_to(self._place)
        return self._stream.has_done(self._place)


class Block:
    """Memory of the device under arrays: NumPy keeps this object as the base of all views."""

    def __init__(self, memory: Bytes, nbytes: int) -> None:
        address = -(-memory.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.__array_interface__ = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}


class LateDevice:
    """`limit_bytes` of memory; `lack(bytes)` may say for any allocation that there is no room for it."""

    number = 0
    multiprocessors = 2

    def __init__(self, limit_bytes: int = 1 << 30, *, streams: int = 8, staging_bytes: int = 16 << 20) -> None:
        self.limit_bytes, self.used_bytes, self.peak_bytes = limit_bytes, 0, 0
        self.lack: Callable[[int], bool] = lambda nbytes: False
        self.names: Counter[str] = Counter()
        self.staging = StagingPool(staging_bytes, host_memory)
        self.streams: list[LateStream] = []
        self._common = LateStream()
        self._pool = StreamPool(streams, self._new_stream)
        self._thread = threading.local()
        self._lock = threading.RLock()

    def _new_stream(self) -> LateStream:
        self.streams.append(LateStream())
        return self.streams[-1]

    @property
    def _stream(self) -> LateStream:
        return getattr(self._thread, "stream", self._common)

    @contextmanager
    def _current(self, stream: LateStream) -> Iterator[None]:
        before, self._thread.stream = self._stream, stream
        try:
            yield
        finally:
            self._thread.stream = before

    @contextmanager
    def stream(self) -> Iterator[None]:
        with self._pool.borrow(timeout_s=60) as stream, self._current(stream):
            try:
                yield
            finally:
                stream.synchronize()

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._current(self._common):
            yield
            self._common.synchronize()

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        with self._lock:
            self.names[name] += 1
        yield

    def free_bytes(self) -> int:
        return self.limit_bytes - self.used_bytes

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        array = self._empty(shape, dtype)
        self._stream.put(partial(ctypes.memset, array.ctypes.data, 0, array.nbytes))
        return array

    def _empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        with self._lock:
            if self.used_bytes + nbytes > self.limit_bytes or self.lack(nbytes):
                raise CapacityError(f"no room for {nbytes} bytes", hint="free memory there, or load less")
            self.used_bytes += nbytes
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)
            kept = self._stream.free[nbytes]
            memory = kept.pop() if kept else np.full(nbytes + ALIGNMENT, POISON, np.uint8)
        block = Block(memory, nbytes)
        weakref.finalize(block, self._free, self._stream, memory, nbytes)
        return np.asarray(block).view(dtype).reshape(shape)

    def _free(self, stream: LateStream, memory: Bytes, nbytes: int) -> None:
        with self._lock:
            self.used_bytes -= nbytes
            stream.free[nbytes].append(memory)

    def copy(self, array: npt.NDArray[Any], to: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        to = self._empty(array.shape, array.dtype) if to is None else to
        self._stream.put(partial(ctypes.memmove, to.ctypes.data, array.ctypes.data, array.nbytes))
        return to

    def clear(self, array: npt.NDArray[Any]) -> None:
        self._stream.put(partial(ctypes.memset, array.ctypes.data, 0, array.nbytes))

    def segment(self, nbytes: int) -> npt.NDArray[Any]:
        array = self.zeros((nbytes,), np.uint8)
        self.synchronize()
        return array

    def share(self, segment: npt.NDArray[Any]) -> bytes:
        raise AssertionError("this device is of one process")

    def attach(self, handle: bytes, nbytes: int) -> npt.NDArray[Any]:
        raise AssertionError("this device is of one process")

    def address(self, array: npt.NDArray[Any]) -> int:
        return int(array.ctypes.data)

    def upload(self, host: npt.NDArray[Any]) -> npt.NDArray[Any]:
        copy = self._empty(host.shape, host.dtype)
        self.write(copy, host)
        return copy

    def write(self, array: npt.NDArray[Any], host: npt.NDArray[Any]) -> None:
        with self.range("upload"):
            copies.write(self._stream, self.staging, self.address(array), np.ascontiguousarray(host))

    def download(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        host = np.empty(array.shape, array.dtype)
        with self.range("download"):
            copies.read(self._stream, self.staging, host, self.address(array))
        return host

    def launch(self, module: str, kernel: str, geometry: Geometry, arguments: Sequence[np.generic]) -> None:
        records, bad, blocks = (int(argument) for argument in arguments)
        self._stream.put(partial(_decode, (module, kernel), records, bad, geometry.grid // blocks))

    def matmul(self, a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[Any]:
        self.synchronize()
        return self.upload(a @ b)

    def inverse_dct(self, coefficients: npt.NDArray[Any], axes: tuple[int, int]) -> npt.NDArray[Any]:
        self.synchronize()
        return self.upload(scipy.fft.idctn(coefficients, type=2, axes=axes, norm="ortho", workers=1))

    def synchronize(self) -> None:
        self._stream.synchronize()


def _decode(step: tuple[str, str], records: int, bad: int, count: int) -> None:
    """The twin of all steps of a run, when its last one is due."""
    for n in range(count):
        record = np.ctypeslib.as_array((ctypes.c_uint8 * RUN.itemsize).from_address(records + n * RUN.itemsize)).view(
            RUN
        )
        if kernels_for(int(record["held"][0]), int(record["layers"][0]))[-1] == step:
            ctypes.c_uint32.from_address(bad + 4 * n).value = int(launch_on_cpu(record)[0])
