"""`spectral` beside scipy's own inverse DCT."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import ml_dtypes
import numpy as np
import scipy.fft

from benchmarks.measure import Row, beside, best
from holoray.kernels.encoder import EncodeOptions
from holoray.kernels.spectral import SpectralAccumulator, SpectralEncoder
from holoray.tensor import TensorSpec


def measure(repeat: int, side: int = 4096) -> Iterator[Row]:
    """Rows for finalize and encode of a side x side matrix, f32 and bf16."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((side, side), np.float32)
    idctn = partial(scipy.fft.idctn, weights, type=2, norm="ortho")
    yield Row(f"scipy.fft.idctn {side} x {side} f32", weights.nbytes / best(idctn, repeat) / 1e9)
    for dtype in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)):
        array = weights.astype(dtype)
        spec = TensorSpec.of("w", array)
        encoder = SpectralEncoder(spec, array, EncodeOptions())
        out = np.zeros_like(array)
        accumulator = SpectralAccumulator(spec, encoder.codec, out, encoder.coefficients.view(np.uint8))
        name = f"finalize to {dtype.name}"
        yield beside(name, weights.nbytes, accumulator.finalize, idctn, repeat, to="idctn", aim=">= .77 (time <= 1.3x)")
    yield beside(
        "encode", weights.nbytes, lambda: SpectralEncoder(spec, array, EncodeOptions()).encode(0), idctn, 2, to="idctn"
    )
