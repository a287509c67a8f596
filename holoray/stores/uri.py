"""URIs of stores: scheme, joining names, and what of them may be shown."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import SplitResult, urlsplit

from holoray.errors import UsageError

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_USER: Final = re.compile(r"//[^/\s@]+@")
_QUERY: Final = re.compile(r"\?[^\s'\"<>)]*")


def scheme_of(where: str) -> str:
    """`s3` of `s3://bucket/store`, in lower case; empty for a path."""
    match = _SCHEME.match(where)
    return match[1].lower() if match else ""


def split(uri: str) -> SplitResult:
    """The parts of a URI; raises UsageError for one that has no meaning (an open bracket, a port that is no number)."""
    try:
        parts = urlsplit(uri)
        _ = parts.port
    except ValueError as error:
        raise UsageError(f"{redacted(uri)} is no URI: {error}", hint="is it spelt right?") from None
    return parts


def join(uri: str, name: str) -> str:
    """The URI of something below `uri`; user and query stay, since they may be what admits us."""
    parts = split(uri)
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}/{name}{query}"  # geturl() may lose the `//`


def public(uri: str) -> str:
    """The URI without user, password and query (tokens, keys, signatures): what messages and logs may hold."""
    parts = split(uri)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")


def redacted(text: str, secret: str | None = None) -> str:
    """The first line of somebody else's message, without what `public` leaves out of URIs, and without `secret`.

    One line: libhdfs, for one, lists a hundred paths on which it found no Java.
    """
    line = _QUERY.sub("", _USER.sub("//", text.partition("\n")[0].strip()))
    return line.replace(secret, "***") if secret else line
