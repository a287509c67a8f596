"""What only a GPU can answer (`make gpu-check`): accumulators on it, page-locked memory, streams and their events."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from holoray.codecs import get_codec
from holoray.kernels import xp
from holoray.kernels.cuda.device import CudaDevice
from holoray.kernels.device_accumulators import device_dtype
from holoray.kernels.pools import StagingPool, StreamPool, pinned_memory
from holoray.kernels.registry import make_device_accumulator
from holoray.kernels.scratch import Scratch
from holoray.pipelines.tensor_codec import encode_tensor
from holoray.tensor import DTYPES

pytestmark = pytest.mark.gpu


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
