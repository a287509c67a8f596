"""What only a GPU can answer (`make gpu-check`): accumulators on it, page-locked memory, streams and their events."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from quantised_checkpoints import make_checkpoint

import holoray
from holoray.codecs import get_codec
from holoray.errors import CapacityError
from holoray.kernels import xp
from holoray.kernels.cuda.device import CudaCopies, CudaDevice
from holoray.kernels.device_accumulators import device_dtype
from holoray.kernels.pools import StagingPool, StreamPool, pinned_memory
from holoray.kernels.registry import make_device_accumulator
from holoray.kernels.scratch import Scratch
from holoray.pipelines.api import load_file
from holoray.pipelines.plan import Target
from holoray.pipelines.sealed_store import SealedStore
from holoray.pipelines.tensor_codec import encode_tensor
from holoray.stores import MemoryStore
from holoray.tensor import DTYPES, Array, as_bytes

pytestmark = pytest.mark.gpu
LARGE = 32 << 20
"""Weights of the store whose memory and overlap are looked at."""


@pytest.fixture(scope="module")
def large() -> SealedStore:
    rng, store = np.random.default_rng(1), MemoryStore()
    halves = (0.02 * rng.standard_normal((8, LARGE // 8), np.float32)).astype(DTYPES["BF16"])
    holoray.encode({f"layers.{n}.weight": half.reshape(1024, -1) for n, half in enumerate(halves)}, store)
    return holoray.open(store)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("codec", ["raw", "planes"])
@pytest.mark.parametrize("size", [1, 4097, 3 * 190_000])
def test_fragments_one_by_one_give_the_tensor_back(codec: str, dtype: str, size: int) -> None:
    array = (0.05 * np.random.default_rng(size).standard_normal(size)).astype(DTYPES[dtype])
    entry, fragments = encode_tensor(array, codec=codec)
    device, scratch = CudaDevice(), Scratch()
    out = device.zeros(entry.spec.shape, device_dtype(entry.spec))
    accumulator = make_device_accumulator(entry.spec, get_codec(entry.codec, entry.config), out, device)
    for known in entry.fragments:
        opened = accumulator.decompress([known], [memoryview(fragments[known.index].payload)], scratch)
        accumulator.accumulate(known.slot, opened, scratch)
    accumulator.finalize()
    assert np.array_equal(device.download(out).view(np.uint8), array.view(np.uint8))


def test_staged_copies_on_borrowed_streams_arrive() -> None:
    cupy = xp.cupy()
    staging = StagingPool(64 << 20, pinned_memory(cupy))
    streams = StreamPool(2, lambda: cupy.cuda.Stream(non_blocking=True))
    targets = [cupy.zeros(1 << 20, cupy.uint8) for _ in range(8)]
    cupy.cuda.Stream.null.synchronize()  # streams that do not block wait for nothing of this one
    for number, target in enumerate(targets):
        buffer = staging.borrow(1 << 20, timeout_s=60)
        buffer[:] = number + 1
        with streams.borrow() as stream:
            target.set(buffer, stream=stream)
            staging.give_back(buffer, after=stream.record())
    cupy.cuda.Device().synchronize()
    assert [int(target.min()) for target in targets] == [int(target.max()) for target in targets] == list(range(1, 9))
    assert staging.stats.in_flight_bytes == staging.stats.borrowed_bytes == 0


def test_a_segment_is_opened_by_another_process(tmp_path: Path) -> None:
    """CUDA IPC: what one process writes into its segment another one reads, without a copy through the host."""
    device = CudaDevice()
    segment = device.segment(1 << 20)
    expected = np.arange(1 << 20, dtype=np.uint8)
    segment.set(expected)
    device.synchronize()
    code = (
        "import sys, numpy as np\n"
        "from holoray.kernels.cuda.device import CudaDevice\n"
        "device = CudaDevice()\n"
        "seen = device.download(device.attach(bytes.fromhex(sys.argv[1]), 1 << 20))\n"
        "np.save(sys.argv[2], seen)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, device.share(segment).hex(), str(tmp_path / "seen.npy")]
    subprocess.run(command, check=True, timeout=100, env=os.environ | {"PYTHONPATH": path})
    assert np.array_equal(np.load(tmp_path / "seen.npy"), expected)


def test_a_segment_is_zeroed_before_another_stream_writes_to_it() -> None:
    device = CudaDevice(streams=1)
    for _ in range(5):
        segment = device.segment(1 << 30)
        with device.stream():
            device.write(segment[-4096:], np.full(4096, 7, np.uint8))
        device.synchronize()
        assert (device.download(segment[-4096:]) == 7).all()
        del segment


def test_a_load_gives_the_bytes_of_the_host_at_every_step(model: dict[str, Array], tmp_path: Path) -> None:
    for codec in ("planes", "raw"):
        store = MemoryStore()
        holoray.encode(model, store, codec=codec)
        sealed = holoray.open(store)
        there, here = sealed.loader(device="cuda"), sealed.loader()
        for target in (Target(fragments=(0,)), Target(quality=0.99), Target()):
            there.load(target)
            here.load(target)
            expected = here.state_dict()
            for name, array in there.state_dict().items():
                assert array.get().tobytes() == as_bytes(expected[name]).tobytes()
        load_file(sealed, tmp_path / "there", device="cuda")
        load_file(sealed, tmp_path / "here")
        assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()


@pytest.mark.parametrize("method", ["gptq", "awq", "int8"])
def test_quantised_layers_become_the_weights_of_the_host(method: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, method, layers=6, rows=1024)
    store = MemoryStore()
    holoray.encode(tmp_path, store)
    sealed = holoray.open(store)
    for dtype in ("bf16", "f16", "f32"):
        there, here = sealed.load(dequantise=dtype, device="cuda"), sealed.load(dequantise=dtype)
        assert list(there) == list(here)
        for name, array in there.items():
            assert array.get().tobytes() == as_bytes(here[name]).tobytes()


def test_memory_of_a_load_is_its_weights_and_what_decoding_takes(large: SealedStore) -> None:
    """What the pool took from the driver, free blocks of all streams included."""
    pool = xp.cupy().get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    loader = large.loader(device=CudaDevice(streams=4))
    for target in (Target(fragments=(0,)), Target()):
        loader.load(target)
    # A turn of a BF16 run is 3 MiB; pools round up and keep blocks of several sizes.
    assert pool.total_bytes() - before <= 1.1 * 2 * LARGE + 4 * (8 << 20)


def test_copies_and_kernels_of_several_streams_overlap() -> None:
    """Staged copies on one stream beside arithmetic on another take less than one behind the other."""
    cupy, device = xp.cupy(), CudaDevice(streams=2)
    nbytes = 64 << 20
    source, target = pinned_memory(cupy)(nbytes), cupy.zeros(nbytes, cupy.uint8)
    matrix = cupy.ones((2048, 2048), cupy.float32)
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    queue = CudaCopies(cupy, streams[0])

    def copy() -> None:
        for _ in range(4):
            queue.to_device(device.address(target), source)

    def compute() -> None:
        with streams[1]:
            for _ in range(16):
                cupy.matmul(matrix, matrix)

    def seconds(*work: Callable[[], None]) -> float:
        cupy.cuda.Device().synchronize()
        start = time.perf_counter()
        for one in work:
            one()
        cupy.cuda.Device().synchronize()
        return time.perf_counter() - start

    seconds(copy, compute)  # compiles
    apart = seconds(copy) + seconds(compute)
    assert min(seconds(copy, compute) for _ in range(5)) < 0.95 * apart


def test_a_device_without_room_says_so(large: SealedStore) -> None:
    device = CudaDevice(streams=2)
    with pytest.raises(CapacityError, match="on the device"):
        large.load(device=device, device_bytes=1 << 20)
    with pytest.raises(CapacityError, match="no room"):
        device.zeros((1 << 50,), np.uint8)
