"""Sums over the members of a group, and combining over them: exact, or a typed error in all of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from faulty_communicator import Fault, FaultyCommunicator
from hypothesis import given, settings
from hypothesis import strategies as st
from on_cpu import CpuDevice

from holoray.errors import HolorayError, UsageError, WorkerLostError
from holoray.kernels.combine import combine
from holoray.kernels.communicator import Communicator
from holoray.kernels.host_communicator import HostCommunicators

DEVICE = CpuDevice(None)
Member = Callable[[Communicator, threading.Event], Any]


def group(size: int, member: Member, *, timeout_s: float = 30.0) -> list[Any]:
    """What each rank's `member` returned, or the HolorayError it raised; each in a thread."""
    leader = HostCommunicators(timeout_s)
    ticket = leader.ticket()
    with ThreadPoolExecutor(size) as threads:
        futures = [
            threads.submit(_one, leader if rank == 0 else HostCommunicators(timeout_s), ticket, rank, size, member)
            for rank in range(size)
        ]
        return [future.result(60) for future in futures]


def _one(makers: HostCommunicators, ticket: bytes, rank: int, size: int, member: Member) -> Any:
    stop = threading.Event()
    try:
        communicator = makers.join(ticket, rank=rank, size=size, device=DEVICE, stop=stop)
        try:
            return member(communicator, stop)
        finally:
            communicator.close()
    except HolorayError as error:
        return error


class Bytes:
    """A slot that is just bytes."""

    def __init__(self, content: npt.NDArray[np.uint8]) -> None:
        self.content, self.nbytes = content, content.nbytes

    def pack(self, room: Any) -> None:
        room[...] = self.content

    def unpack(self, content: Any) -> None:
        self.content = content.copy()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.uint64])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_sums_are_exact_and_wrap(size: int, dtype: Any) -> None:
    rng = np.random.default_rng(size)
    arrays = [rng.integers(0, np.iinfo(dtype).max, 1001, dtype, endpoint=True) for _ in range(size)]

    def member(communicator: Communicator, _: threading.Event) -> Any:
        mine, again = arrays[communicator.rank].copy(), np.ones(3, dtype)
        first, second = communicator.all_reduce(mine), communicator.all_reduce(again)
        first.wait()
        second.wait()
        return mine, again

    expected = np.sum(np.stack(arrays).astype(np.uint64), axis=0, dtype=np.uint64).astype(dtype)
    for mine, again in group(size, member):
        assert np.array_equal(mine, expected)
        assert np.array_equal(again, np.full(3, size, dtype))


@settings(deadline=None, max_examples=25, derandomize=True)
@given(data=st.data())
def test_every_member_gets_every_part(data: st.DataObject) -> None:
    """Against the parts themselves; what a member held in their places before is never seen again."""
    size = data.draw(st.integers(2, 3))
    sizes = data.draw(st.lists(st.sampled_from((0, 1, 15, 16, 17, 300, 5000)), min_size=1, max_size=12))
    owners = [data.draw(st.integers(0, size - 1)) for _ in sizes]
    bucket = data.draw(st.sampled_from((16, 320, 1 << 20)))
    rng = np.random.default_rng(len(sizes))
    whole = [rng.integers(0, 256, n, np.uint8) for n in sizes]

    def member(communicator: Communicator, _: threading.Event) -> Any:
        mine = [owner == communicator.rank for owner in owners]
        parts = [Bytes(w.copy() if m else np.full(w.size, 0xA5, np.uint8)) for w, m in zip(whole, mine, strict=True)]
        wanted = [not m for m in mine]
        done = [i for some in combine(parts, mine, wanted, communicator, DEVICE, bucket_bytes=bucket) for i in some]
        assert done == list(range(len(sizes)))
        return [part.content for part in parts]

    for contents in group(size, member):
        assert all(np.array_equal(got, expected) for got, expected in zip(contents, whole, strict=True))


@pytest.mark.parametrize("holders", [0, 2])
def test_a_part_with_no_holder_or_two_is_refused(holders: int) -> None:
    def member(communicator: Communicator, _: threading.Event) -> Any:
        parts = [Bytes(np.full(9, communicator.rank + 1, np.uint8)) for _ in range(2)]
        mine = [communicator.rank == 0, communicator.rank < holders]
        before = [part.content for part in parts]
        with pytest.raises(UsageError, match="exactly one holder"):
            list(combine(parts, mine, [True, True], communicator, DEVICE))
        assert all(a is b.content for a, b in zip(before, parts, strict=True))

    assert group(2, member) == [None, None]


@pytest.mark.fault("collective-lost")
@pytest.mark.parametrize("fault", [Fault.DIES, Fault.HANGS])
@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_member_that_fails_at_any_sum_ends_it_for_all(fault: Fault, victim: int, at: int) -> None:
    """Whoever hangs is told to stop, as the coordinator does; the others notice by themselves."""
    whole = [np.full(100, i + 1, np.uint8) for i in range(5)]
    stops: dict[int, threading.Event] = {}

    def member(communicator: Communicator, stop: threading.Event) -> Any:
        stops[communicator.rank] = stop
        if communicator.rank == victim:
            communicator = FaultyCommunicator(communicator, fault, at, stop)
            threading.Timer(0.2, stop.set).start()
        mine = [i % 3 == communicator.rank for i in range(5)]
        parts = [Bytes(w if m else np.zeros(100, np.uint8)) for w, m in zip(whole, mine, strict=True)]
        for some in combine(parts, mine, [not m for m in mine], communicator, DEVICE, bucket_bytes=112):
            for i in some:  # what is said to be in place is
                assert np.array_equal(parts[i].content, whole[i])

    results = group(3, member)
    assert isinstance(results[victim], WorkerLostError)
    assert all(isinstance(result, WorkerLostError) for result in results)


@pytest.mark.fault("collective-lost")
def test_who_waits_in_vain_gives_up() -> None:
    makers = HostCommunicators(timeout_s=0.2)
    ticket = makers.ticket()
    with pytest.raises(WorkerLostError, match="did not answer"):
        makers.join(ticket, rank=0, size=2, device=DEVICE, stop=threading.Event())
    with pytest.raises(WorkerLostError, match="is gone"):
        makers.join(ticket, rank=1, size=2, device=DEVICE, stop=threading.Event())
    stop = threading.Event()
    stop.set()
    with pytest.raises(WorkerLostError, match="told to stop"):
        makers.join(makers.ticket(), rank=0, size=2, device=DEVICE, stop=stop)


def test_strangers_do_not_join() -> None:
    leader = HostCommunicators(30.0)
    ticket = leader.ticket()
    port = int.from_bytes(ticket[16:18], "little")

    def knock() -> None:
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"\0" * 16 + (1).to_bytes(4, "little"))
            assert stranger.recv(1) == b""

    with ThreadPoolExecutor(2) as threads:
        rank0 = threads.submit(leader.join, ticket, rank=0, size=2, device=DEVICE, stop=threading.Event())
        knock()
        rank1 = HostCommunicators(30.0).join(ticket, rank=1, size=2, device=DEVICE, stop=threading.Event())
        rank1.close()
        rank0.result(30).close()


def test_floats_and_mismatched_arrays_are_refused() -> None:
    def member(communicator: Communicator, _: threading.Event) -> Any:
        for wrong in (np.zeros(4, np.float32), np.zeros((4, 4), np.uint8)[:, ::2], np.zeros(4, np.uint16)):
            with pytest.raises(UsageError):
                communicator.all_reduce(wrong)
        communicator.all_reduce(np.zeros(4 + communicator.rank, np.uint8)).wait()

    assert all(isinstance(result, HolorayError) for result in group(2, member))
    with pytest.raises(UsageError):
        HostCommunicators().join(b"", rank=2, size=2, device=DEVICE, stop=threading.Event())


PEER = """
import sys, threading, numpy as np
sys.path[:0] = {path!r}
from on_cpu import CpuDevice
from holoray.kernels.host_communicator import HostCommunicators
ticket = bytes.fromhex(sys.argv[1])
communicator = HostCommunicators().join(ticket, rank=1, size=2, device=CpuDevice(None), stop=threading.Event())
while True:
    communicator.all_reduce(np.ones(1 << 20, np.uint8)).wait()
"""


@pytest.mark.fault("collective-lost")
def test_a_killed_process_is_noticed() -> None:
    leader = HostCommunicators(60.0)
    ticket = leader.ticket()
    code = PEER.format(path=[str(Path(__file__).parents[1] / "cuda")])
    with subprocess.Popen([sys.executable, "-c", code, ticket.hex()]) as peer:
        communicator = leader.join(ticket, rank=0, size=2, device=DEVICE, stop=threading.Event())
        mine = np.ones(1 << 20, np.uint8)
        communicator.all_reduce(mine).wait()
        assert np.all(mine == 2)
        os.kill(peer.pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(WorkerLostError, match="is gone"):
            while True:
                communicator.all_reduce(mine).wait()
        print(f"noticed after {time.monotonic() - began:.3f} s")
        communicator.close()
