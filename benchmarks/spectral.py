"""`spectral` beside scipy's own inverse DCT."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import scipy.fft

from benchmarks.measure import Row, best
from holoray.kernels.encoder import EncodeOptions
from holoray.kernels.spectral import SpectralAccumulator, SpectralEncoder
from holoray.tensor import TensorSpec


def measure(repeat: int, side: int = 4096) -> Iterator[Row]:
    """Rows for finalize and encode of a side x side matrix, f32 and bf16."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((side, side), np.float32)
    seconds = best(lambda: scipy.fft.idctn(weights, type=2, norm="ortho"), repeat)
    reference = weights.nbytes / seconds / 1e9
    yield Row(f"scipy.fft.idctn {side} x {side} f32", reference)
    for dtype in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)):
        array = weights.astype(dtype)
        spec = TensorSpec.of("w", array)
        encoder = SpectralEncoder(spec, array, EncodeOptions())
        out = np.zeros_like(array)
        accumulator = SpectralAccumulator(spec, encoder.codec, out, encoder.coefficients.view(np.uint8))
        took = best(accumulator.finalize, repeat)
        rate = weights.nbytes / took / 1e9
        yield Row(f"finalize to {dtype.name}", rate, took / seconds, "idctn's time", "<= 1.3")
    took = best(lambda: SpectralEncoder(spec, array, EncodeOptions()).encode(0), 2)
    yield Row("encode", weights.nbytes / took / 1e9, took / seconds, "idctn's time")
