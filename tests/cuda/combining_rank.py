"""One member of a group, in a process of its own: it holds every size-th slot of two tensors, and gets the others.

    python combining_rank.py nccl|host RANK SIZE FOLDER

Rank 0 puts the group's ticket into FOLDER; each rank writes there what it has in the end, or why it has nothing.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from on_cpu import kernels_on_cpu

from holoray.codecs import get_codec
from holoray.errors import HolorayError
from holoray.kernels import xp
from holoray.kernels.combine import SlotPart, combine
from holoray.kernels.communicator import Communicators
from holoray.kernels.cuda.device import CudaDevice
from holoray.kernels.device import Device
from holoray.kernels.device_accumulators import device_dtype
from holoray.kernels.host_communicator import HostCommunicators
from holoray.kernels.nccl import NcclCommunicators
from holoray.kernels.registry import make_device_accumulator
from holoray.kernels.scratch import Scratch
from holoray.pipelines.tensor_codec import encode_tensor
from holoray.tensor import Array

CODECS = ("planes", "raw")
BUCKET_BYTES = 3 << 20
"""Smaller than the tensors together, so that buckets follow each other."""


def tensor() -> Array:
    """Of four slots as planes, of six as raw."""
    weights = 0.05 * np.random.default_rng(0).standard_normal(3 * 2**19 + 77)
    return weights.astype(ml_dtypes.bfloat16)


def main(kind: str, rank: int, size: int, folder: Path) -> None:
    device: Device = CudaDevice(rank % xp.device_count()) if kind == "nccl" else kernels_on_cpu()
    makers: Communicators = NcclCommunicators() if kind == "nccl" else HostCommunicators()
    held = [(codec, *hold(codec, rank, size, device)) for codec in CODECS]
    parts = [SlotPart(accumulator, slot, device) for _, accumulator, slots in held for slot in range(slots)]
    mine = [part.slot % size == rank for part in parts]
    ticket = exchange_ticket(makers, rank, folder)
    communicator = makers.join(ticket, rank=rank, size=size, device=device, stop=threading.Event())
    try:
        wanted = [not own for own in mine]
        done = list(combine(parts, mine, wanted, communicator, device, bucket_bytes=BUCKET_BYTES))
    finally:
        communicator.close()
    assert len(done) > 1, "one bucket is no test of several"
    for codec, accumulator, _ in held:
        np.save(folder / f"{codec}-{rank}.npy", device.download(accumulator.out))


def hold(codec: str, rank: int, size: int, device: Device) -> tuple[Any, int]:
    """An accumulator on the device with every size-th slot in it, and how many slots there are."""
    entry, fragments = encode_tensor(tensor(), codec=codec)
    there = device_dtype(entry.spec)
    debris = np.full(entry.spec.shape, 0xA5A5 % np.iinfo(there).max, there)
    out = device.upload(debris)  # what others hold is never added to what lies here
    accumulator = make_device_accumulator(entry.spec, get_codec(entry.codec, entry.config), out, device)
    slots, scratch = 1 + max(f.slot for f in entry.fragments), Scratch()
    for slot in range(rank, slots, size):
        own = sorted((f for f in entry.fragments if f.slot == slot), key=lambda f: f.layer)
        payloads = [memoryview(fragments[f.index].payload) for f in own]
        accumulator.accumulate(slot, accumulator.decompress(own, payloads, scratch), scratch)
    return accumulator, slots


def exchange_ticket(makers: Communicators, rank: int, folder: Path) -> bytes:
    path = folder / "ticket"
    if rank == 0:
        path.with_suffix(".part").write_bytes(makers.ticket())
        path.with_suffix(".part").rename(path)
    deadline = time.monotonic() + 100
    while not path.exists():
        assert time.monotonic() < deadline, "rank 0 made no ticket"
        time.sleep(0.01)
    return path.read_bytes()


if __name__ == "__main__":
    where = Path(sys.argv[4])
    try:
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), where)
    except HolorayError as error:
        (where / f"error-{sys.argv[2]}").write_text(str(error))
        os._exit(3)  # a thread may still wait for NCCL
