"""Copies through staging memory: any size, any stream, and no buffer is reused before the device has read it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from late_device import LateDevice, LateStream

from holoray.kernels import copies
from holoray.kernels.pools import Bytes, StagingPool, host_memory

SIZES = st.integers(0, 5000) | st.integers(-2, 2).map(lambda d: copies.PIECE_BYTES + d) | st.just(5 << 20)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(sizes=st.lists(SIZES, min_size=1, max_size=5), pieces=st.integers(1, 3))
def test_what_is_written_is_read_back(sizes: list[int], pieces: int) -> None:
    """All writes are queued before the first is read: a buffer that comes back too early carries the next one's."""
    device = LateDevice(staging_bytes=pieces * copies.PIECE_BYTES)
    rng = np.random.default_rng(len(sizes))
    arrays = [rng.integers(0, 256, size).astype(np.uint8) for size in sizes]
    with device.stream():
        there = []
        for array in arrays:
            host = array.copy()
            there.append(device.upload(host))
            host[:] = 0  # reused at once
        for array, copy in zip(arrays, there, strict=True):
            assert np.array_equal(device.download(copy), array)
    stats = device.staging.stats
    assert stats.borrowed_bytes == 0
    assert stats.peak_bytes <= pieces * copies.PIECE_BYTES


def test_a_large_copy_has_two_buffers_in_flight() -> None:
    """The next piece is put into place before the device has read the last one."""
    pool, stream = StagingPool(64 << 20, host_memory), LateStream()
    target = np.zeros(4 * copies.PIECE_BYTES, np.uint8)
    copies.write(stream, pool, target.ctypes.data, np.ones_like(target))
    assert stream.most_queued >= 2
    stream.synchronize()
    assert target.all()


def test_a_copy_that_cannot_be_queued_gives_its_buffer_back() -> None:
    class Broken(LateStream):
        def to_device(self, address: int, buffer: Bytes) -> None:
            raise RuntimeError("launch failure")

    pool = StagingPool(1 << 20, host_memory)
    with pytest.raises(RuntimeError, match="launch failure"):
        copies.write(Broken(), pool, 0, np.ones(100, np.uint8))
    assert pool.stats.borrowed_bytes == 0


def test_streams_wait_for_themselves_only() -> None:
    device = LateDevice(streams=2)
    with device.shared():
        shared = device.zeros((4,), np.uint8)
    assert not shared.any()
    with device.stream():
        device.write(shared, np.ones(4, np.uint8))
        other = device.streams[0] if device.streams[1].most_queued else device.streams[1]
        other.synchronize()
        assert not shared.any()
        device.synchronize()
        assert shared.all()
