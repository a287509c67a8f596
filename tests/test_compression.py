"""Compression keeps only what pays, and decompression never makes more than it was promised."""

from __future__ import annotations

import os

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from holoray.compression import NAMES, compress, decompress
from holoray.errors import FormatError, UsageError


@given(st.sampled_from(NAMES), st.binary(max_size=2000), st.integers(1, 50), st.sampled_from([0.0, 0.1, 0.5]))
def test_round_trip(name: str, data: bytes, repeat: int, saving: float) -> None:
    data *= repeat
    used, small = compress(name, data, saving)
    assert used in (name, "none")
    assert len(small) <= len(data) * (1 - saving) or used == "none"
    assert bytes(decompress(used, small, len(data))) == data


def test_noise_stays_as_it_is() -> None:
    noise = os.urandom(10_000)
    for name in NAMES:
        assert compress(name, noise, 0.02) == ("none", noise)


@pytest.mark.fault("bomb")
@pytest.mark.parametrize("name", ["zstd", "lz4"])
@pytest.mark.parametrize("claimed", [0, 1, 99_999, 100_001, 1 << 40])
def test_other_sizes_than_promised(name: str, claimed: int) -> None:
    used, small = compress(name, bytes(100_000), 0.1)
    assert used == name
    with pytest.raises(FormatError):
        decompress(name, small, claimed)


@pytest.mark.fault("bomb")
def test_frames_that_hide_their_size_or_carry_more() -> None:
    stream = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000))
    whole = zstandard.ZstdCompressor().compress(bytes(1000))
    for bad in (stream, whole + b"x", whole + whole, whole[:-1], b"", b"nonsense"):
        with pytest.raises(FormatError):
            decompress("zstd", bad, 1000)
    with pytest.raises(FormatError):
        decompress("none", b"abc", 2)
    with pytest.raises(FormatError, match="unknown"):
        decompress("brotli", b"abc", 3)
    with pytest.raises(UsageError):
        from holoray.compression import check_name

        check_name("brotli")
