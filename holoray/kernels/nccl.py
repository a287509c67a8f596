"""The communicator of GPUs: NCCL through CuPy, on a stream of its own, so that packing goes on meanwhile.

NCCL does not notice that a process on the same machine died: its kernels then wait for ever. So whoever waits polls an
event of the stream, NCCL's own errors and the `stop` of the group, and aborts the communicator, which ends the kernels.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np

from holoray.errors import UsageError, WorkerLostError
from holoray.kernels import xp
from holoray.kernels.communicator import Patience, check_unsigned
from holoray.kernels.device import Device

_POLL_S: Final = 0.0002
_JOIN_POLL_S: Final = 0.01
_ID_BYTES: Final = 128
_CONNECT: Final = "NCCL_RUNTIME_CONNECT"


class NcclCommunicators:
    """Groups of GPUs, in one machine or many: whatever NCCL finds between them."""

    def __init__(self, timeout_s: float = 60.0) -> None:
        self.timeout_s = timeout_s

    def ticket(self) -> bytes:
        return bytes(xp.nccl().get_unique_id())

    def join(self, ticket: bytes, *, rank: int, size: int, device: Device, stop: threading.Event) -> NcclCommunicator:
        if not 0 <= rank < size or len(ticket) != _ID_BYTES:
            raise UsageError(f"rank {rank} of {size} with a ticket of {len(ticket)} bytes is no member of a group")
        os.environ.setdefault(_CONNECT, "0")  # else the first sum connects, and nothing ends that wait
        patience = Patience(stop, self.timeout_s)
        entry = _Entry(ticket, rank, size, device)
        while entry.thread.is_alive():
            entry.thread.join(_JOIN_POLL_S)
            try:
                patience.check()
            except WorkerLostError:
                entry.leave()
                raise
        return NcclCommunicator(rank, size, device, entry.result(), stop, self.timeout_s)


class NcclCommunicator:
    """One GPU's end of a group."""

    def __init__(
        self, rank: int, size: int, device: Device, handle: Any, stop: threading.Event, timeout_s: float
    ) -> None:
        self.rank, self.size = rank, size
        self._device, self._handle, self._stop, self._timeout_s = device, handle, stop, timeout_s
        self._nccl, self._cuda = xp.nccl(), xp.cupy().cuda
        self._kinds = {
            np.dtype(np.uint8): self._nccl.NCCL_UINT8,
            np.dtype(np.uint32): self._nccl.NCCL_UINT32,
            np.dtype(np.uint64): self._nccl.NCCL_UINT64,
        }
        with self._cuda.Device(device.number):
            self._stream = self._cuda.Stream(non_blocking=True)

    def all_reduce(self, array: Any) -> _NcclReduction:
        check_unsigned(array)
        self._check(Patience(self._stop, self._timeout_s))
        at = self._device.address(array)
        with self._cuda.Device(self._device.number):
            self._stream.wait_event(self._cuda.get_current_stream().record())
            with self._errors():
                self._handle.allReduce(
                    at, at, array.size, self._kinds[array.dtype], self._nccl.NCCL_SUM, self._stream.ptr
                )
            return _NcclReduction(self, array, self._stream.record())

    def wait(self, event: Any) -> None:
        """Return when the stream has come to this event."""
        patience = Patience(self._stop, self._timeout_s)
        while not event.done:
            self._check(patience)
            time.sleep(_POLL_S)
        self._check(patience)

    def abort(self) -> None:
        self._stop.set()

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is None:
            return
        if self._stop.is_set():
            handle.abort()  # destroying would wait for kernels that wait for the dead
        else:
            handle.destroy()

    def _check(self, patience: Patience) -> None:
        """Raise WorkerLostError, with the kernels of the group ended, unless all is well."""
        if self._handle is None:
            raise WorkerLostError("this GPU has left its group")
        try:
            patience.check()
            with self._errors():
                self._handle.check_async_error()
        except WorkerLostError:
            self._stop.set()
            self.close()
            raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._nccl.NcclError as error:
            raise WorkerLostError(f"NCCL failed: {error}", hint="see `holoray doctor`") from None


class _NcclReduction:
    """Keeps the array until it is summed."""

    def __init__(self, communicator: NcclCommunicator, array: Any, event: Any) -> None:
        self._communicator, self._array, self._event = communicator, array, event

    def wait(self) -> None:
        self._communicator.wait(self._event)


class _Entry:
    """Joining a group in a thread of its own: NCCL gives no way to end that wait, so it may have to be left behind."""

    def __init__(self, ticket: bytes, rank: int, size: int, device: Device) -> None:
        self._lock = threading.Lock()
        self._handle: Any = None
        self._error: Exception | None = None
        self._left = False
        arguments = (size, ticket, rank)
        self.thread = threading.Thread(target=self._join, args=(arguments, device.number), daemon=True)
        self.thread.start()

    def _join(self, arguments: tuple[Any, ...], device: int) -> None:
        nccl = xp.nccl()
        try:
            with xp.cupy().cuda.Device(device):
                handle = nccl.NcclCommunicator(*arguments)
        except Exception as error:  # told by `result`
            self._error = error
            return
        with self._lock:
            self._handle = handle
            if self._left:
                handle.abort()

    def leave(self) -> None:
        """Nobody waits any more: whatever comes is aborted."""
        with self._lock:
            self._left = True
            if self._handle is not None:
                self._handle.abort()

    def result(self) -> Any:
        if self._error is not None:
            raise WorkerLostError(f"NCCL could not join the devices: {self._error}", hint="see `holoray doctor`")
        return self._handle
