"""Pools: nothing is lent twice, memory stays below its limit, what the device still reads is not handed out."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from holoray.errors import CapacityError, DeadlineError, UsageError
from holoray.kernels.device import MAX_GRID, Geometry, grid_stride
from holoray.kernels.pools import DONE, LARGEST_BYTES, HostStream, StagingPool, StreamPool, host_memory, size_class

LIMIT = 64 << 10


@dataclass
class Pending:
    done: bool = False


class StagingMachine(RuleBasedStateMachine):
    """Against a plain account of who has which bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = StagingPool(LIMIT, host_memory)
        self.lent: list[np.ndarray] = []
        self.flying: list[tuple[Pending, int, int]] = []  # event, address, bytes

    @rule(nbytes=st.integers(0, LIMIT))
    def borrow(self, nbytes: int) -> None:
        taken = sum(b.size for b in self.lent) + sum(size for event, _, size in self.flying if not event.done)
        if taken + size_class(nbytes) > LIMIT:
            with pytest.raises(DeadlineError):
                self.pool.borrow(nbytes, timeout_s=0)
            return
        buffer = self.pool.borrow(nbytes, timeout_s=0)
        assert buffer.size == size_class(nbytes) >= nbytes
        mine = {b.ctypes.data for b in self.lent} | {at for event, at, _ in self.flying if not event.done}
        assert buffer.ctypes.data not in mine
        self.lent.append(buffer)

    @precondition(lambda self: self.lent)
    @rule(data=st.data(), later=st.booleans())
    def give_back(self, data: st.DataObject, later: bool) -> None:
        buffer = self.lent.pop(data.draw(st.integers(0, len(self.lent) - 1)))
        event = Pending()
        if later:
            self.flying.append((event, buffer.ctypes.data, buffer.size))
        self.pool.give_back(buffer, after=event if later else None)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))[0].done = True

    @invariant()
    def bytes_add_up(self) -> None:
        stats = self.pool.stats
        assert stats.borrowed_bytes == sum(b.size for b in self.lent)
        assert stats.in_flight_bytes == sum(size for _, _, size in self.flying)
        assert stats.borrowed_bytes + stats.in_flight_bytes + stats.free_bytes <= stats.peak_bytes <= LIMIT


TestStaging = StagingMachine.TestCase
TestStaging.settings = settings(max_examples=40, stateful_step_count=25, deadline=None, derandomize=True)


def test_prewarmed_buffers_are_hits() -> None:
    pool = StagingPool(LIMIT, host_memory)
    pool.prewarm(5000, 3)
    for _ in range(3):
        pool.borrow(8000)
    assert (pool.stats.hits, pool.stats.misses, pool.stats.peak_bytes) == (3, 0, 3 * 8192)
    with pytest.raises(CapacityError):
        pool.prewarm(5000, 9)


def test_staging_refuses_what_cannot_be() -> None:
    pool = StagingPool(LIMIT, host_memory)
    with pytest.raises(CapacityError):
        pool.borrow(LIMIT + 1)
    with pytest.raises(UsageError, match="staging memory of"):
        pool.borrow(LARGEST_BYTES + 1)
    buffer = pool.borrow(1)
    pool.give_back(buffer)
    with pytest.raises(UsageError, match="returned already"):
        pool.give_back(buffer)
    assert [size_class(n) for n in (0, 1, 4096, 4097, LARGEST_BYTES)] == [4096, 4096, 4096, 8192, LARGEST_BYTES]


def test_a_borrower_waits_for_what_comes_back() -> None:
    pool, got = StagingPool(4096, host_memory), threading.Event()
    first = pool.borrow(1)

    def wait() -> None:
        pool.give_back(pool.borrow(1))
        got.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not got.wait(0.05)
    pool.give_back(first, after=HostStream().record())
    assert got.wait(60)
    thread.join()


def test_a_stream_has_one_borrower() -> None:
    pool = StreamPool(2, HostStream)
    with pool.borrow() as a, pool.borrow() as b:
        assert a is not b
        assert pool.free == 0
        with pytest.raises(DeadlineError), pool.borrow(timeout_s=0):
            pass
    assert pool.free == 2
    with pytest.raises(RuntimeError, match="kernel"), pool.borrow():
        raise RuntimeError("kernel")
    assert pool.free == 2
    assert DONE.done
    with pytest.raises(UsageError):
        StreamPool(0, HostStream)


def test_launch_geometry_covers_all_items_and_stays_in_range() -> None:
    for items in (0, 1, 255, 256, 257, 10**6, 10**12):
        geometry = grid_stride(items, 256, 8 * 132)
        assert 1 <= geometry.grid <= 8 * 132
        assert geometry.grid * 256 >= min(items, 8 * 132 * 256)
    for bad in ((0, 1, 0), (1, 0, 0), (1, 1025, 0), (MAX_GRID + 1, 1, 0), (1, 1, -1)):
        with pytest.raises(ValueError, match="impossible launch"):
            Geometry(*bad)
