"""The root of a store: what its `ROOT` says."""

from __future__ import annotations

from typing import Final

from holoray.errors import FormatError, SourceError
from holoray.integrity import parse_root
from holoray.stores.base import ROOT, Store

_MAX_ROOT_BYTES: Final = 4096


def read_root(store: Store) -> str:
    """What the ROOT of a store says; raises SourceError if there is none, FormatError if it is malformed."""
    try:
        text = store.read(ROOT, _MAX_ROOT_BYTES)
    except SourceError:  # asking first would cost every good store a round trip
        if store.exists(ROOT):
            raise
        started = any(store.names())
        what = "was never sealed: an encode was interrupted" if started else "is no holoray store"
        hint = "run the same `holoray encode` again" if started else "is the path right?"
        raise SourceError(f"{store.uri} {what}", hint=hint, source=store.uri) from None
    try:
        if not text.endswith(b"\n"):
            raise ValueError
        root = text.decode("ascii")[:-1]
        if parse_root(root) != root:
            raise ValueError
    except ValueError:
        raise FormatError(f"the ROOT file of {store.uri} is malformed", source=store.uri) from None
    return root
