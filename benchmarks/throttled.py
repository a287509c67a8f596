"""A file server on loopback behind one token bucket: HTTP with ranges, and as much of S3 as reading needs."""

from __future__ import annotations

import multiprocessing
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

CHUNK: Final = 1 << 18
_CATCH_UP_S: Final = 0.05
UNLIMITED: Final = float("inf")
KEY: Final = "loopback"


class TokenBucket:
    """Lets `rate.value` bytes a second pass, over all threads together.

    While something is under way, a server that was woken late may catch up, since a link does not wait for a
    processor that loaders keep busy; a link that idles saves up nothing. So no transfer is ever faster than the rate.
    """

    def __init__(self, rate: Synchronized[float]) -> None:
        self._rate = rate
        self._due = 0.0
        self._active = 0
        self._lock = threading.Lock()

    @contextmanager
    def transfer(self) -> Iterator[None]:
        """Around the `take`s of one answer."""
        with self._lock:
            if not self._active:
                self._due = time.perf_counter()
            self._active += 1
        try:
            yield
        finally:
            with self._lock:
                self._active -= 1

    def take(self, nbytes: int) -> None:
        """Blocks until so many bytes may pass."""
        with self._lock:
            now = time.perf_counter()
            self._due = max(self._due, now - _CATCH_UP_S) + nbytes / self._rate.value
            wait = self._due - now
        if wait > 0:
            time.sleep(wait)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, directory: Path, bucket: TokenBucket) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory, self.bucket = directory, bucket


class _Handler(BaseHTTPRequestHandler):
    """`/BUCKET/KEY` is a file below the directory: the path style of S3 is a plain file server's."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # as real servers have it: else small answers wait 40 ms for an acknowledgement
    server: _Server

    def log_message(self, *_: object) -> None:
        """Silence."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path = (self.server.directory / unquote(parts.path).strip("/")).resolve()
        query = parse_qs(parts.query)
        if not path.is_relative_to(self.server.directory):
            self._answer(403)
        elif "list-type" in query and path.is_dir():
            self._answer(200, body=_listing(path, query.get("prefix", [""])[0]), kind="application/xml")
        elif path.is_file():
            self._send(path)
        else:
            self._answer(404)

    def _send(self, path: Path) -> None:
        file = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(file).st_size
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if wanted is None:
                first, end = 0, size
            else:
                first, end = int(wanted[1]), min(int(wanted[2] or size) + 1, size)
            if first >= size > 0:
                return self._answer(416)
            headers = {"Content-Range": f"bytes {first}-{end - 1}/{size}"} if wanted else {}
            self._head(206 if wanted else 200, end - first, headers)
            if self.command == "GET":
                self._copy(file, first, end)
        except (BrokenPipeError, ConnectionResetError):  # whoever asked has seen enough
            self.close_connection = True
        finally:
            os.close(file)

    def _copy(self, file: int, first: int, end: int) -> None:
        bucket = self.server.bucket
        with bucket.transfer():
            for start in range(first, end, CHUNK):
                stop = min(start + CHUNK, end)
                bucket.take(stop - start)
                while start < stop:
                    start += os.sendfile(self.connection.fileno(), file, start, stop - start)

    def _answer(self, status: int, body: bytes = b"", kind: str = "text/plain") -> None:
        self._head(status, len(body), {"Content-Type": kind})
        if self.command == "GET":
            self.wfile.write(body)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        fixed = {"Content-Length": str(length), "Accept-Ranges": "bytes", "ETag": '"0"', "Last-Modified": _THEN}
        for name, value in (fixed | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.flush()


_THEN: Final = "Thu, 01 Jan 2026 00:00:00 GMT"


def _listing(bucket: Path, prefix: str) -> bytes:
    """The answer to ListObjectsV2."""
    keys = [(p.relative_to(bucket).as_posix(), p.stat().st_size) for p in sorted(bucket.rglob("*")) if p.is_file()]
    contents = "".join(
        f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f'<ETag>"0"</ETag><StorageClass>STANDARD</StorageClass></Contents>'
        for key, size in keys
        if key.startswith(prefix)
    )
    name = escape(bucket.name)
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{name}</Name><Prefix>{escape(prefix)}</Prefix><IsTruncated>false</IsTruncated>{contents}"
        "</ListBucketResult>"
    ).encode()


@dataclass(frozen=True)
class Throttled:
    """A running server; `limit` sets the rate for what is sent from now on."""

    host: str
    rate: Synchronized[float]

    def limit(self, bytes_per_s: float) -> None:
        self.rate.value = bytes_per_s

    def http(self, path: str) -> str:
        return f"http://{self.host}/{path}"

    def s3(self, path: str) -> str:
        """For Arrow: endpoint and (made up) credentials are in the URI. The first part of the path is the bucket."""
        return f"s3://{KEY}:{KEY}@{path}?scheme=http&endpoint_override={self.host}&region=us-east-1"


@contextmanager
def throttled(directory: Path) -> Iterator[Throttled]:
    """Serve a directory from a process of its own, without limit at first."""
    context = multiprocessing.get_context("spawn")
    rate = context.Value("d", UNLIMITED)
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(directory.resolve(), rate, there), daemon=True)
    process.start()
    try:
        yield Throttled(f"127.0.0.1:{here.recv()}", rate)
    finally:
        process.terminate()
        process.join()


def _serve(directory: Path, rate: Synchronized[float], port: Connection) -> None:
    server = _Server(directory, TokenBucket(rate))
    port.send(server.server_port)
    server.serve_forever()
