"""`holoray serve`: a store for others, until a signal ends it."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from holoray.cli.output import Output, shown
from holoray.cli.shares import all_shares
from holoray.errors import UsageError
from holoray.metrics import MetricsServer
from holoray.pipelines.sealed_store import SealedStore
from holoray.pipelines.serve import StoreServer, serve

_END: Final = (signal.SIGINT, signal.SIGTERM)


def run_serve(
    out: Output,
    store: str,
    *,
    shares: Sequence[str] | None = None,
    token_env: str | None,
    metrics_port: int | None,
    **options: Any,
) -> None:
    """Serve until SIGINT or SIGTERM; says where, once it listens."""
    token = None if token_env is None else _token(token_env)
    sealed = SealedStore(all_shares(store, shares))
    with serve(sealed, token=token, **options) as server, _signals() as heard:
        metrics = None if metrics_port is None else _metrics(server, metrics_port)
        where = f"serving {shown(sealed.store.uri)} at {server.uri}"
        out.result(
            {"uri": server.uri, "root": server.root, "metrics": metrics and metrics.url},
            f"{where}, root {server.root}" + (f", metrics at {metrics.url}" if metrics else ""),
        )
        out.warn(sealed.store.notes())
        sys.stdout.flush()
        heard.recv(1)
        if metrics is not None:
            metrics.close()
        _end(server)


@contextmanager
def _signals() -> Iterator[socket.socket]:
    """A socket that has a byte once a signal came to end this, whichever thread it hit.

    Blocking them for `sigwait` would have to begin before any thread does, and so before the store is opened, which
    could then not be interrupted.
    """
    heard, told = socket.socketpair()
    told.setblocking(False)
    signal.set_wakeup_fd(told.fileno())
    before = [(number, signal.signal(number, lambda *_: None)) for number in _END]
    with heard, told:
        try:
            yield heard
        finally:
            for number, handler in before:
                signal.signal(number, handler)
            signal.set_wakeup_fd(-1)


def _metrics(server: StoreServer, port: int) -> MetricsServer:
    try:
        return MetricsServer(server.metrics, port)
    except OSError as error:
        hint = "choose another --metrics-port; 0 is any free one"
        raise UsageError(f"metrics cannot be served on port {port}: {error.strerror}", hint=hint) from None


def _end(server: StoreServer) -> None:
    if not server.close():  # a client that does not read: gRPC would wait for it for ever
        sys.stderr.flush()
        os._exit(0)


def _token(variable: str) -> str:
    token = os.environ.get(variable, "")
    if not token:
        raise UsageError(f"the environment has no {variable}", hint="export the token under that name")
    return token
