"""`make gpu-bench`: the CUDA kernels on the GPU at hand, each beside a copy on the device of as many bytes.

    python -m benchmarks.gpu [--weights 2^28]

A row gives GB/s of output, and the rate of all bytes that the kernel must read and write as a share of a device copy's;
or milliseconds, and the rate beside that of a library's call. Decoded weights are compared with the original ones. The
entropy stage of `planes`, which the host does, stands beside them. The last lines are a whole load of a store whose
files are in the page cache: its share of the slowest of the things it cannot do without, and what the device's memory
held at most. Times are those of a clock of the host, launches included: use many weights.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import zstandard

import holoray
from benchmarks.dequant import random_layer
from holoray.codecs import get_codec
from holoray.codecs.dealing import Deal
from holoray.codecs.planes import PlanesCodec
from holoray.codecs.planes_layout import RUN as RUN_WEIGHTS
from holoray.compression import ZSTD, decompress
from holoray.errors import DeviceError
from holoray.formats.quantised import AWQ, GPTQ, INT8, Packing
from holoray.kernels import launchers, xp
from holoray.kernels.accumulator import Accumulator
from holoray.kernels.device import Device
from holoray.kernels.device_accumulators import device_dtype, pack_sections
from holoray.kernels.frames import NVCOMP, QueuedDevice, open_frames
from holoray.kernels.planes_decode import RunLayers
from holoray.kernels.planes_groups import KINDS
from holoray.kernels.planes_launch import RUN, launch
from holoray.kernels.registry import make_accumulator
from holoray.kernels.scratch import Scratch
from holoray.pipelines.fragment_pipeline import FragmentPipeline
from holoray.pipelines.plan import Target, select, units
from holoray.pipelines.sealed_store import SealedStore
from holoray.pipelines.tensor_codec import encode_tensor
from holoray.tensor import DTYPES, TensorSpec

REPEATS: Final = 7
LOAD_WEIGHTS: Final = 1 << 26
"""Of the store that is loaded: the host has to encode it first."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measured kernel: bytes that it must read and write, bytes of its output, seconds of the best of some runs."""

    name: str
    moved_bytes: int
    out_bytes: int
    seconds: float

    def line(self, copy_bytes_per_s: float) -> str:
        share = self.moved_bytes / copy_bytes_per_s / self.seconds
        return f"{self.name:<34} {self.out_bytes / self.seconds / 1e9:9.1f} GB/s out {share:7.1%} of a copy"


@dataclass(frozen=True, slots=True)
class Beside:
    """Seconds of a step, and of what it is measured against: a yardstick from the same run that is no copy."""

    name: str
    seconds: float
    yardstick: str
    yardstick_seconds: float

    def line(self, copy_bytes_per_s: float) -> str:
        rate = self.yardstick_seconds / self.seconds
        return f"{self.name:<34} {1e3 * self.seconds:9.3f} ms      {rate:8.2f}x the rate of {self.yardstick}"


def best_seconds(device: Device, work: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
    """The best of some runs, each waited for, `before` untimed before each; the first, which compiles, is left out."""
    times = []
    for _ in range(1 + REPEATS):
        before()
        device.synchronize()
        start = time.perf_counter()
        work()
        device.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def copy_speed(device: Device, nbytes: int) -> float:
    """Bytes read and written a second by a copy on the device."""
    source, target = device.zeros((nbytes,), np.uint8), device.zeros((nbytes,), np.uint8)

    def copy() -> None:
        target[...] = source

    return 2 * nbytes / best_seconds(device, copy)


def finalizers(device: Device, weights: int) -> list[Row]:
    """Cast to BF16, and the rotation in place."""
    columns = 4096
    rows = max(1, weights // columns)
    count = rows * columns
    rng = np.random.default_rng(0)
    wide = device.upload(rng.standard_normal(count, np.float32))
    out = device.zeros((rows, columns), np.uint16)
    flat = out.reshape(-1)
    cast = best_seconds(device, lambda: launchers.store(device, wide, flat, 0))
    rotated = best_seconds(device, lambda: launchers.inverse_rotation(device, wide, 0))
    return [
        Row("cast F32 -> BF16", 6 * count, 2 * count, cast),
        Row("rotation F32", 8 * count, 4 * count, rotated),
    ]


def quantised(device: Device, weights: int) -> list[Row]:
    """Layers of GPTQ, AWQ and int8 to BF16, inputs in groups of 128."""
    columns = 4096
    rows = max(1, weights // columns // 32) * 32
    rng = np.random.default_rng(0)
    out = device.zeros((rows, columns), np.uint16)
    found = []
    for packing in (
        Packing(GPTQ, 4, rows, columns, 128, 1),
        Packing(GPTQ, 8, rows, columns, 128, 1),
        Packing(AWQ, 4, rows, columns, 128),
        Packing(INT8, 8, rows, columns, columns),
    ):
        q, scales, zeros = (None if array is None else device.upload(array) for array in random_layer(packing, rng))
        seconds = best_seconds(device, partial(launchers.dequantise, device, packing, q, scales, zeros, None, out))
        moved = sum(array.nbytes for array in (q, scales, zeros, out) if array is not None)
        found.append(Row(f"{packing.method}, {packing.bits} bits -> BF16", moved, out.nbytes, seconds))
    return found


def transforms(device: Device, weights: int) -> list[Row | Beside]:
    """What `spectral`, `projection` and `lowrank` are finalized by: dealing back, inverse DCT, matrix product."""
    columns = 4096 if weights >= 1 << 20 else 64
    rows = max(64, weights // columns // 64 * 64)  # whole tiles
    count = rows * columns
    rng = np.random.default_rng(2)
    coefficients = device.upload(rng.standard_normal((rows, columns), np.float32))
    out = device.zeros((rows, columns), np.uint16)
    deal = Deal(count, 8, 0)
    offsets = deal.offsets(np.zeros(deal.groups, np.int64))
    counts = [deal.count((int(offsets[-1]) + fragment) % deal.fragments) for fragment in range(deal.fragments)]
    starts = device.upload((np.cumsum(counts) - counts).astype(np.uint64))
    there, raster = device.upload(offsets.astype(np.uint16)), device.zeros((count,), np.float32)
    shares = coefficients.reshape(-1)
    dealt = best_seconds(device, lambda: launchers.collect_shares(device, shares, starts, there, deal, raster))
    whole = best_seconds(device, lambda: device.inverse_dct(coefficients, (0, 1)))
    result: list[Row | Beside] = [Row("shares to their places, F32", 8 * count, 4 * count, dealt)]
    for tile in (8, 33, 64):
        seconds = best_seconds(device, partial(launchers.inverse_dct, device, coefficients, out, 0, tile))
        name = f"inverse DCT -> BF16, tiles of {tile}"
        result += [Row(name, 6 * count, 2 * count, seconds), Beside(name, seconds, "idctn of the whole", whole)]
        if rows % tile == columns % tile == 0:
            tiled = coefficients.reshape(rows // tile, tile, columns // tile, tile)
            same = best_seconds(device, partial(device.inverse_dct, tiled, (1, 3)))
            result.append(Beside(name, seconds, "idctn of the same tiles", same))
    return [*result, low_rank(device, rows, columns)]


def low_rank(device: Device, rows: int, columns: int) -> Beside:
    """Terms [rank, rows + columns] to BF16 weights, beside the float32 product alone, of two matrices without gaps."""
    rank = max(1, min(rows, columns) // 8)
    host = np.random.default_rng(3).standard_normal((rank, rows + columns), np.float32)
    terms, out = device.upload(host), device.zeros((rows, columns), np.uint16)
    down, along = device.upload(host[:, :rows].T.copy()), device.upload(host[:, rows:].copy())

    def finalize() -> None:
        launchers.store(device, device.matmul(terms[:, :rows].T, terms[:, rows:]), out, 0)

    product = best_seconds(device, lambda: device.matmul(down, along))
    return Beside(f"low rank {rank} -> BF16", best_seconds(device, finalize), "its product alone", product)


def zstd(device: QueuedDevice, counts: Sequence[int] = (16, 256, 4096), raw_bytes: int = 64 << 10) -> Iterator[Beside]:
    """Frames of random exponents to the device by nvCOMP, beside all threads of the host and then a copy."""
    exponents = np.random.default_rng(4).binomial(12, 0.5, raw_bytes).astype(np.uint8)
    for count in counts:
        frames = [zstandard.compress(np.roll(exponents, i).tobytes(), level=1) for i in range(count)]
        sizes = [raw_bytes] * count
        with ThreadPoolExecutor() as pool:

            def on_host(frames: list[bytes] = frames, pool: ThreadPoolExecutor = pool) -> None:
                raw = pool.map(partial(decompress, ZSTD, raw_bytes=raw_bytes), frames)
                device.upload(np.frombuffer(b"".join(raw), np.uint8))

            host = best_seconds(device, on_host)
        seconds = best_seconds(device, partial(open_frames, device, frames, sizes, where=NVCOMP))
        yield Beside(f"zstd, {count} frames of {raw_bytes} bytes", seconds, "the host", host)


def planes(device: Device, weights: int) -> list[Row | Beside]:
    """BF16 runs from sections on the device, entropy stage done: layers 0 to 4, all six, a step, the tail in place.

    And the entropy stage: the host's, on all cores.
    """
    count = min(weights, RUN_WEIGHTS)
    array = (0.02 * np.random.default_rng(1).standard_normal(count)).astype(DTYPES["BF16"])
    entry, fragments = encode_tensor(array, codec="planes")
    codec, run, scratch = get_codec(entry.codec, entry.config), RunLayers(0), Scratch()
    assert isinstance(codec, PlanesCodec)
    payloads = {f.layer: fragments[f.index].payload for f in entry.fragments}
    run.add(codec, entry.spec, payloads, scratch)
    places = [p for layer in range(codec.layers(entry.spec)) for p in codec.layout(entry.spec, layer, 0).sections]
    packed, starts = pack_sections(run, places, scratch)
    records = np.zeros(max(1, weights // count), RUN)
    alive = []  # runs of their own: one run over and over would come out of the cache
    for record in records:
        sections, out = device.upload(packed), device.zeros(entry.spec.shape, device_dtype(entry.spec))
        alive.append((sections, out))
        record["out"] = device.address(out)
        record["sections"][places] = device.address(sections) + starts
    records["lengths"], records["offsets"] = run.lengths, run.offsets
    records["count"], records["kind"] = count, KINDS["BF16"]
    records["threshold"], records["top"], records["tail_cut"] = codec.threshold, codec.top, codec.tail_cut
    rows: list[Row | Beside] = []
    for name, held, layers in (
        ("planes, layers 0 to 4", 0, 5),
        ("planes, all and tail", 0, 6),
        ("planes, in place, layer 1", 1, 2),
        ("planes, in place, tail", 5, 6),
    ):
        read = sum(int(run.lengths[p]) for n in range(held, layers) for p in codec.layout(entry.spec, n, 0).sections)
        seconds = best_seconds(
            device, partial(_go, device, records, held, layers), partial(_go, device, records, 0, held)
        )
        out_bytes = 2 * count * len(records)
        rows.append(Row(name, read * len(records) + (2 if held else 1) * out_bytes, out_bytes, seconds))
        if layers == 6:
            assert np.array_equal(device.download(alive[-1][1]), array.view(np.uint16)), "decoded weights differ"
        if (held, layers) == (0, 6):
            opened = _entropy_seconds(partial(_open_run, codec, entry.spec, payloads), len(records))
            rows.append(Beside("planes, entropy stage on the host", opened, name, seconds))
    return rows


def _open_run(codec: PlanesCodec, spec: TensorSpec, payloads: dict[int, Any], scratch: Scratch) -> None:
    RunLayers(0).add(codec, spec, payloads, scratch)


def _entropy_seconds(open_run: Callable[[Scratch], None], runs: int) -> float:
    """Seconds in which all cores open `runs` runs: the best of some times, of a few runs a core."""
    threads = len(os.sched_getaffinity(0))
    each = max(1, min(8, runs // threads))

    def work(scratch: Scratch) -> None:
        for _ in range(each):
            open_run(scratch)

    scratches, times = [Scratch() for _ in range(threads)], []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(1 + REPEATS):
            start = time.perf_counter()
            list(pool.map(work, scratches))
            times.append(time.perf_counter() - start)
    return min(times[1:]) * runs / (threads * each)


def _go(device: Device, records: npt.NDArray[Any], held: int, layers: int) -> None:
    """Bring all runs from `held` to `layers` layers, records sent and verdicts fetched; none for nothing."""
    if layers:
        records["held"], records["layers"] = held, layers
        assert not launch(device, records).any()


@dataclass(frozen=True, slots=True)
class LoadRow:
    """A whole load: seconds of the best of some, of its parts alone, and bytes of the device at most."""

    seconds: float
    parts: dict[str, float]
    weights_bytes: int
    peak_bytes: int

    def lines(self) -> list[str]:
        slowest = max(self.parts, key=self.parts.__getitem__)
        parts = ", ".join(f"{name} {self.weights_bytes / s / 1e9:.1f}" for name, s in self.parts.items())
        return [
            f"load from the page cache, planes BF16 {self.weights_bytes / self.seconds / 1e9:6.1f} GB/s of weights, "
            f"{self.parts[slowest] / self.seconds:.1%} of {slowest} (alone, GB/s of weights: {parts})",
            f"memory of the load {self.peak_bytes / self.weights_bytes:9.3f} x its weights",
        ]


def whole_load(
    device: Device, weights: int, used_bytes: Callable[[], int], folder: Path, pinned_bytes_per_s: float = 0.0
) -> LoadRow:
    """A store of BF16 matrices in `folder` onto the device, beside its copy and its fragments' way on the host alone.

    `used_bytes`: what the device's allocator holds now. `pinned_bytes_per_s`: of page-locked copies, if known.
    """
    model = {
        f"layers.{n}.weight": (0.02 * np.random.default_rng(n).standard_normal((16, max(1, weights // 64)))).astype(
            DTYPES["BF16"]
        )
        for n in range(4)
    }
    holoray.encode(model, folder / "store")
    sealed = holoray.open(folder / "store")
    before, seconds, peak = used_bytes(), [], 0
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        loaded = sealed.load(device=device)
        device.synchronize()
        seconds.append(time.perf_counter() - start)
        peak = max(peak, used_bytes() - before)
        for name, array in model.items():
            assert np.array_equal(device.download(loaded[name]), array.view(np.uint16)), "loaded weights differ"
        del loaded
    stored = [np.zeros(t.stored_bytes, np.uint8) for t in sealed.manifest.tensors]
    parts = {
        "staged copies": best_seconds(device, lambda: [device.upload(array) for array in stored]),
        "fetch, verify and zstd": _host_seconds(sealed),
    }
    if pinned_bytes_per_s:
        parts["page-locked copies"] = sum(array.nbytes for array in stored) / pinned_bytes_per_s
    return LoadRow(min(seconds[1:]), parts, sum(array.nbytes for array in model.values()), peak)


def _host_seconds(sealed: SealedStore) -> float:
    """The best of some runs of a load's first three stages, on all cores."""

    class Opened:
        """Tensors whose fragments are opened and then dropped."""

        def open(self, tensor: int) -> Accumulator:
            spec, codec = sealed.manifest.tensors[tensor].spec, sealed.manifest.codecs[tensor]
            accumulator = make_accumulator(spec, codec, np.zeros(spec.shape, spec.numpy_dtype))
            accumulator.accumulate = lambda *_: None  # type: ignore[method-assign]
            return accumulator

        def close(self, tensor: int) -> None:
            pass

    work = units(sealed.manifest, select(sealed.manifest, Target()))
    times = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        FragmentPipeline(sealed.store, sealed.manifest, finalize=False).run(work, Opened())
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main() -> None:
    from holoray.kernels.cuda.device import CudaDevice, pinned_copy_speed

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--weights", type=int, default=1 << 28)
    count = parser.parse_args().weights
    device = CudaDevice()
    speed = copy_speed(device, 4 * count)
    pinned = pinned_copy_speed(xp.cupy())
    print(f"page-locked copy, host to device: {pinned / 1e9:.1f} GB/s")
    print(f"device copy: {speed / 1e9:.0f} GB/s read and written, {device.multiprocessors} multiprocessors")
    rows = (*finalizers(device, count), *quantised(device, count), *transforms(device, count), *planes(device, count))
    for row in rows:
        print(row.line(speed))
    try:
        for beside in zstd(device):
            print(beside.line(speed))
    except DeviceError as error:
        print(f"zstd on the device: not measured, {error}")
    pool = xp.cupy().get_default_memory_pool()
    pool.free_all_blocks()
    with tempfile.TemporaryDirectory() as folder:
        used = lambda: int(pool.total_bytes())  # noqa: E731
        load = whole_load(device, min(count, LOAD_WEIGHTS), used, Path(folder), pinned)
    print(*load.lines(), sep="\n")


if __name__ == "__main__":
    main()
