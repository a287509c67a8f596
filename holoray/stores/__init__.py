"""Where encoded checkpoints live."""

from __future__ import annotations

import os

from holoray.errors import UsageError
from holoray.stores.base import MANIFEST, ROOT, Store, fragment_file, is_journal, is_own, journal_file
from holoray.stores.faulty import Faults, FaultySource
from holoray.stores.http import HttpStore
from holoray.stores.local import LocalStore
from holoray.stores.memory import MemoryStore
from holoray.stores.remote import RemoteStore
from holoray.stores.uri import scheme_of
from holoray.stores.wrapped import WrappedStore

__all__ = [
    "MANIFEST",
    "ROOT",
    "Faults",
    "FaultySource",
    "HttpStore",
    "LocalStore",
    "MemoryStore",
    "RemoteStore",
    "Store",
    "WrappedStore",
    "fragment_file",
    "is_journal",
    "is_own",
    "journal_file",
    "open_store",
]


def open_store(where: Store | str | os.PathLike[str]) -> Store:
    """The store at a path or URI, chosen by its scheme; a Store is returned as it is.

    No scheme and `file` are a local directory, `http` and `https` are read only, everything else goes through
    `pyarrow.fs`. Raises UsageError for a scheme that is not known here, naming the package that knows it.
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
        case _:
            return RemoteStore(path)
