"""A server that answers HTTP requests with whatever bytes a test gives it, at whatever pace."""

from __future__ import annotations

import socket
import socketserver
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Answer = Callable[[socket.socket, bytes], object]
"""Called with the connection and the request's head; the connection is closed when it returns."""

BYTES = 1000  # of the blob that the server pretends to have
PIECE = b"\0" * (1 << 16)


class HostileServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answer: Answer, host: str = "127.0.0.1", context: ssl.SSLContext | None = None) -> None:
        super().__init__((host, 0), _Handler)
        self.answer = answer
        self.context = context
        self.requests: list[bytes] = []
        self.ending = threading.Event()
        scheme = "https" if context else "http"
        self.host_and_port = f"{host}:{self.server_address[1]}"
        self.url = f"{scheme}://{self.host_and_port}"


class _Handler(socketserver.BaseRequestHandler):
    server: HostileServer

    def handle(self) -> None:
        with suppress(OSError):  # clients that hang up are what most tests are about
            connection = self.request
            if self.server.context is not None:
                connection = self.server.context.wrap_socket(connection, server_side=True)
            head = b""
            while b"\r\n\r\n" not in head and (got := connection.recv(65536)):
                head += got
            self.server.requests.append(head)
            if head:
                self.server.answer(connection, head)
            connection.close()


@contextmanager
def hostile(answer: Answer, host: str = "127.0.0.1", context: ssl.SSLContext | None = None) -> Iterator[HostileServer]:
    with HostileServer(answer, host, context) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield server
        finally:
            server.ending.set()
            server.shutdown()


def head(*lines: str, status: str = "206 Partial Content") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode("latin-1")


def part(first: int, length: int, *more: str, total: int = BYTES) -> bytes:
    """The head of an honest answer to a range."""
    return head(f"Content-Range: bytes {first}-{first + length - 1}/{total}", f"Content-Length: {length}", *more)


def says(data: bytes) -> Answer:
    return lambda connection, request: connection.sendall(data)


def endless(beginning: bytes, piece: bytes = PIECE) -> Answer:
    """Sends `piece` until the client goes away."""

    def answer(connection: socket.socket, request: bytes) -> None:
        connection.sendall(beginning)
        while True:
            connection.sendall(piece)

    return answer


def drip(beginning: bytes, slowly: bytes) -> Answer:
    """Every byte comes well before a socket's timeout, and the last one never."""

    def answer(connection: socket.socket, request: bytes) -> None:
        connection.sendall(beginning)
        for _ in range(2000):
            for byte in slowly:
                connection.sendall(bytes([byte]))
                time.sleep(0.01)

    return answer


def resets(beginning: bytes) -> Answer:
    def answer(connection: socket.socket, request: bytes) -> None:
        connection.sendall(beginning)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return answer


def hangs(beginning: bytes = b"") -> Answer:
    def answer(connection: socket.socket, request: bytes) -> None:
        connection.sendall(beginning)
        connection.recv(1)  # until the client hangs up

    return answer


def redirects(location: str, status: int = 302, *more: str) -> Answer:
    return says(head(f"Location: {location}", "Content-Length: 0", *more, status=f"{status} Moved"))
