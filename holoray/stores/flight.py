"""A store behind `holoray serve`: read only, by byte ranges over Arrow Flight.

The bytes of a blob travel as the application metadata of record batches without columns, so no parser and no
decompressor of Arrow sees them before their digest was checked: a column may be compressed, and Arrow inflates it to
any size before anybody can object. The stream's schema holds the size of the blob.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
from pyarrow import flight

from holoray.errors import FormatError, LimitError, MissingError, SourceError, UsageError
from holoray.stores.base import check_blob_name, is_blob_name
from holoray.stores.limits import ReadLimits
from holoray.stores.read_only import ServedStore
from holoray.stores.uri import public, redacted, split

TOKEN_VARIABLE: Final = "HOLORAY_TOKEN"
NAMES: Final = "names"  # the action that lists blobs, one a result
SIZE: Final = b"size"  # key in the schema's metadata
MISSING, BUSY = b"missing", b"busy"  # extra information of errors
MAX_RANGE_BYTES: Final = 256 << 20
_MAX_MESSAGE_BYTES: Final = 4 << 20
_MAX_NAMES: Final = 1_000_000
_TICKET: Final = re.compile(rb"(\d{1,19}) (\d{1,19}) ([A-Za-z0-9][A-Za-z0-9_.-]{0,254})")
_TOKEN: Final = re.compile(r"[!-~]{1,1024}")
_CHANNEL: Final = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.per_message_decompression", 0),  # inflates without limit
    ("grpc.enable_http_proxy", 0),  # as HttpStore
    ("grpc.service_config_disable_resolution", 1),
    # A server that comes back is seen within a second; by default it may take two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


@dataclass(frozen=True, slots=True)
class Range:
    """A range of a blob, as a Flight ticket names it: `offset length name`."""

    name: str
    offset: int
    length: int

    def __post_init__(self) -> None:
        check_blob_name(self.name)

    @property
    def ticket(self) -> bytes:
        return b"%d %d %s" % (self.offset, self.length, self.name.encode("ascii"))

    @classmethod
    def of(cls, ticket: bytes) -> Range:
        """Raises FormatError for what is no ticket, LimitError for a range of more than MAX_RANGE_BYTES."""
        match = _TICKET.fullmatch(ticket)
        if match is None:
            raise FormatError("the ticket is not `offset length name`")
        offset, length = int(match[1]), int(match[2])
        if length > MAX_RANGE_BYTES:
            raise LimitError(f"a range of {length} bytes, more than the limit of {MAX_RANGE_BYTES}")
        return cls(match[3].decode("ascii"), offset, length)


class FlightStore(ServedStore):
    """Blobs of the one store that a server at `grpc://host:port` or `grpc+tls://host:port` serves.

    The token is the URI's user (`grpc+tls://TOKEN@host:port`), or else what HOLORAY_TOKEN holds; it is in no message
    and travels by pickle. It goes to loopback, or through TLS. Whom TLS trusts is told by SSL_CERT_FILE, or else by
    the system. One connection is shared by all threads.
    """

    remote = True

    def __init__(self, uri: str, *, token: str | None = None, limits: ReadLimits | None = None) -> None:
        parts = split(uri)
        self.uri = public(uri)
        self.limits = limits or ReadLimits()
        if parts.hostname is None or parts.port is None or parts.path.strip("/") or parts.query:
            raise UsageError(f"{self.uri} is no address of a holoray server", hint="grpc://host:port, or grpc+tls://…")
        given = token or unquote(parts.password or parts.username or "")
        self._token = check_token(given or os.environ.get(TOKEN_VARIABLE))
        tls = parts.scheme == "grpc+tls"
        if self._token and not tls and not is_loopback(parts.hostname):
            hint = f"use grpc+tls://, or unset {TOKEN_VARIABLE} where the server wants no token"
            raise UsageError(f"the token for {self.uri} would travel in the clear", hint=hint)
        self._headers = [(b"authorization", b"Bearer " + self._token.encode())] if self._token else []
        certificates = _trusted(self.uri) if tls else None
        try:
            self._client = flight.FlightClient(self.uri, tls_root_certs=certificates, generic_options=list(_CHANNEL))
        except pa.ArrowException:
            raise UsageError(f"{self.uri} is no address", hint="is it spelt right?") from None

    def __reduce__(self) -> tuple[object, ...]:
        return _reopened, (self.uri, self._token, self.limits)

    def size(self, name: str) -> int:
        with self._told(name, 0) as options:
            info = self._client.get_flight_info(flight.FlightDescriptor.for_path(check_blob_name(name)), options)
            nbytes = int(info.total_bytes)
        if nbytes < 0:
            raise self._broken(name, "a negative size")
        return nbytes

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except MissingError:
            return False
        return True

    def names(self) -> Iterator[str]:
        found: set[str] = set()
        with self._told("", 0) as options:
            for count, result in enumerate(self._client.do_action(flight.Action(NAMES, b""), options)):
                if count >= _MAX_NAMES:
                    raise self._broken("", f"more than {_MAX_NAMES} names")
                name = bytes(memoryview(result.body)[:256]).decode("ascii", "replace")
                if is_blob_name(name):
                    found.add(name)
        return iter(sorted(found))

    @contextmanager
    def _opened(self, wanted: Range) -> Iterator[tuple[Any, int]]:
        """The stream of a range, and the size of its blob."""
        with self._told(wanted.name, wanted.length) as options:
            reader = self._client.do_get(flight.Ticket(wanted.ticket), options)
            try:
                schema = reader.schema
                size = (schema.metadata or {}).get(SIZE, b"")
                if len(schema) or not re.fullmatch(rb"\d{1,18}", size):
                    raise self._broken(wanted.name, "a stream that is not one of bytes")
                yield reader, int(size)
            except BaseException:
                reader.cancel()
                raise

    def _beginning(self, name: str, length: int) -> tuple[int, bytes]:
        with self._opened(Range(name, 0, length)) as (reader, size):
            out = bytearray(min(length, size))
            for _ in self._received(name, reader, out):
                pass
        return size, bytes(out)

    def _filling(self, name: str, offset: int, out: memoryview) -> Iterator[int]:
        with self._opened(Range(name, offset, out.nbytes)) as (reader, size):
            yield from self._received(name, reader, out[: max(0, size - offset)])

    def _received(self, name: str, reader: Any, out: bytearray | memoryview) -> Iterator[int]:
        """Fill `out` exactly, and see the end of the stream after it."""
        target, done = np.frombuffer(out, np.uint8), 0
        for chunk in reader:
            piece = chunk.app_metadata
            if not piece or piece.size > target.size - done:
                raise self._broken(name, "more bytes than there are" if piece else "a piece without bytes")
            target[done : done + piece.size] = np.frombuffer(piece, np.uint8)
            done += piece.size
            yield piece.size
        if done < target.size:
            raise self._broken(name, f"{done} of {target.size} bytes")

    @contextmanager
    def _told(self, name: str, nbytes: int) -> Iterator[Any]:
        """Options of a call that answers with so many bytes; whatever goes wrong with it is a SourceError.

        `from None`: what the server says may be anything.
        """
        deadline_s = self.limits.deadline_s(nbytes)
        try:
            yield flight.FlightCallOptions(timeout=deadline_s, headers=self._headers)
        except flight.FlightTimedOutError:
            why, hint = f"no whole answer within {deadline_s:.3g} s", "check the network and the server"
            raise self._error(name, why, hint) from None
        except (flight.FlightUnauthenticatedError, flight.FlightUnauthorizedError):
            why = "the server refuses the token" if self._token else "the server wants a token"
            raise self._error(name, why, f"set {TOKEN_VARIABLE} to the token of the server") from None
        except flight.FlightUnavailableError as error:
            raise self._unavailable(name, error) from None
        except flight.FlightError as error:
            if error.extra_info == MISSING:
                raise MissingError(f"{self.uri} has no {name}", hint="is the URI right?", source=self.uri) from None
            raise self._error(name, self._text(error), "look into the server's log") from None
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, SourceError):
                raise
            raise self._error(name, self._text(error), "is it a holoray server of this version?") from None

    def _unavailable(self, name: str, error: Any) -> SourceError:
        if error.extra_info == BUSY:
            return self._error(name, "the server has too much to do", "try again later, or give it more readers")
        hint = "check the address, the network and, for grpc+tls, SSL_CERT_FILE"
        return self._error(name, f"the server does not answer ({self._text(error)})", hint)

    def _text(self, error: BaseException) -> str:
        """The first words of what Arrow says."""
        line = redacted(str(error), self._token).partition(" Detail: ")[0].partition(". gRPC client debug")[0]
        return line.removeprefix("Flight returned ")[:200] or type(error).__name__

    def _broken(self, name: str, what: str) -> SourceError:
        return self._error(name, f"the server sent {what}", "is it a holoray server of this version?")

    def _error(self, name: str, why: str, hint: str) -> SourceError:
        return SourceError(f"{self.uri}/{name}".rstrip("/") + f": {why}", hint=hint, source=self.uri)


def is_loopback(host: str) -> bool:
    """Whether an address, or `localhost`, can only be reached from this machine."""
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"


def _reopened(uri: str, token: str | None, limits: ReadLimits) -> FlightStore:
    return FlightStore(uri, token=token, limits=limits)


def check_token(token: str | None) -> str | None:
    """The token, None for an empty one; raises UsageError for one that no header can carry."""
    if token and not _TOKEN.fullmatch(token):
        raise UsageError("the token has characters that no header can carry", hint="letters, digits and punctuation")
    return token or None


def _trusted(uri: str) -> bytes:
    """The certificates that TLS trusts, where every program on OpenSSL looks for them (gRPC alone does not)."""
    file = ssl.get_default_verify_paths().cafile
    try:
        return Path(file or "").read_bytes()
    except OSError:
        hint = "let SSL_CERT_FILE name a file of certificates (PEM)"
        raise UsageError(f"no trusted certificates for {uri}", hint=hint) from None
