"""A store behind an HTTP server: read only, by byte ranges."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import BinaryIO, Final, NoReturn
from urllib.parse import unquote

import urllib3
from urllib3.exceptions import HTTPError, MaxRetryError, ProtocolError, ResponseError, TimeoutError
from urllib3.util import make_headers

from holoray.errors import HolorayError, LimitError, SourceError, UsageError
from holoray.stores.base import MANIFEST, ROOT, Store
from holoray.stores.uri import join, public, split

_TIMEOUT: Final = urllib3.Timeout(connect=10.0, read=60.0)
# Trying again is a matter of whoever wraps a store; one more read covers a kept connection that the server closed.
_RETRIES: Final = urllib3.Retry(connect=0, read=1, status=0, other=0, redirect=5)
_CONNECTIONS: Final = 64
_MISSING: Final = (404, 410)
_DENIED: Final = (401, 403, 407)
_NO_SUCH_RANGE: Final = 416
_CHUNK_BYTES: Final = 256 << 10


class HttpStore(Store):
    """Blobs below an http(s) URL; a query (a signature, a token) is sent along, user and password as basic auth.

    Connections are kept and shared by threads. There is no listing: `names` are those of ROOT and the manifest that
    are there. The URL, with its credentials, travels by pickle.
    """

    remote = True

    def __init__(self, url: str) -> None:
        self._location = url
        self.uri = public(url)
        parts = split(url)
        self._anonymous = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        self._headers = _headers(parts.username, parts.password)
        self._pool = urllib3.PoolManager(maxsize=_CONNECTIONS, retries=_RETRIES, timeout=_TIMEOUT)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._location,)

    def size(self, name: str) -> int:
        with self._asked("HEAD", name) as response:
            if response.status != 200:
                raise self._refused(name, response.status)
            length = _length(response)
        if length < 0:
            raise self._error(name, "the server does not say how long it is", "serve it as a plain file")
        return length

    def read(self, name: str, limit: int) -> bytes:
        """As every store does, but in one request: opening a store should not cost more round trips than it must."""
        with self._range(name, 0, limit + 1) as response:
            total = _total(response)
            if total > limit:
                raise LimitError(f"{name} has {total} bytes, more than the limit of {limit}", source=self.uri)
            out = bytearray(total)
            return bytes(out[: max(_filling(response, memoryview(out)), default=0)])

    def read_into(self, name: str, offset: int, out: memoryview) -> int:
        if not out.nbytes:
            return 0
        counted = deque((0,), maxlen=1)
        try:
            with self._range(name, offset, out.nbytes) as response:
                counted.extend(_filling(response, out))
        except SourceError as error:
            error.received = counted[0]
            raise
        return counted[0]

    def exists(self, name: str) -> bool:
        with self._asked("HEAD", name) as response:
            if response.status in _MISSING:
                return False
            if response.status != 200:
                raise self._refused(name, response.status)
            return True

    @contextmanager
    def _range(self, name: str, offset: int, length: int) -> Iterator[urllib3.BaseHTTPResponse]:
        """The server's answer with at most these bytes, and as many of them as there are."""
        wanted = f"bytes={offset}-{offset + length - 1}"
        with self._asked("GET", name, {"Range": wanted}) as response:
            if response.status == 200:
                hint = "use a server that answers byte ranges (nginx, caddy, any object store)"
                raise self._error(name, "the server ignores byte ranges", hint)
            if response.status not in (206, _NO_SUCH_RANGE):
                raise self._refused(name, response.status)
            given = response.headers.get("Content-Range", "")
            honest = given.startswith(f"bytes {offset}-") and 0 < _length(response) <= length
            if response.status == 206 and not honest:
                raise self._error(name, f"asked for {wanted}, the server sent {given[:80]!r}", "is a proxy at fault?")
            yield response

    def names(self) -> Iterator[str]:
        return (name for name in (ROOT, MANIFEST) if self.exists(name))

    def create(self, name: str) -> AbstractContextManager[BinaryIO]:
        self._read_only()

    def delete(self, name: str) -> None:
        self._read_only()

    def exclusive(self) -> AbstractContextManager[None]:
        self._read_only()

    def replacement(self) -> AbstractContextManager[Store]:
        self._read_only()

    def _read_only(self) -> NoReturn:
        hint = "encode to a directory or an object store, and serve that"
        raise UsageError(f"{self.uri} can only be read: HTTP has no way to write", hint=hint)

    @contextmanager
    def _asked(
        self, method: str, name: str, headers: Mapping[str, str] | None = None
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        """The server's answer, whose body has not been read; whatever goes wrong with it is a SourceError."""
        response = None
        try:
            response = self._pool.request(
                method, join(self._anonymous, name), headers={**self._headers, **(headers or {})}, preload_content=False
            )
            yield response
            response.drain_conn()
        except HTTPError as error:  # its text may hold the query
            if response is not None:
                response.close()
            raise self._unreachable(name, error) from None
        except BaseException:
            if response is not None:
                response.close()  # what was not read must not be taken for the next answer
            raise
        finally:
            if response is not None:
                response.release_conn()

    def _unreachable(self, name: str, error: HTTPError) -> HolorayError:
        reason = error.reason if isinstance(error, MaxRetryError) and error.reason is not None else error
        if isinstance(reason, TimeoutError):
            return self._error(name, "the server did not answer in time", "check the network and the server")
        if isinstance(reason, ResponseError):
            return self._error(name, "the server redirects without end", "is the URL right?")
        if isinstance(reason, ProtocolError):
            return self._error(name, "the connection broke before the whole answer came", "check the network")
        why = f"the server does not answer ({type(reason).__name__})"
        return self._error(name, why, "check the address and the network")

    def _refused(self, name: str, status: int) -> SourceError:
        if status in _MISSING:
            return self._error(name, f"not found (HTTP status {status})", "is the URL right?")
        if status in _DENIED:
            hint = "check the credentials and permissions"
            return self._error(name, f"the server refuses it (HTTP status {status})", hint)
        return self._error(name, f"the server answered with HTTP status {status}", "look into the server's log")

    def _error(self, name: str, why: str, hint: str) -> SourceError:
        return SourceError(f"{self.uri}/{name}: {why}", hint=hint, source=self.uri)


def _length(response: urllib3.BaseHTTPResponse) -> int:
    """Bytes of the body as announced; -1 where they are not."""
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isdecimal() else -1


def _total(response: urllib3.BaseHTTPResponse) -> int:
    """Bytes of the whole blob, from the answer to a range that begins at its start."""
    text = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(text) if text.isdecimal() else max(0, _length(response))


def _filling(response: urllib3.BaseHTTPResponse, out: memoryview) -> Iterator[int]:
    """Fill `out`; the bytes that are there after each read. What a read had when the connection broke is lost."""
    done = 0
    while response.status == 206 and done < out.nbytes:
        got = response.readinto(out[done : done + _CHUNK_BYTES])
        if not got:
            break
        done += got
        yield done


def _headers(user: str | None, password: str | None) -> dict[str, str]:
    # `identity`: ranges of a compressed representation would be ranges of other bytes.
    login = f"{unquote(user)}:{unquote(password or '')}" if user else None
    return {"Accept-Encoding": "identity", **make_headers(basic_auth=login)}
