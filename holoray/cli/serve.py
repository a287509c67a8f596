"""`holoray serve`: a store for others, until a signal ends it."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, Final

from holoray.cli.output import Output, shown
from holoray.errors import UsageError
from holoray.metrics import MetricsServer
from holoray.pipelines.serve import StoreServer, serve
from holoray.stores import open_store

_END: Final = (signal.SIGINT, signal.SIGTERM)


def run_serve(out: Output, store: str, *, token_env: str | None, metrics_port: int | None, **options: Any) -> None:
    """Serve until SIGINT or SIGTERM; says where, once it listens."""
    token = None if token_env is None else _token(token_env)
    # Blocked before the server's threads begin, which inherit it: a signal then waits for `sigwait`.
    signal.pthread_sigmask(signal.SIG_BLOCK, _END)
    with serve(store, token=token, **options) as server:
        metrics = None if metrics_port is None else _metrics(server, metrics_port)
        where = f"serving {shown(open_store(store).uri)} at {server.uri}"
        out.result(
            {"uri": server.uri, "root": server.root, "metrics": metrics and metrics.url},
            f"{where}, root {server.root}" + (f", metrics at {metrics.url}" if metrics else ""),
        )
        sys.stdout.flush()
        signal.sigwait(_END)
        if metrics is not None:
            metrics.close()
        _end(server)


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
