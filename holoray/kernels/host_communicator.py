"""A communicator over TCP between processes of one machine: for devices without NCCL, and wherever it does not work.

Rank 0 collects the arrays of all, sums, and hands the sum back. A process that dies closes its sockets, which its peers
notice at once; rank 0 then leaves, so that all do. What is not of the group does not know its secret.
"""

from __future__ import annotations

import secrets
import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from holoray.errors import IntegrityError, UsageError, WorkerLostError
from holoray.kernels.communicator import Patience, check_unsigned
from holoray.kernels.device import Device

_POLL_S: Final = 0.02
_STRANGER_S: Final = 2.0
_SECRET_BYTES: Final = 16
_TICKET: Final = struct.Struct("<16sH")
_HELLO: Final = struct.Struct("<16sI")
_HEADER: Final = struct.Struct("<QI")
_WELCOME: Final = b"\1"


class HostCommunicators:
    """Groups on this machine, over its loopback interface."""

    def __init__(self, timeout_s: float = 60.0) -> None:
        self.timeout_s = timeout_s
        self._waiting: tuple[bytes, socket.socket] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return HostCommunicators, (self.timeout_s,)

    def ticket(self) -> bytes:
        self._forget()
        listener = socket.create_server(("127.0.0.1", 0))
        ticket = _TICKET.pack(secrets.token_bytes(_SECRET_BYTES), listener.getsockname()[1])
        self._waiting = ticket, listener
        return ticket

    def join(self, ticket: bytes, *, rank: int, size: int, device: Device, stop: threading.Event) -> HostCommunicator:
        if not 0 <= rank < size or len(ticket) != _TICKET.size:
            raise UsageError(f"rank {rank} of {size} with a ticket of {len(ticket)} bytes is no member of a group")
        secret, port = _TICKET.unpack(ticket)
        patience = Patience(stop, self.timeout_s)
        wires = self._gather(ticket, secret, size, patience) if rank == 0 else [_call(secret, port, rank, patience)]
        return HostCommunicator(rank, size, device, wires, stop, self.timeout_s)

    def _gather(self, ticket: bytes, secret: bytes, size: int, patience: Patience) -> list[_Wire]:
        """Wires to ranks 1, 2, ...; who does not say the secret is sent away."""
        if self._waiting is None or self._waiting[0] != ticket:
            raise UsageError("rank 0 is the process that made the ticket, and joins once")
        listener = self._waiting[1]
        listener.settimeout(_POLL_S)
        found: dict[int, _Wire] = {}
        try:
            while len(found) < size - 1:
                patience.check()
                with suppress(TimeoutError):
                    wire = _Wire(listener.accept()[0])
                    rank = _identify(wire, secret, patience.stop)
                    if 0 < rank < size and rank not in found:
                        found[rank] = wire
                    else:
                        wire.close()
            for wire in found.values():
                wire.send(_WELCOME, patience)
        except BaseException:
            _close(found.values())
            raise
        finally:
            self._forget()
        return [found[rank] for rank in sorted(found)]

    def _forget(self) -> None:
        if self._waiting is not None:
            self._waiting[1].close()
            self._waiting = None


class HostCommunicator:
    """Rank 0 has a wire to every other member, each other member one to rank 0."""

    def __init__(
        self, rank: int, size: int, device: Device, wires: list[_Wire], stop: threading.Event, timeout_s: float
    ) -> None:
        self.rank, self.size = rank, size
        self._device, self._wires, self._stop, self._timeout_s = device, wires, stop, timeout_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="holoray-combine")

    def all_reduce(self, array: Any) -> _HostReduction:
        check_unsigned(array)
        own = self._device.download(array)  # here, since streams belong to threads
        return _HostReduction(self._device, array, self._thread.submit(self._sum, own))

    def abort(self) -> None:
        self._stop.set()

    def close(self) -> None:
        self._stop.set()
        self._thread.shutdown(wait=True)
        _close(self._wires)

    def _sum(self, own: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """In the thread of the group; who fails leaves, so that the others do."""
        patience = Patience(self._stop, self._timeout_s)
        header = _HEADER.pack(own.nbytes, own.itemsize)
        try:
            if self.rank:
                self._wires[0].send(header, patience)
                self._wires[0].send(_bytes(own), patience)
                self._wires[0].receive(_bytes(own), patience)
                return own
            other = np.empty_like(own)
            for wire in self._wires:
                if wire.take(_HEADER.size, patience) != header:
                    raise IntegrityError("members of a group sum arrays of different sizes")
                wire.receive(_bytes(other), patience)
                np.add(own, other, out=own)
            for wire in self._wires:
                wire.send(_bytes(own), patience)
        except BaseException:
            self._stop.set()
            _close(self._wires)
            raise
        return own


class _HostReduction:
    def __init__(self, device: Device, array: Any, sum_: Future[npt.NDArray[Any]]) -> None:
        self._device, self._array, self._sum = device, array, sum_

    def wait(self) -> None:
        self._array[...] = self._device.upload(self._sum.result())
        self._device.synchronize()


class _Wire:
    """A socket whose waits can be ended."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        connection.settimeout(_POLL_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: bytes | memoryview, patience: Patience) -> None:
        rest = memoryview(data)
        while rest:
            patience.check()
            with _attempt():
                rest = rest[self._socket.send(rest) :]

    def receive(self, into: memoryview, patience: Patience) -> None:
        while into:
            patience.check()
            with _attempt():
                count = self._socket.recv_into(into)
                if count == 0:
                    raise ConnectionResetError("closed")
                into = into[count:]

    def take(self, count: int, patience: Patience) -> bytes:
        data = bytearray(count)
        self.receive(memoryview(data), patience)
        return bytes(data)

    def close(self) -> None:
        self._socket.close()


@contextmanager
def _attempt() -> Iterator[None]:
    """One try, which may be over before anything came; a connection that breaks is a member that is lost."""
    try:
        yield
    except TimeoutError:
        pass
    except OSError as error:
        raise WorkerLostError(f"a device of the group is gone: {error}") from None


def _identify(wire: _Wire, secret: bytes, stop: threading.Event) -> int:
    """The rank of who calls, or -1."""
    try:
        said, rank = _HELLO.unpack(wire.take(_HELLO.size, Patience(stop, _STRANGER_S)))
    except WorkerLostError:
        return -1
    return int(rank) if secrets.compare_digest(said, secret) else -1


def _call(secret: bytes, port: int, rank: int, patience: Patience) -> _Wire:
    """A wire to rank 0, which has seen all members."""
    try:
        wire = _Wire(socket.create_connection(("127.0.0.1", port), patience.timeout_s))
    except OSError as error:
        raise WorkerLostError(f"the first device of the group is gone: {error}") from None
    try:
        wire.send(_HELLO.pack(secret, rank), patience)
        wire.take(len(_WELCOME), patience)
    except BaseException:
        wire.close()
        raise
    return wire


def _bytes(array: npt.NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _close(wires: Iterable[_Wire]) -> None:
    for wire in wires:
        wire.close()
