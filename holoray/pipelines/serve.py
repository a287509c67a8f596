"""Serve: a store for others, by byte ranges over Arrow Flight; `holoray.stores.FlightStore` reads from it."""

from __future__ import annotations

import hmac
import logging
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import pyarrow as pa
from pyarrow import flight

from holoray.errors import FormatError, SourceError, UsageError
from holoray.metrics import JobMetrics
from holoray.pipelines.sealed_store import SealedStore
from holoray.stores.base import Store, is_own
from holoray.stores.flight import BUSY, MISSING, NAMES, SIZE, Range, check_token, is_loopback

LOOPBACK: Final = "127.0.0.1"
READERS: Final = 32
PIECE_BYTES: Final = 1 << 20
_WAITING: Final = 4  # times as many readers may wait
_WAIT_S, _WAITS = 0.5, 20
_GRACE_S: Final = 5.0  # for readers that are under way at the end
_SCHEMA: Final = pa.schema([])
_NO_COLUMNS: Final = pa.RecordBatch.from_arrays([], schema=_SCHEMA)
_log: Final = logging.getLogger("holoray")


@dataclass(frozen=True, slots=True)
class Certificate:
    """What TLS shows to clients: the PEM text of a certificate (chain) and of its key."""

    chain: bytes
    key: bytes

    @classmethod
    def read(cls, chain: str | os.PathLike[str], key: str | os.PathLike[str]) -> Certificate:
        try:
            return cls(Path(chain).read_bytes(), Path(key).read_bytes())
        except OSError as error:
            raise UsageError(f"cannot read {error.filename}: {error.strerror}", hint="check the path") from None


class StoreServer:
    """A running server of one store, read only; a context manager. `uri` is where `holoray.open` finds it.

    Whoever reaches it reads the store: without a token and TLS it listens on loopback only (UsageError otherwise).
    At most `readers` ranges are sent at once, with a mebibyte of memory each; more wait, and are refused after 10 s.
    Raises what opening a store raises, and UsageError where it cannot listen.
    """

    def __init__(
        self,
        where: SealedStore | Store | str | os.PathLike[str],
        *,
        host: str = LOOPBACK,
        port: int = 0,
        certificate: Certificate | None = None,
        token: str | None = None,
        readers: int = READERS,
        metrics: JobMetrics | None = None,
    ) -> None:
        check_token(token)
        _check_exposure(host, certificate, token)
        if readers < 1:
            raise UsageError(f"readers must be at least 1, not {readers}")
        sealed = where if isinstance(where, SealedStore) else SealedStore(where)
        self.root = sealed.root
        self.metrics = metrics or JobMetrics()
        _check_free(host, port)
        self._slots = _Slots(readers)
        scheme = "grpc+tls" if certificate else "grpc"
        blobs, address = _Blobs(sealed.store, self._slots), f"{scheme}://{_bracketed(host)}:{port}"
        self._server = _listening(blobs, self.metrics, address, certificate, token)
        self.port: int = self._server.port
        reached = socket.gethostname() if host in ("0.0.0.0", "::") else host
        self.uri = f"{scheme}://{_bracketed(reached)}:{self.port}"

    def __enter__(self) -> StoreServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> bool:
        """Stop; what is being sent is cut short. False if a client that does not read holds on after 5 s.

        gRPC cannot be told to drop it: such a connection ends with the client, or with this process.
        """
        if self._slots.closing.is_set():
            return True
        self._slots.closing.set()
        stopping = threading.Thread(target=self._server.shutdown, name="holoray-serve-stop", daemon=True)
        stopping.start()
        stopping.join(_GRACE_S)
        return not stopping.is_alive()


def serve(
    store: SealedStore | Store | str | os.PathLike[str],
    *,
    host: str = LOOPBACK,
    port: int = 0,
    tls_cert: str | os.PathLike[str] | None = None,
    tls_key: str | os.PathLike[str] | None = None,
    token: str | None = None,
    readers: int = READERS,
    metrics: JobMetrics | None = None,
) -> StoreServer:
    """Serve a store until the `with` block ends; `.uri` is its address. See StoreServer."""
    if (tls_cert is None) != (tls_key is None):
        raise UsageError("TLS needs a certificate and its key", hint="give both tls_cert and tls_key")
    certificate = Certificate.read(tls_cert, tls_key) if tls_cert is not None and tls_key is not None else None
    return StoreServer(
        store, host=host, port=port, certificate=certificate, token=token, readers=readers, metrics=metrics
    )


class _Slots:
    """Room for a number of readers; a few more wait for it, and whoever comes on top is refused at once."""

    def __init__(self, readers: int) -> None:
        self._readers = threading.BoundedSemaphore(readers)
        self._queue = threading.BoundedSemaphore((1 + _WAITING) * readers)
        self.closing = threading.Event()

    @contextmanager
    def slot(self) -> Iterator[None]:
        if not self._queue.acquire(blocking=False):
            raise flight.FlightUnavailableError("too many readers", extra_info=BUSY)
        try:
            self._wait()
            try:
                yield
            finally:
                self._readers.release()
        finally:
            self._queue.release()

    def _wait(self) -> None:
        for _ in range(_WAITS):
            if self.closing.is_set():
                raise flight.FlightUnavailableError("the server is ending")
            if self._readers.acquire(timeout=_WAIT_S):
                return
        raise flight.FlightUnavailableError("too many readers", extra_info=BUSY)


class _Blobs:
    """What may be told of a store: the files that are its own, piece by piece."""

    def __init__(self, store: Store, slots: _Slots) -> None:
        self._store = store
        self._slots = slots

    def names(self) -> list[str]:
        return [name for name in self._store.names() if is_own(name)]

    def size(self, name: str) -> int:
        if not is_own(name):
            raise flight.FlightServerError("no such file", extra_info=MISSING)
        try:
            return self._store.size(name)
        except SourceError:
            if self._store.exists(name):
                raise
            raise flight.FlightServerError("no such file", extra_info=MISSING) from None

    def pieces(self, wanted: Range, size: int, context: Any) -> Iterator[memoryview]:
        """The range, as far as the blob goes; each piece is there until the next is asked for."""
        with self._slots.slot():
            end = min(wanted.offset + wanted.length, size)
            room = memoryview(bytearray(max(0, min(PIECE_BYTES, end - wanted.offset))))
            for at in range(wanted.offset, end, PIECE_BYTES):
                if self._slots.closing.is_set() or context.is_cancelled():
                    raise flight.FlightUnavailableError("the server is ending")
                piece = room[: end - at]
                if self._store.read_into(wanted.name, at, piece) < piece.nbytes:
                    raise flight.FlightServerError("the file became shorter")
                yield piece


class _Server(flight.FlightServerBase):  # type: ignore[misc]
    """The calls of Flight that are answered; all others are unimplemented, as Arrow says by itself."""

    def __init__(self, blobs: _Blobs, metrics: JobMetrics, location: str, **options: Any) -> None:
        super().__init__(location, **options)
        self._blobs = blobs
        self._metrics = metrics

    def get_flight_info(self, context: Any, descriptor: Any) -> Any:
        with self._answer():
            name = (descriptor.path or [b""])[0].decode("ascii", "replace")
            return flight.FlightInfo(_SCHEMA, flight.FlightDescriptor.for_path(name), [], -1, self._blobs.size(name))

    def do_get(self, context: Any, ticket: Any) -> Any:
        with self._answer(begins=True):
            wanted = Range.of(ticket.ticket)
            size = self._blobs.size(wanted.name)
        return flight.GeneratorStream(_SCHEMA.with_metadata({SIZE: str(size)}), self._batches(wanted, size, context))

    def _batches(self, wanted: Range, size: int, context: Any) -> Iterator[tuple[pa.RecordBatch, pa.Buffer]]:
        with self._answer():
            for piece in self._blobs.pieces(wanted, size, context):
                yield _NO_COLUMNS, pa.py_buffer(piece)
                self._metrics.inc("holoray_served_bytes_total", piece.nbytes)

    def do_action(self, context: Any, action: Any) -> Iterator[bytes]:
        with self._answer():
            if action.type != NAMES:
                raise flight.FlightServerError("no such action", extra_info=MISSING)
            yield from (name.encode() for name in self._blobs.names())

    @contextmanager
    def _answer(self, *, begins: bool = False) -> Iterator[None]:
        """Counts a call, and turns what goes wrong into what a stranger may know: no paths, no traceback."""
        outcome = "failed"
        try:
            yield
            outcome = "" if begins else "ok"
        except GeneratorExit:
            outcome = "cancelled"
            raise
        except flight.FlightError as error:
            outcome = "refused" if error.extra_info else "failed"
            raise
        except FormatError as error:
            outcome = "refused"
            raise flight.FlightServerError(error.message) from None
        except Exception as error:
            _log.warning("a call failed", exc_info=True)
            raise flight.FlightServerError(f"the server could not read it ({type(error).__name__})") from None
        finally:
            if outcome:
                self._metrics.inc("holoray_served_calls_total", outcome=outcome)


class _TokenCheck(flight.ServerMiddlewareFactory):  # type: ignore[misc]
    """Lets only calls with the token in."""

    def __init__(self, token: str, metrics: JobMetrics) -> None:
        self._expected = f"Bearer {token}".encode()
        self._metrics = metrics

    def start_call(self, info: Any, headers: Mapping[str, Sequence[str | bytes]]) -> None:
        given = headers.get("authorization", [""])[0]
        if not hmac.compare_digest(given.encode() if isinstance(given, str) else given, self._expected):
            self._metrics.inc("holoray_served_calls_total", outcome="refused")
            raise flight.FlightUnauthenticatedError("wrong token")


def _listening(
    blobs: _Blobs, metrics: JobMetrics, address: str, certificate: Certificate | None, token: str | None
) -> _Server:
    tls = [(certificate.chain, certificate.key)] if certificate else None
    middleware = {"token": _TokenCheck(token, metrics)} if token else None
    try:
        return _Server(blobs, metrics, address, tls_certificates=tls, middleware=middleware)
    except pa.ArrowException as error:
        hint = "do the certificate and the key belong together (PEM)?" if tls else ""
        raise UsageError(f"cannot serve at {address}: {error}", hint=hint) from None


def _bracketed(host: str) -> str:
    """A host as URIs write it: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


def _check_exposure(host: str, certificate: Certificate | None, token: str | None) -> None:
    if not is_loopback(host) and not (certificate and token):
        hint = "give a certificate (--tls-cert, --tls-key) and a token (--token-env), or serve on 127.0.0.1"
        raise UsageError(f"{host} can be reached from other machines: that takes TLS and a token", hint=hint)


def _check_free(host: str, port: int) -> None:
    """Raises UsageError where the address cannot be listened on; gRPC says why in the log alone."""
    try:
        if port not in range(1 << 16):
            raise OverflowError("no such port")
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot listen on {host}:{port}: {why}", hint="choose another --host or --port") from None
