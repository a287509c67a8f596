"""Where encoded checkpoints live."""

from __future__ import annotations

import os
from collections.abc import Sequence

from holoray.errors import UsageError
from holoray.stores.base import MANIFEST, ROOT, Store, fragment_file, is_journal, is_own, journal_file
from holoray.stores.faulty import Faults, FaultySource
from holoray.stores.flight import FlightStore
from holoray.stores.http import HttpStore
from holoray.stores.limits import ReadLimits
from holoray.stores.local import LocalStore
from holoray.stores.memory import MemoryStore
from holoray.stores.remote import RemoteStore
from holoray.stores.share_set import ShareSet, find_shares, share_places
from holoray.stores.share_target import ShareTarget
from holoray.stores.shares import Shares, folder_index, share_folder
from holoray.stores.uri import scheme_of
from holoray.stores.wrapped import WrappedStore

__all__ = [
    "MANIFEST",
    "ROOT",
    "Faults",
    "FaultySource",
    "FlightStore",
    "HttpStore",
    "LocalStore",
    "MemoryStore",
    "ReadLimits",
    "RemoteStore",
    "ShareSet",
    "ShareTarget",
    "Shares",
    "Store",
    "WrappedStore",
    "find_shares",
    "fragment_file",
    "is_journal",
    "is_own",
    "journal_file",
    "open_shares",
    "open_store",
    "share_target",
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


def open_shares(places: Sequence[Store | str | os.PathLike[str]]) -> ShareSet:
    """The store whose shares lie at these paths or URIs, or in folders there, in any order; see `ShareSet`."""
    if not places:
        raise UsageError("no place of a share was given")
    return ShareSet([share for place in places for share in share_places(open_store(place))])


def share_target(where: Store | str | os.PathLike[str], shares: Shares) -> ShareTarget:
    """Where to write shares: folders `share-0`, `share-1`, … at a path or URI.

    Raises UsageError if another store is there already.
    """
    parent = open_store(where)
    if parent.exists(ROOT):
        raise UsageError(f"{parent.uri} already holds a store in one piece", hint="choose another path")
    folders = [parent.folder(share_folder(index)) for index in range(shares.total)]
    surplus = [parent.folder(name) for name in parent.folders() if folder_index(name) >= shares.total]
    return ShareTarget(folders, shares, surplus)
