"""File systems by URI: Arrow's own (S3, GCS, Azure, HDFS, local), and any of fsspec's through Arrow's adapter."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import pyarrow as pa
from pyarrow import fs

from holoray.errors import CapacityError, HolorayError, MissingError, SourceError, UsageError
from holoray.files import NO_ROOM
from holoray.stores.uri import public, redacted, scheme_of, split

_NATIVE: Final = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "file")
_OBJECT_STORES: Final = ("s3", "gcs", "abfs")
_RENAMING: Final = ("local", "hdfs")
_MISSING: Final = ("no_such_bucket", "no_such_key", "no such bucket")
_DENIED: Final = ("access_denied", "accessdenied", "forbidden", "unauthorized", "http status 401", "http status 403")


def check_scheme(uri: str) -> None:
    """Raise UsageError for a scheme that nothing here speaks, naming the package that would."""
    scheme = scheme_of(uri)
    if scheme in _NATIVE:
        return
    try:
        import fsspec
    except ImportError:
        message = f"{scheme}:// is spoken through fsspec, which is not installed"
        raise UsageError(message, hint="pip install 'holoray[remote]'") from None
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError:
        hint = "a local path, http(s), what pyarrow.fs speaks (s3, gs, abfs, hdfs), or a file system of fsspec"
        raise UsageError(f"{scheme}:// is no scheme that is known here", hint=hint) from None
    except ImportError as error:  # its text says what to install
        raise UsageError(f"{scheme}:// needs a package that is not installed", hint=str(error)) from None


def connect(uri: str) -> tuple[Any, str]:
    """The `pyarrow.fs.FileSystem` of a URI whose scheme was checked, and the path in it.

    Raises UsageError for a URI that makes no sense, SourceError if the file system cannot be reached.
    """
    with told("cannot open", uri):
        if scheme_of(uri) in _NATIVE:
            filesystem, path = fs.FileSystem.from_uri(uri)
            return filesystem, path
        import fsspec

        inner, path = fsspec.url_to_fs(uri)
        return fs.PyFileSystem(_RangedReads(inner)), path


def has_directories(filesystem: Any) -> bool:
    """Whether a directory must be made before a file can be written to it; object stores only know names."""
    return filesystem.type_name not in _OBJECT_STORES


def can_rename(filesystem: Any) -> bool:
    """Whether a file takes another's place in one step; object stores, and fsspec in general, copy and delete."""
    return filesystem.type_name in _RENAMING


@contextmanager
def told(doing: str, uri: str) -> Iterator[None]:
    """Turns whatever a file system raises into an error of ours that shows no credentials.

    Each of fsspec's implementations raises what its client library does, hence every Exception. `from None`: the
    original's text may hold the URI with its secrets.
    """
    try:
        yield
    except (HolorayError, MemoryError):
        raise
    except Exception as error:
        raise _translated(error, doing, uri) from None


def _translated(error: Exception, doing: str, uri: str) -> HolorayError:
    what, why = f"{doing} {public(uri)}", redacted(str(error), split(uri).password) or type(error).__name__
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return CapacityError(f"{what}: {why}", hint="free some space there and run again")
    if isinstance(error, pa.ArrowNotImplementedError):
        return UsageError(f"{what}: {why}", hint="this pyarrow, or this file system, does not offer it")
    if isinstance(error, pa.ArrowInvalid):
        return UsageError(f"{what}: {why}", hint="is the URI right?")
    if isinstance(error, FileNotFoundError) or _says(error, _MISSING):
        return MissingError(f"{what}: not found", hint="is the URI right?", source=public(uri))
    if isinstance(error, PermissionError) or _says(error, _DENIED):
        return SourceError(f"{what}: {why}", hint="check the credentials and permissions", source=public(uri))
    return SourceError(f"{what}: {why}", hint="check the address, the network and the credentials", source=public(uri))


def _says(error: Exception, words: tuple[str, ...]) -> bool:
    """Whether the text names one of these causes: Arrow's object stores tell them apart only there."""
    text = str(error).lower()
    return any(word in text for word in words)


class _RangedReads(fs.FSSpecHandler):  # type: ignore[misc]
    """Reads exactly the ranges asked for: fsspec's default reads ahead, which is waste for fragments."""

    def open_input_file(self, path: str) -> pa.NativeFile:
        file = self.fs.open(path, "rb", cache_type="none")
        if isinstance(file, io.BytesIO):  # fsspec's memory gives all readers one object, and so one position
            return pa.BufferReader(file.getbuffer())
        return pa.PythonFile(file, mode="r")
