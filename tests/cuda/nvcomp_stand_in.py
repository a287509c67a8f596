"""As much of nvCOMP as is used, with the calls that its version 6.0 documents, on memory of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from on_cpu import CpuDevice

from holoray.kernels import xp

Bytes = npt.NDArray[np.uint8]


class Batch:
    """A `BatchArray`: stretches of one buffer."""

    def __init__(self, buffer: Bytes, offsets: list[int], sizes: list[int], cuda_stream: int = 0) -> None:
        assert all(offset % 16 == 0 for offset in offsets)
        self.parts = [buffer[offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)]
        self.buffer_sizes = sizes


class Decoder:
    """A `Codec` for raw zstd frames; `spoil` is what a test does to the bytes that come out."""

    def __init__(self, spoil: Callable[[bytes], bytes], **options: Any) -> None:
        assert options == {"algorithm": "Zstd", "bitstream_kind": "raw", "device_id": 0, "cuda_stream": 7}
        self._spoil = spoil

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def decode(self, srcs: Batch, out: Batch) -> Batch:
        raw = [self._spoil(zstandard.decompress(part.tobytes())) for part in srcs.parts]
        for content, place in zip(raw, out.parts, strict=True):
            if len(content) > place.size:
                raise ValueError("the buffer is too small")
            place[: len(content)] = np.frombuffer(content, np.uint8)
        out.buffer_sizes = [len(content) for content in raw]
        return out


class QueuedCpuDevice(CpuDevice):
    number, stream_address = 0, 7


def install(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[bytes], bytes] = lambda raw: raw) -> QueuedCpuDevice:
    module = SimpleNamespace(
        as_arrays=Batch,
        BitstreamKind=SimpleNamespace(RAW="raw"),
        Codec=lambda **options: Decoder(spoil, **options),
    )
    monkeypatch.setattr(xp, "nvcomp", lambda: module)
    return QueuedCpuDevice(None)
