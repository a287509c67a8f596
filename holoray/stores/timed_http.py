"""HTTP connections whose answers have a deadline, and not only each read from the socket a timeout."""

from __future__ import annotations

import io
import socket
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from holoray.stores.limits import ReadLimits

if TYPE_CHECKING:
    _Connection = HTTPConnection
else:
    _Connection = object

_CONNECTIONS: Final = 64


def pool_manager(limits: ReadLimits) -> urllib3.PoolManager:
    """Connections by host, kept and shared by threads; a request's read timeout is for its whole answer."""
    manager = urllib3.PoolManager(maxsize=_CONNECTIONS)
    manager.pool_classes_by_scheme = {
        "http": _pool(urllib3.HTTPConnectionPool, _TimedHTTPConnection, limits.stall_s),
        "https": _pool(urllib3.HTTPSConnectionPool, _TimedHTTPSConnection, limits.stall_s),
    }
    return manager


def peer_of(response: urllib3.BaseHTTPResponse) -> str:
    """The IP address that an answer came from; before its body is read to the end."""
    connection = response.connection
    if not isinstance(connection, _Timed):
        raise TypeError("an answer without its connection")
    return connection.peer


def _pool(kind: type, connection: type, stall_s: float) -> Any:
    return type(kind.__name__, (kind,), {"ConnectionCls": staticmethod(partial(connection, stall_s=stall_s))})


class _Timed(_Connection):
    """Puts a TimedSocket into the place of the connection's own, once it is connected."""

    def __init__(self, *args: Any, stall_s: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._stall_s = stall_s

    def connect(self) -> None:
        super().connect()
        self.peer: str = self.sock.getpeername()[0]  # the socket may be closed before its answer is looked at
        self.sock: Any = TimedSocket(self.sock, self._stall_s)


class _TimedHTTPConnection(_Timed, HTTPConnection):
    pass


class _TimedHTTPSConnection(_Timed, HTTPSConnection):
    pass


class TimedSocket:
    """A connected socket; what `settimeout` is given is for all reads from then on together.

    `http.client` reads an answer, however long, through one file of the socket, and a timeout of the socket begins
    anew with each byte. Reads raise TimeoutError after the deadline, or after `stall_s` without a byte.
    """

    def __init__(self, sock: socket.socket, stall_s: float) -> None:
        self._sock = sock
        self._stall_s = stall_s
        self._expires = time.monotonic() + (sock.gettimeout() or 0.0)

    def settimeout(self, seconds: float) -> None:
        self._expires = time.monotonic() + seconds
        self._sock.settimeout(seconds)

    def arm(self) -> None:
        """Give the next read what is left."""
        left = self._expires - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer took too long")
        self._sock.settimeout(min(left, self._stall_s))

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedFile(self, self._sock.makefile(mode, buffering=0)))  # type: ignore[call-overload]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


class _TimedFile(io.RawIOBase):
    def __init__(self, timed: TimedSocket, file: io.RawIOBase) -> None:
        self._timed = timed
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, out: Any) -> int | None:
        self._timed.arm()
        return self._file.readinto(out)

    def close(self) -> None:
        self._file.close()
        super().close()
