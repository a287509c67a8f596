"""Servers on loopback for tests of remote stores: HTTP with ranges, which can be told to misbehave, and S3 (moto)."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from pyarrow import fs


class FileServer(ThreadingHTTPServer):
    """Serves a directory by byte ranges.

    `mode`: "" as it should; "no ranges", "other range", "short", "no length", "silent" (closes without an answer),
    "redirect" (everything to /moved), or an HTTP status for everything. `token` and `login`, if set, are required in
    the query and as basic auth.
    """

    daemon_threads = True

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory = directory
        self.mode: str | int = ""
        self.token = self.login = ""
        self.requests: Counter[str] = Counter()
        self.connections = 0
        self.host = f"127.0.0.1:{self.server_port}"
        self.url = f"http://{self.host}"

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are what some tests are about; a handler that fails shows in the client's answer."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else small answers wait 40 ms for an acknowledgement
    server: FileServer

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def log_message(self, *_: object) -> None:
        """Silence."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, parts = self.server, urlsplit(self.path)
        server.requests[self.command] += 1
        if server.mode == "silent":
            self.close_connection = True
        elif isinstance(server.mode, int):
            self._answer(server.mode)
        elif (server.token and f"token={server.token}" not in parts.query) or not self._logged_in():
            self._answer(403)
        elif server.mode == "redirect" and not parts.path.startswith("/moved"):
            self._answer(302, {"Location": f"/moved{self.path}"})
        else:
            path = server.directory / parts.path.removeprefix("/moved").lstrip("/")
            if path.is_file():
                self._send(path.read_bytes())
            else:
                self._answer(404)

    def _logged_in(self) -> bool:
        return not self.server.login or self.headers.get("Authorization", "") == f"Basic {self.server.login}"

    def _send(self, data: bytes) -> None:
        mode, total = self.server.mode, len(data)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if mode == "no length":
            self._answer(200, {"Transfer-Encoding": "chunked"}, b"0\r\n\r\n")
        elif wanted is None or mode == "no ranges":
            self._answer(200, {}, data)
        elif int(wanted[1]) >= total:
            self._answer(416)
        else:
            first = int(wanted[1]) + (mode == "other range")
            data = data[first : int(wanted[2]) + 1]
            self._answer(206, {"Content-Range": f"bytes {first}-{first + len(data) - 1}/{total}"}, data)

    def _answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Transfer-Encoding" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.mode == "short":
            body, self.close_connection = body[: len(body) // 2], True
        if self.command == "GET" or "Transfer-Encoding" in (headers or {}):
            self.wfile.write(body)


@contextmanager
def served(directory: Path) -> Iterator[FileServer]:
    """A file server, in a thread of this process."""
    with FileServer(directory) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


KEY, SECRET = "an-access-key", "a-secret-key"


@dataclass(frozen=True)
class S3:
    """An S3 server with one bucket, `models`."""

    endpoint: str

    def uri(self, path: str, bucket: str = "models") -> str:
        return f"s3://{KEY}:{SECRET}@{bucket}/{path}?scheme=http&endpoint_override={self.endpoint}&region=us-east-1"


@contextmanager
def s3_server() -> Iterator[S3]:
    """An S3 server by moto, which shares nothing with us, in a thread of this process."""
    from moto.server import ThreadedMotoServer  # takes half a second

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        s3 = S3("{}:{}".format(*server.get_host_and_port()))
        filesystem, _ = fs.FileSystem.from_uri(s3.uri("") + "&allow_bucket_creation=true")
        filesystem.create_dir("models")
        yield s3
    finally:
        server.stop()
