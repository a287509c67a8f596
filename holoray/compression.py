"""Payload compression with bomb guards: the raw size is known beforehand and nothing larger is ever produced."""

from __future__ import annotations

import threading
from typing import Any, Final

import pyarrow as pa
import zstandard

from holoray.errors import FormatError, UsageError

NONE: Final = "none"
LZ4: Final = "lz4"
ZSTD: Final = "zstd"
NAMES: Final = (NONE, LZ4, ZSTD)

ZSTD_LEVEL: Final = 1
# Compression that saves less than this share costs more time at load than the bytes are worth (ADR 0003): whole
# fragments (`raw`, transforms) are there to load at memory speed.
MIN_FRAGMENT_SAVING: Final = 0.3
_SAMPLE_BYTES: Final = 1 << 16
_LEAST_SAMPLE_BYTES: Final = 1 << 10

# LZ4 cannot reach more; frames that claim to are refused before memory is reserved for them.
_LZ4_MAX_RATIO: Final = 255
MAX_WINDOW_BYTES: Final = 1 << 27
"""Of a zstd frame that does not keep all of its content in one segment."""

_lz4: Final = pa.Codec(LZ4)
_local = threading.local()


def _compressor() -> zstandard.ZstdCompressor:
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    compressor: zstandard.ZstdCompressor = _local.compressor
    return compressor


def _decompressor() -> zstandard.ZstdDecompressor:
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    decompressor: zstandard.ZstdDecompressor = _local.decompressor
    return decompressor


def check_name(name: str) -> str:
    if name not in NAMES:
        raise UsageError(f"unknown compression {name!r}", hint=f"choose one of {', '.join(NAMES)}")
    return name


def compress(name: str, data: Any, min_saving: float) -> tuple[str, Any]:
    """Compress a bytes-like object if that saves at least `min_saving`; returns (name actually used, bytes-like)."""
    view = memoryview(data).cast("B")
    if name == NONE or view.nbytes == 0 or not _promising(name, view, min_saving):
        return NONE, data
    small = _compress(name, view)
    return (name, small) if len(small) <= view.nbytes * (1 - min_saving) else (NONE, data)


def _promising(name: str, view: memoryview, min_saving: float) -> bool:
    """Whether a sample from the middle saves nearly as much as is wanted: noise is not worth a full try."""
    sample = min(view.nbytes // 8, _SAMPLE_BYTES)
    if sample < _LEAST_SAMPLE_BYTES:
        return True
    middle = view.nbytes // 2
    return len(_compress(name, view[middle : middle + sample])) <= sample * (1 - 0.8 * min_saving)


def _compress(name: str, view: memoryview) -> bytes:
    small: bytes = _compressor().compress(view) if name == ZSTD else _lz4.compress(view, asbytes=True)
    return small


def decompress(name: str, data: Any, raw_bytes: int) -> Any:
    """The `raw_bytes` bytes behind `data`, as a bytes-like object (`data` itself where nothing was compressed).

    Raises FormatError where the data states or yields another size; no more than `raw_bytes` is ever allocated.
    """
    if name == NONE:
        if memoryview(data).nbytes != raw_bytes:
            raise FormatError(f"payload has {memoryview(data).nbytes} bytes instead of {raw_bytes}")
        return data
    try:
        if name == ZSTD:
            # A frame that states its size is decoded to that size whatever max_output_size says: compare first.
            if zstandard.frame_content_size(data) != raw_bytes:
                raise FormatError(f"zstd frame does not state the {raw_bytes} bytes of the manifest")
            raw = _decompressor().decompress(data, allow_extra_data=False)
        elif name == LZ4:
            raw = _decompress_lz4(data, raw_bytes)
        else:
            raise FormatError(f"unknown compression {name!r}")
    except (zstandard.ZstdError, pa.ArrowException, OSError) as error:
        raise FormatError(f"{name} payload does not decompress: {error}") from None
    if len(raw) != raw_bytes:
        raise FormatError(f"payload decompresses to {len(raw)} bytes instead of {raw_bytes}")
    return raw


def _decompress_lz4(data: Any, raw_bytes: int) -> Any:
    # `Codec.decompress` pads a frame that is shorter than promised with whatever lay in memory: a stream tells.
    if raw_bytes > memoryview(data).nbytes * _LZ4_MAX_RATIO:
        raise FormatError(f"lz4 payload cannot hold {raw_bytes} bytes")
    with pa.CompressedInputStream(pa.BufferReader(data), LZ4) as stream:
        return stream.read(raw_bytes + 1)
