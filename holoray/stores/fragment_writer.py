"""Writing fragment files: Arrow IPC files whose payload ranges can be read without Arrow."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, BinaryIO, Final

import numpy as np
import pyarrow as pa

from holoray.manifest import FileEntry
from holoray.stores.base import Store, fragment_file

BATCH_BYTES: Final = 8 << 20
SCHEMA: Final = pa.schema(
    [
        pa.field("tensor", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("payload", pa.large_binary(), nullable=False),
    ]
)


class FragmentFileWriter:
    """One fragment file being written; `append` tells where a payload will lie once its batch is flushed.

    A context manager: a clean exit makes the file visible, an error leaves nothing. `offsets[i]` is the byte offset
    of the i-th appended payload, `entry` the manifest's line about the file; both are known after a clean exit.
    """

    def __init__(self, store: Store, number: int) -> None:
        self.number = number
        self.offsets: list[int] = []
        self.entry: FileEntry | None = None
        self.bytes = 0
        self._target: AbstractContextManager[BinaryIO] = store.create(fragment_file(number))
        self._sink = _MeteredSink(self._target.__enter__())
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)
        self._names: list[str] = []
        self._indices: list[int] = []
        self._payloads: list[bytes | memoryview] = []
        self._pending_bytes = 0

    def append(self, tensor: str, index: int, payload: bytes | memoryview) -> int:
        """Add a fragment; returns its position in `offsets`."""
        self._names.append(tensor)
        self._indices.append(index)
        self._payloads.append(payload)
        self._pending_bytes += len(payload)
        self.bytes += len(payload)
        if self._pending_bytes >= BATCH_BYTES:
            self._flush()
        return len(self.offsets) + len(self._payloads) - 1

    def __enter__(self) -> FragmentFileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            try:
                self._flush()
                self._writer.close()
            except BaseException as failed:
                self._target.__exit__(type(failed), failed, failed.__traceback__)
                raise
            self.entry = FileEntry(self.number, self._sink.position, self._sink.framing.hexdigest())
        self._target.__exit__(kind, error, at)

    def _flush(self) -> None:
        if not self._payloads:
            return
        data = pa.py_buffer(b"".join(self._payloads))
        starts = np.cumsum([0, *map(len, self._payloads)], dtype=np.int64)
        payloads = pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), len(self._payloads), [None, pa.py_buffer(starts), data]
        )
        columns = [pa.array(self._names, pa.string()), pa.array(self._indices, pa.int32()), payloads]
        batch = pa.record_batch(columns, schema=SCHEMA)
        base = self._sink.write_around(data, lambda: self._writer.write_batch(batch))
        self.offsets.extend(int(start) + base for start in starts[:-1])
        self._names, self._indices, self._payloads, self._pending_bytes = [], [], [], 0


class _MeteredSink:
    """What Arrow writes to: learns where the payload buffer lands, and hashes everything else (the framing)."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.position = 0
        self.framing = hashlib.sha256()
        self._payload: pa.Buffer | None = None
        self._payload_at = -1

    def write_around(self, payload: pa.Buffer, write: Callable[[], None]) -> int:
        """Run `write`, which writes `payload` among other things; returns the offset at which it was written."""
        self._payload, self._payload_at = payload, self.position
        write()
        self._payload = None
        return self._payload_at

    def write(self, data: Any) -> int:
        # Arrow hands body buffers over as they are, so the address tells the payload from buffers of equal size.
        nbytes = memoryview(data).nbytes
        mine = self._payload
        if mine is not None and isinstance(data, pa.Buffer) and (data.address, nbytes) == (mine.address, mine.size):
            self._payload_at = self.position
        else:
            self.framing.update(data)
        self._file.write(data)
        self.position += nbytes
        return nbytes

    def tell(self) -> int:
        return self.position

    def flush(self) -> None:
        """Nothing to do: the file below is flushed when it is closed."""

    def close(self) -> None:
        """Nothing to do: the store closes the file below."""
