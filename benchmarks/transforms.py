"""`spectral` and `projection` beside scipy's DCT, `lowrank` beside NumPy's SVD of the same matrix."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import ml_dtypes
import numpy as np
import scipy.fft

from benchmarks.measure import Row, beside
from holoray.codecs.base import Codec
from holoray.kernels.accumulator import Accumulator
from holoray.kernels.encoder import EncodedFragment, EncodeOptions
from holoray.kernels.registry import make_accumulator, make_encoder
from holoray.kernels.scratch import Scratch
from holoray.tensor import Array, TensorSpec


def measure(repeat: int, side: int = 4096) -> Iterator[Row]:
    """Rows for encode and decode of a side x side matrix, f32 and bf16; one thread, CPU time."""
    weights = np.random.default_rng(0).standard_normal((side, side), np.float32)
    dctn = partial(scipy.fft.dctn, weights, type=2, norm="ortho", workers=1)
    for codec in ("spectral", "projection"):
        for dtype in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)):
            array = weights.astype(dtype)
            spec = TensorSpec.of("w", array)
            encode = partial(_encode, codec, spec, array)
            decode = partial(_decode, spec, *encode(), np.zeros_like(array))
            aim = ">= .5 (time <= 2x)" if codec == "projection" else ""
            for name, run in (("encode", encode), ("decode", decode)):
                yield beside(
                    f"{codec}: {name} {dtype.name}",
                    weights.nbytes,
                    run,
                    dctn,
                    repeat,
                    to="dctn",
                    aim=aim,
                    clock=time.process_time,
                )


def measure_lowrank(repeat: int) -> Iterator[Row]:
    """Rows for encode, gains and residual measured, on one thread; the SVD with all of BLAS's threads."""
    for rows, columns, rank in ((512, 512, 0), (1024, 1024, 0), (1024, 4096, 0), (1024, 4096, 32)):
        weights = np.random.default_rng(0).standard_normal((rows, columns), np.float32)
        encode = partial(_encode, "lowrank", TensorSpec.of("w", weights), weights, EncodeOptions(rank=rank))
        svd = partial(np.linalg.svd, weights, full_matrices=False)
        name = f"lowrank: encode {rows} x {columns}, {f'rank {rank}' if rank else 'full rank'}"
        yield beside(name, weights.nbytes, encode, svd, repeat, to="numpy's SVD", aim=">= 1")


def _encode(
    codec: str, spec: TensorSpec, array: Array, options: EncodeOptions | None = None
) -> tuple[Codec, list[EncodedFragment]]:
    encoder = make_encoder(codec, spec, array, options or EncodeOptions())
    return encoder.codec, encoder.encode(0)


def _decode(spec: TensorSpec, codec: Codec, fragments: list[EncodedFragment], out: Array) -> Accumulator:
    accumulator, scratch = make_accumulator(spec, codec, out), Scratch()
    for fragment in fragments:
        accumulator.accumulate(fragment.slot, fragment.payload, scratch)
    accumulator.finalize()
    return accumulator
