"""zstd frames of verified payloads to bytes on a device: by the threads of the host, or many at once by nvCOMP.

The way through nvCOMP never ran on a GPU: it was written from the documentation of its version 6.0 and is checked
beside a stand-in for that. No load uses it unasked: nvCOMP decodes a frame by few threads, so it pays for hundreds of
frames at once if at all, and `make gpu-bench` says from how many. What loads do with it: ADR 0025.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import zstandard

from holoray.compression import MAX_WINDOW_BYTES, ZSTD, decompress
from holoray.errors import DeviceError, FormatError, UsageError
from holoray.kernels import xp
from holoray.kernels.device import Device

HOST: Final = "host"
NVCOMP: Final = "nvcomp"
DEVICE: Final = "device"
AUTO: Final = "auto"
_ALIGNMENT: Final = 16
"""Multiples that nvCOMP takes for every algorithm."""
_BLOCK_HEADER: Final = 3
_CHECKSUM: Final = 4


class QueuedDevice(Device, Protocol):
    """A device whose stream other libraries may use: `CudaDevice`."""

    @property
    def stream_address(self) -> int: ...


@runtime_checkable
class FrameTaker(Protocol):
    """An accumulator whose fragments are whole zstd frames that may be opened on its device."""

    def accumulate_opened(self, slot: int, raw: Any) -> None:
        """Queue what adds a slot whose raw bytes are uint8 on the device; needs no memory there."""


def check_decompress(decompress: str) -> None:
    """Raise UsageError for a word that names no place where frames are opened."""
    if decompress not in (HOST, DEVICE, AUTO):
        raise UsageError(f"nothing decompresses on {decompress!r}", hint=f"choose {HOST}, {DEVICE} or {AUTO}")


def opens_on_device(decompress: str, device: Device | None) -> bool:
    """Whether a load onto `device` opens frames there: `decompress` is "host", "device" or "auto".

    "auto" takes the device where nvCOMP is installed; that this is faster was never measured. Raises UsageError for
    another word or "device" without a device, DeviceError where that lacks nvCOMP.
    """
    check_decompress(decompress)
    if decompress == HOST or (decompress == AUTO and device is None):
        return False
    if device is None:
        raise UsageError("there is no device to decompress on", hint="name one (--device cuda), or leave this out")
    try:
        xp.nvcomp()
    except DeviceError:
        if decompress == DEVICE:
            raise
        return False
    return True


def is_plain(frame: Any) -> bool:
    """Whether a decoder without options opens the frame as the host's does: there is nothing that only that looks at.

    These are a checksum, a dictionary, and a window beyond what the host allows.
    """
    try:
        found = zstandard.get_frame_parameters(frame)
    except zstandard.ZstdError:
        return False
    return not found.has_checksum and not found.dict_id and found.window_size <= MAX_WINDOW_BYTES


def frame_nbytes(stored_bytes: int, raw_bytes: int) -> int:
    """Bytes of a device that a frame takes while it is opened, without nvCOMP's own."""
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in (stored_bytes, raw_bytes))


def open_frames(device: Device, frames: Sequence[Any], raw_bytes: Sequence[int], *, where: str = HOST) -> list[Any]:
    """uint8[raw_bytes[i]] on the device for every frame i, by the host or by nvCOMP: the same bytes, or an error.

    Raises FormatError for a frame that does not state and yield its raw bytes, before any memory for it is reserved,
    DeviceError where nvCOMP is asked for and missing or fails, UsageError for another place.
    """
    if where == HOST:
        raw = (decompress(ZSTD, frame, size) for frame, size in zip(frames, raw_bytes, strict=True))
        arrays = [device.upload(np.frombuffer(content, np.uint8)) for content in raw]
        device.synchronize()
        return arrays
    if where != NVCOMP:
        raise UsageError(f"frames are not opened by {where!r}", hint=f"choose {HOST} or {NVCOMP}")
    return _by_nvcomp(xp.nvcomp(), device, frames, raw_bytes)  # type: ignore[arg-type]


def _by_nvcomp(nvcomp: Any, device: QueuedDevice, frames: Sequence[Any], raw_bytes: Sequence[int]) -> list[Any]:
    for frame, size in zip(frames, raw_bytes, strict=True):
        _check_frame(frame, size)
    if not frames:
        return []
    packed, starts, sizes = _pack(frames)
    raw_starts, total = _places(raw_bytes)
    source, raw = device.upload(packed), device.zeros((total,), np.uint8)
    device.synchronize()
    own = {"device_id": device.number, "cuda_stream": device.stream_address}
    try:
        with nvcomp.Codec(algorithm="Zstd", bitstream_kind=nvcomp.BitstreamKind.RAW, **own) as codec:
            stored = nvcomp.as_arrays(source, starts, sizes, device.stream_address)
            # What is written to has a fixed size: nvCOMP refuses a frame that yields more with a ValueError.
            target = nvcomp.as_arrays(raw, raw_starts, list(raw_bytes), device.stream_address)
            got = codec.decode(stored, out=target).buffer_sizes  # waits
    except ValueError as error:
        raise FormatError(f"nvCOMP refuses a zstd frame: {error}") from None
    except RuntimeError as error:
        raise DeviceError(f"nvCOMP failed: {error}", hint="open frames on the host") from None
    if list(got) != list(raw_bytes):
        raise FormatError("a zstd frame yields another number of bytes than it states")
    return [raw[start : start + size] for start, size in zip(raw_starts, raw_bytes, strict=True)]


def _check_frame(frame: Any, size: int) -> None:
    """Raise FormatError unless this is one whole zstd frame of `size` bytes, not none, with nothing behind it."""
    try:
        stated, parameters = zstandard.frame_content_size(frame), zstandard.get_frame_parameters(frame)
        at = zstandard.frame_header_size(frame)
    except zstandard.ZstdError as error:
        raise FormatError(f"no zstd frame: {error}") from None
    if stated != size or size == 0:
        raise FormatError(f"zstd frame does not state the {size} bytes of the manifest, or these are none")
    view = memoryview(frame)
    last = False
    while not last and at < view.nbytes:  # blocks, as RFC 8878, section 3.1.1.2, has them
        header = int.from_bytes(view[at : at + _BLOCK_HEADER], "little")
        last, repeated, length = bool(header & 1), header >> 1 & 3 == 1, header >> 3
        at += _BLOCK_HEADER + (1 if repeated else length)
    if not last or at + (_CHECKSUM if parameters.has_checksum else 0) != view.nbytes:
        raise FormatError("zstd frame is cut off, or something lies behind it")


def _places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where stretches of these sizes begin, at multiples of what nvCOMP wants, and how long all are."""
    room = -(-np.array(sizes, np.int64) // _ALIGNMENT) * _ALIGNMENT
    ends = np.cumsum(room)
    return (ends - room).tolist(), int(ends[-1])


def _pack(frames: Sequence[Any]) -> tuple[npt.NDArray[np.uint8], list[int], list[int]]:
    """The frames in one array, where each begins, and their sizes: one copy to the device for all."""
    contents = [np.frombuffer(frame, np.uint8) for frame in frames]
    sizes = [content.size for content in contents]
    starts, total = _places(sizes)
    packed = np.zeros(total, np.uint8)
    for start, content in zip(starts, contents, strict=True):
        packed[start : start + content.size] = content
    return packed, starts, sizes
