"""Where encoded checkpoints live."""

from __future__ import annotations

import os

from holoray.errors import UsageError
from holoray.stores.base import MANIFEST, ROOT, Store, fragment_file, is_journal, is_own, journal_file
from holoray.stores.flight import FlightStore
from holoray.stores.http import HttpStore
from holoray.stores.limits import ReadLimits
from holoray.stores.local import LocalStore
from holoray.stores.memory import MemoryStore
from holoray.stores.remote import RemoteStore
from holoray.stores.uri import scheme_of

__all__ = [
    "MANIFEST",
    "ROOT",
    "FlightStore",
    "HttpStore",
    "LocalStore",
    "MemoryStore",
    "ReadLimits",
    "RemoteStore",
    "Store",
    "fragment_file",
    "is_journal",
    "is_own",
    "journal_file",
    "open_store",
]


def open_store(where: Store | str | os.PathLike[str]) -> Store:
    """The store at a path or URI, chosen by its scheme; a Store is returned as it is.

    No scheme and `file` are a local directory; `http`, `https` and `grpc`, `grpc+tls` (a `holoray serve`) are read
    only; everything else goes through `pyarrow.fs`. Raises UsageError for a scheme that is not known here, naming
    the package that knows it.
    """
    if isinstance(where, Store):
        return where
    path = os.fspath(where)
    if not path:
        raise UsageError("an empty path is no store")
    match scheme_of(path):
        case "":
            return LocalStore(path)
        case "file":
            return LocalStore(path.partition("://")[2])
        case "http" | "https":
            return HttpStore(path)
        case "grpc" | "grpc+tls":
            return FlightStore(path)
        case _:
            return RemoteStore(path)
