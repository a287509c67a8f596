"""Where encoded checkpoints live."""

from __future__ import annotations

import os

from holoray.errors import UsageError
from holoray.stores.base import MANIFEST, ROOT, Store, fragment_file, is_journal, is_own, journal_file
from holoray.stores.local import LocalStore
from holoray.stores.memory import MemoryStore

__all__ = [
    "MANIFEST",
    "ROOT",
    "LocalStore",
    "MemoryStore",
    "Store",
    "fragment_file",
    "is_journal",
    "is_own",
    "journal_file",
    "open_store",
]


def open_store(where: Store | str | os.PathLike[str]) -> Store:
    """The store at a local path or `file://` URI; a Store is returned as it is."""
    if isinstance(where, Store):
        return where
    path = os.fspath(where)
    if path.startswith("file://"):
        path = path.removeprefix("file://")
    elif "://" in path:
        raise UsageError(f"{path}: only local paths are supported", hint="copy the store to a local directory")
    if not path:
        raise UsageError("an empty path is no store")
    return LocalStore(path)
