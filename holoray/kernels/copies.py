"""Copies between ordinary memory and a device, through page-locked staging buffers and on one stream.

A copy from ordinary memory makes the driver wait; from page-locked memory it is queued. So bytes go through borrowed
buffers, a piece each: while the device reads one piece, the next one is put into another buffer.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from holoray.kernels.pools import Bytes, Event, StagingPool

PIECE_BYTES: Final = 2 << 20
"""Large enough for the full speed of a bus, and not more than a run of `planes` has in F32."""


class CopyStream(Protocol):
    """Where copies are queued. `address` is one of the device, `buffer` is page-locked."""

    def to_device(self, address: int, buffer: Bytes) -> None:
        """Queue a copy; the buffer must stay as it is until the event behind it is done."""

    def to_host(self, buffer: Bytes, address: int) -> None:
        """Queue a copy into the buffer."""

    def record(self) -> Event:
        """An event behind all that is queued."""

    def synchronize(self) -> None:
        """Wait for all that is queued on this stream, and for no other."""


def write(stream: CopyStream, staging: StagingPool, address: int, host: npt.NDArray[Any]) -> None:
    """Queue a copy of a contiguous host array to `address`; when this returns, the host array is no longer needed."""
    data = host.reshape(-1).view(np.uint8)
    for start in range(0, data.size, PIECE_BYTES):
        piece = data[start : start + PIECE_BYTES]
        buffer = staging.borrow(piece.size)
        try:
            buffer[: piece.size] = piece
            stream.to_device(address + start, buffer[: piece.size])
        except BaseException:
            staging.give_back(buffer)
            raise
        # Without an event nobody knows when the buffer is free: if there can be none, it is never lent again.
        staging.give_back(buffer, after=stream.record())


def read(stream: CopyStream, staging: StagingPool, host: npt.NDArray[Any], address: int) -> None:
    """Fill a contiguous host array from `address`, behind all that is queued on the stream; waits.

    One buffer at a time: with two, threads that hold one each could wait for each other's second.
    """
    data = host.reshape(-1).view(np.uint8)
    for start in range(0, data.size, PIECE_BYTES):
        piece = data[start : start + PIECE_BYTES]
        buffer = staging.borrow(piece.size)
        stream.to_host(buffer[: piece.size], address + start)
        stream.synchronize()
        piece[:] = buffer[: piece.size]
        staging.give_back(buffer)
