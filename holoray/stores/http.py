"""A store behind an HTTP server: read only, by byte ranges."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

import urllib3
from urllib3.exceptions import HTTPError, ProtocolError, TimeoutError
from urllib3.util import make_headers, parse_url

from holoray.errors import MissingError, SourceError
from holoray.stores import redirects
from holoray.stores.base import MANIFEST, ROOT
from holoray.stores.limits import ReadLimits
from holoray.stores.read_only import ServedStore
from holoray.stores.redirects import Hop, Objection
from holoray.stores.timed_http import peer_of, pool_manager
from holoray.stores.uri import join, public, split

_MISSING: Final = (404, 410)
_DENIED: Final = (401, 403, 407)
_NO_SUCH_RANGE: Final = 416
_NUMBER: Final = re.compile(r"\d{1,18}", re.ASCII)
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.ASCII)
_CHUNK_BYTES: Final = 256 << 10
_ERROR_PAGE_BYTES: Final = 64 << 10  # read and thrown away so that the connection can be kept; longer ones close it


@dataclass(frozen=True, slots=True)
class _Part:
    """What of a blob an answer holds: `length` bytes of `total`, None where the server does not say of how many."""

    length: int
    total: int | None


class HttpStore(ServedStore):
    """Blobs below an http(s) URL; a query (a signature, a token) is sent along, user and password as basic auth.

    Connections are kept and shared by threads. There is no listing: `names` are those of ROOT and the manifest that
    are there. The URL, with its credentials, travels by pickle; the credentials go to its host and to no other.
    """

    remote = True

    def __init__(self, url: str, *, limits: ReadLimits | None = None) -> None:
        self._location = url
        self.uri = public(url)
        self.limits = limits or ReadLimits()
        parts = split(url)
        self._anonymous = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        self._login = _login(parts.username, parts.password)
        self._pools = pool_manager(self.limits)

    @property
    def location(self) -> str:
        return self._location

    def __reduce__(self) -> tuple[object, ...]:
        return _reopened, (self._location, self.limits)

    def size(self, name: str) -> int:
        with self._asked("HEAD", name) as response:
            if response.status != 200:
                raise self._refused(name, response.status)
            length = _length(response)
        if length is None:
            raise self._error(name, "the server does not say how long it is", "serve it as a plain file")
        return length

    def _beginning(self, name: str, length: int) -> tuple[int, bytes]:
        with self._range(name, 0, length + 1) as (response, part):  # there is no range of nothing
            out = bytearray(part.length)
            got = sum(_received(response, memoryview(out)))
        if part.total is None and got > length:
            raise self._error(name, "the server does not say how long it is", "serve it as a plain file")
        return got if part.total is None else part.total, bytes(out[:length])

    def _filling(self, name: str, offset: int, out: memoryview) -> Iterator[int]:
        with self._range(name, offset, out.nbytes) as (response, part):
            yield from _received(response, out[: part.length])

    def exists(self, name: str) -> bool:
        with self._asked("HEAD", name) as response:
            if response.status in _MISSING:
                return False
            if response.status != 200:
                raise self._refused(name, response.status)
            return True

    def names(self) -> Iterator[str]:
        return (name for name in (ROOT, MANIFEST) if self.exists(name))

    @contextmanager
    def _range(self, name: str, offset: int, length: int) -> Iterator[tuple[urllib3.BaseHTTPResponse, _Part]]:
        """The server's answer with these bytes, or as many of them as there are."""
        wanted = f"bytes={offset}-{offset + length - 1}"
        with self._asked("GET", name, {"Range": wanted}, nbytes=length) as response:
            if response.status == 200:
                hint = "use a server that answers byte ranges (nginx, caddy, any object store)"
                raise self._error(name, "the server ignores byte ranges", hint)
            if response.status == _NO_SUCH_RANGE:
                yield response, _Part(0, None)
                return
            if response.status != 206:
                raise self._refused(name, response.status)
            part = _part(response, offset, length)
            if part is None:
                given = response.headers.get("Content-Range", "")[:80]
                raise self._error(name, f"asked for {wanted}, the server sent {given!r}", "is a proxy at fault?")
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise self._error(name, "the server compresses it", "ranges are of plain bytes: turn compression off")
            yield response, part

    @contextmanager
    def _asked(
        self, method: str, name: str, headers: Mapping[str, str] | None = None, *, nbytes: int = 0
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        """The server's answer, whose body has not been read; whatever goes wrong with it is a SourceError."""
        response = None
        expires = time.monotonic() + self.limits.deadline_s(nbytes)
        try:
            response = self._final(method, name, dict(headers or {}), expires)
            yield response
            _finish(response)
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

    def _final(self, method: str, name: str, headers: dict[str, str], expires: float) -> urllib3.BaseHTTPResponse:
        """The answer at the end of all redirects."""
        hop = first = Hop(join(self._anonymous, name))
        for _ in range(self.limits.redirects + 1):
            login = self._login if hop.origin == first.origin else {}
            response = self._once_more(method, hop, {**_PLAIN, **login, **headers}, expires)
            location = response.headers.get("Location")
            if response.status not in redirects.STATUSES or location is None:
                return response
            peer = peer_of(response)
            _finish(response)
            response.release_conn()
            target = redirects.follow(hop, location, peer)
            if isinstance(target, Objection):
                raise self._error(name, target.why, "is the URL right? Use the address where the store really is")
            hop = target
        why = f"the server redirects more than {self.limits.redirects} times"
        raise self._error(name, why, "is the URL right?")

    def _once_more(self, method: str, hop: Hop, headers: dict[str, str], expires: float) -> urllib3.BaseHTTPResponse:
        """One answer. A kept connection may have been closed by the server meanwhile: that is tried again, once."""
        try:
            return self._once(method, hop, headers, expires)
        except ProtocolError as error:
            if not any(isinstance(cause, ConnectionError) for cause in error.args):
                raise
        return self._once(method, hop, headers, expires)

    def _once(self, method: str, hop: Hop, headers: dict[str, str], expires: float) -> urllib3.BaseHTTPResponse:
        url = parse_url(hop.url)
        host = (url.host or "").strip("[]")
        options = {"assert_hostname": host, "server_hostname": host} if hop.address and url.scheme == "https" else None
        pool = self._pools.connection_from_host(hop.address or url.host, url.port, url.scheme, options)
        left = max(expires - time.monotonic(), 1e-3)
        return pool.urlopen(
            method,
            url.request_uri,
            headers={"Host": url.netloc or "", **headers},
            timeout=urllib3.Timeout(connect=min(self.limits.connect_s, left), read=left),
            retries=False,  # trying again is a matter of whoever wraps a store
            redirect=False,
            assert_same_host=False,
            preload_content=False,
            decode_content=False,
        )

    def _unreachable(self, name: str, error: HTTPError) -> SourceError:
        if isinstance(error, TimeoutError):
            return self._error(name, "the server did not answer in time", "check the network and the server")
        if isinstance(error, ProtocolError):
            return self._error(name, "the connection broke before the whole answer came", "check the network")
        why = f"the server does not answer ({type(error).__name__})"
        return self._error(name, why, "check the address and the network")

    def _refused(self, name: str, status: int) -> SourceError:
        if status in _MISSING:
            message = f"{self.uri}/{name}: not found (HTTP status {status})"
            return MissingError(message, hint="is the URL right?", source=self.uri)
        if status in _DENIED:
            hint = "check the credentials and permissions"
            return self._error(name, f"the server refuses it (HTTP status {status})", hint)
        return self._error(name, f"the server answered with HTTP status {status}", "look into the server's log")

    def _error(self, name: str, why: str, hint: str) -> SourceError:
        return SourceError(f"{self.uri}/{name}: {why}", hint=hint, source=self.uri)


def _reopened(url: str, limits: ReadLimits) -> HttpStore:
    return HttpStore(url, limits=limits)


def _length(response: urllib3.BaseHTTPResponse) -> int | None:
    """Bytes of the body as announced."""
    text = response.headers.get("Content-Length", "")
    return int(text) if _NUMBER.fullmatch(text) else None


def _part(response: urllib3.BaseHTTPResponse, offset: int, length: int) -> _Part | None:
    """What the answer to a range holds; None unless its headers agree with each other and with the range."""
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match is None or "Transfer-Encoding" in response.headers:
        return None
    first, last = int(match[1]), int(match[2])
    total = None if match[3] == "*" else int(match[3])
    given = last - first + 1
    there = length if total is None else min(length, total - offset)
    honest = first == offset and 0 < given <= length and given == _length(response)
    return _Part(given, total) if honest and (total is None or given == there) else None


def _received(response: urllib3.BaseHTTPResponse, out: memoryview) -> Iterator[int]:
    """Fill `out`; gives the bytes of each read."""
    done = 0
    while done < out.nbytes:
        got = response.readinto(out[done : done + _CHUNK_BYTES])
        if not got:
            break
        done += got
        yield got


def _finish(response: urllib3.BaseHTTPResponse) -> None:
    """Leave the connection fit for the next request, or closed."""
    response.read(_ERROR_PAGE_BYTES)
    if not response.closed:
        response.close()


# `identity`: ranges of a compressed representation would be ranges of other bytes.
_PLAIN: Final = {"Accept-Encoding": "identity"}


def _login(user: str | None, password: str | None) -> dict[str, str]:
    return make_headers(basic_auth=f"{unquote(user)}:{unquote(password or '')}") if user else {}
