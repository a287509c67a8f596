"""zstd frames to a device: what is refused before a decoder sees it, and that both ways give the same bytes.

Where there is no nvCOMP a stand-in takes its place: it has the calls that are used, as nvCOMP 6.0 documents them, on
memory of the CPU. That says that frames are packed, checked and cut right; nvCOMP itself answers with `pytest -m gpu`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from nvcomp_stand_in import install
from on_cpu import CpuDevice

from holoray.errors import DeviceError, FormatError, UsageError
from holoray.kernels import xp
from holoray.kernels.frames import HOST, NVCOMP, open_frames


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    contents=st.lists(st.binary(min_size=1, max_size=300), max_size=5), repeat=st.integers(1, 400), check=st.booleans()
)
def test_both_ways_give_the_same_bytes(contents: list[bytes], repeat: int, check: bool) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        device = install(monkeypatch)
        contents = [content * repeat for content in contents]
        compressor = zstandard.ZstdCompressor(level=1, write_checksum=check)
        frames = [memoryview(compressor.compress(content)) for content in contents]
        for where in (HOST, NVCOMP):
            opened = open_frames(device, frames, [len(content) for content in contents], where=where)
            assert [bytes(device.download(one)) for one in opened] == contents


def test_blocks_of_one_repeated_byte_are_stepped_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second block on, the compressor writes such; a block is at most 128 KiB."""
    device, content = install(monkeypatch), bytes(400_000)
    (opened,) = open_frames(device, [zstandard.compress(content)], [len(content)], where=NVCOMP)
    assert bytes(device.download(opened)) == content


def refused() -> dict[str, tuple[bytes, int]]:
    good = zstandard.compress(bytes(range(256)) * 40)
    noise = np.random.default_rng(0).bytes(300_000)  # several blocks
    return {
        "states less": (good, 10_239),
        "a bomb": (zstandard.compress(bytes(1 << 20)), 1 << 10),
        "does not state its size": (zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000)), 1000),
        "cut off": (good[:-1], 10_240),
        "cut off between blocks": (zstandard.compress(noise)[: 1 << 17], 300_000),
        "something behind": (good + b"x", 10_240),
        "a frame behind": (good + good, 10_240),
        "no frame": (b"nonsense" * 4, 32),
        "nothing": (b"", 0),
    }


@pytest.mark.fault("bomb", "malformed")
@pytest.mark.parametrize("name", refused())
def test_what_is_no_whole_frame_of_its_size_never_reaches_a_decoder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = install(monkeypatch)
    monkeypatch.setattr(device, "zeros", lambda *_: pytest.fail("memory was reserved"))
    frame, size = refused()[name]
    for where in (HOST, NVCOMP):
        with pytest.raises(FormatError):
            open_frames(device, [frame], [size], where=where)


@pytest.mark.parametrize("spoil", [lambda raw: raw[:-1], lambda raw: raw + b"x"], ids=["less", "more"])
def test_a_frame_that_yields_another_size_than_it_states_is_refused(
    spoil: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = install(monkeypatch, spoil)
    with pytest.raises(FormatError):
        open_frames(device, [zstandard.compress(bytes(1000))], [1000], where=NVCOMP)


def test_what_is_missing_or_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(raw: bytes) -> bytes:
        raise RuntimeError("cudaErrorIllegalAddress")

    with pytest.raises(UsageError, match="opened by 'gpu'"):
        open_frames(CpuDevice(None), [], [], where="gpu")
    device = install(monkeypatch, fail)
    with pytest.raises(DeviceError, match="IllegalAddress"):
        open_frames(device, [zstandard.compress(bytes(1000))], [1000], where=NVCOMP)


@pytest.mark.parametrize("version", ["missing", "5.3.0"])
def test_no_nvcomp_or_an_old_one_says_what_to_install(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def module(name: str) -> Any:
        if version == "missing":
            raise ImportError(f"no module named {name}")
        return SimpleNamespace(__version__=version)

    monkeypatch.setattr(xp, "cupy", lambda: None)
    monkeypatch.setattr("holoray.kernels.xp.importlib.import_module", module)
    with pytest.raises(DeviceError, match="nvCOMP") as caught:
        open_frames(CpuDevice(None), [], [], where=NVCOMP)
    assert "pip install" in caught.value.hint


@pytest.mark.gpu
def test_nvcomp_gives_the_bytes_of_the_host() -> None:
    from holoray.kernels.cuda.device import CudaDevice

    try:
        xp.nvcomp()
    except DeviceError as error:
        pytest.skip(error.message)
    device, rng = CudaDevice(), np.random.default_rng(0)
    contents = [rng.integers(0, 9, int(size), np.uint8) for size in rng.integers(1, 1 << 18, 300)]
    frames = [zstandard.compress(content.tobytes(), level=1) for content in contents]
    opened = open_frames(device, frames, [content.size for content in contents], where=NVCOMP)
    assert all(np.array_equal(device.download(a), b) for a, b in zip(opened, contents, strict=True))
