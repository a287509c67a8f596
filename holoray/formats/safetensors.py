"""Safetensors files, streamed: a header that is checked before anything is believed, tensors read and written one
by one (the reference library maps whole files and has no bfloat16 for NumPy).

Format: u64 little-endian header length, a JSON object {name: {dtype, shape, data_offsets}} with an optional
`__metadata__` of strings, then the data; the offsets tile the data exactly.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np

from holoray.errors import CapacityError, FormatError, HolorayError, LimitError, SourceError, TruncatedError
from holoray.files import NO_ROOM, open_for_reading
from holoray.tensor import Array, TensorSpec, as_bytes

MAX_HEADER_BYTES: Final = 100_000_000  # the reference implementation's limit
_METADATA: Final = "__metadata__"


class SafetensorsFile:
    """A safetensors file open for reading; `specs` in the order of their data."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = open_for_reading(self.path)
        self._closer = weakref.finalize(self, os.close, self._file)
        self._size = os.fstat(self._file).st_size
        header, self._data_start = self._read_header()
        self.metadata = _metadata(header.pop(_METADATA, None))
        self._ranges = _tensor_ranges(header, self._size - self._data_start, str(self.path))
        self.specs: tuple[TensorSpec, ...] = tuple(spec for spec, _ in self._ranges.values())

    def close(self) -> None:
        """Close the file now; it is also closed when the object goes."""
        self._closer()

    def read(self, name: str) -> Array:
        """One tensor as a fresh array (BF16 as ml_dtypes.bfloat16)."""
        spec, offset = self._ranges[name]
        out = np.empty(spec.shape, spec.numpy_dtype)
        view = as_bytes(out).data
        done = 0
        while done < spec.nbytes:
            got = os.preadv(self._file, [view[done:]], self._data_start + offset + done)
            if got == 0:
                raise TruncatedError(f"{self.path} ended inside tensor {name!r}", tensor=name)
            done += got
        return out

    def _read_header(self) -> tuple[dict[str, Any], int]:
        prefix = os.pread(self._file, 8, 0)
        if len(prefix) < 8:
            raise TruncatedError(f"{self.path} is too short for a safetensors file")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise LimitError(f"{self.path} states a header of {length} bytes", hint="is it a safetensors file?")
        if length > self._size - 8:
            raise TruncatedError(f"{self.path} ends inside its header")
        text = os.pread(self._file, length, 8)
        try:
            header = json.loads(text.decode(), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{self.path} has a malformed header: {error}") from None
        if not isinstance(header, dict):
            raise FormatError(f"{self.path} has a header that is no JSON object")
        return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key appears twice")
    return out


def _metadata(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise FormatError("safetensors metadata must be an object of strings")
    return value


def _tensor_ranges(header: Mapping[str, Any], data_bytes: int, path: str) -> dict[str, tuple[TensorSpec, int]]:
    rows = sorted((_row(name, value) for name, value in header.items()), key=lambda row: (row[1], row[2]))
    position = 0
    for spec, start, end in rows:
        if start != position or end - start != spec.nbytes:
            raise FormatError(f"{path}: tensor {spec.name!r} does not lie where it should", tensor=spec.name)
        position = end
    if position > data_bytes:
        raise TruncatedError(f"{path} holds {data_bytes} of {position} data bytes", hint="copy the file again")
    if position < data_bytes:
        raise FormatError(f"{path} has {data_bytes - position} bytes that belong to no tensor")
    return {spec.name: (spec, start) for spec, start, _ in rows}


def _row(name: str, value: Any) -> tuple[TensorSpec, int, int]:
    try:
        shape, (start, end) = value["shape"], value["data_offsets"]
        whole = [*shape, start, end]
        if value.keys() != {"dtype", "shape", "data_offsets"} or not isinstance(value["dtype"], str):
            raise TypeError
        if any(type(n) is not int or n < 0 for n in whole):
            raise TypeError
    except (TypeError, KeyError, ValueError, AttributeError):
        raise FormatError(f"the header entry of tensor {name!r} is malformed", tensor=name) from None
    return TensorSpec(name, value["dtype"], tuple(shape)), start, end


class SafetensorsWriter:
    """Writes a safetensors file tensor by tensor, in any order and from any thread; visible only when complete.

    A context manager; raises CapacityError where the disk cannot hold the file, before anything is written.
    """

    def __init__(
        self, path: str | os.PathLike[str], specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path = Path(path)
        if not self.path.name:
            raise SourceError(f"cannot write to {os.fspath(path)!r}", hint="name a file")
        self._partial = self.path.with_name(f"{self.path.name}.{os.getpid()}-{threading.get_ident()}.partial")
        header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
        self._offsets: dict[str, int] = {}
        position = 0
        for spec in specs:
            header[spec.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [position, position + spec.nbytes],
            }
            self._offsets[spec.name] = position
            position += spec.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._data_start = 8 + len(text)
        self._bytes = self._data_start + position
        self._header = struct.pack("<Q", len(text)) + text

    def __enter__(self) -> SafetensorsWriter:
        try:
            if self.path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a directory")
            self._file = open(self._partial, "wb", buffering=0)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise self._unwritable(error) from None
        try:
            os.posix_fallocate(self._file.fileno(), 0, self._bytes)
            self._write(0, memoryview(self._header))
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            if isinstance(error, OSError):
                raise self._unwritable(error) from error
            raise
        return self

    def write(self, name: str, array: Array) -> None:
        try:
            self._write(self._data_start + self._offsets[name], as_bytes(array).data)
        except OSError as error:
            raise self._unwritable(error) from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                os.fsync(self._file.fileno())
                os.replace(self._partial, self.path)
        except OSError as failed:
            kind = type(failed)
            raise self._unwritable(failed) from failed
        finally:
            self._file.close()
            if kind is not None:
                with suppress(OSError):
                    self._partial.unlink()

    def _write(self, offset: int, data: memoryview) -> None:
        done = 0
        while done < data.nbytes:
            done += os.pwrite(self._file.fileno(), data[done:], offset + done)

    def _unwritable(self, error: Exception) -> HolorayError:
        reason = error.strerror if isinstance(error, OSError) else error
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return CapacityError(
                f"cannot write the {self._bytes} bytes of {self.path}: {reason}", hint="free some space"
            )
        return SourceError(f"cannot write {self.path}: {reason}", hint="name a file in a directory that exists")
