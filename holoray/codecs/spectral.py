"""`spectral`: orthonormal DCT-II coefficients, dealt so that *which* fragments arrive does not matter.

The matrix is transformed whole (`tile` 0) or in tiles of `tile` x `tile`; coefficients stand where their tile's
weights stood and are read in raster order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from holoray.codecs.registry import register_codec
from holoray.codecs.transform import TransformCodec
from holoray.tensor import TensorSpec


@register_codec
@dataclass(frozen=True)
class SpectralCodec(TransformCodec):
    """`tile`: side of the tiles that are transformed; 0 is the whole matrix."""

    name: ClassVar[str] = "spectral"

    tile: int

    def _is_possible(self, spec: TensorSpec) -> bool:
        return self.tile >= 0 and super()._is_possible(spec)

    def inverse(self, coefficients: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        weights = np.empty_like(coefficients)
        for rows, columns in tiles(coefficients.shape, self.tile):
            weights[rows, columns] = _inverse_dct(_inverse_dct(coefficients[rows, columns]).T).T
        return weights


def tiles(shape: tuple[int, ...], tile: int) -> Iterator[tuple[slice, slice]]:
    """Row and column slices of the tiles, edge tiles smaller; `tile` 0 is the whole matrix."""
    rows, columns = shape
    height, width = (tile, tile) if tile else (max(rows, 1), max(columns, 1))
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield slice(top, min(top + height, rows)), slice(left, min(left + width, columns))


def _inverse_dct(coefficients: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Inverse orthonormal DCT-II along the last axis.

    x_k = sum_j a_j c_j cos(pi j (2k + 1) / 2n), a_0 = sqrt(1/n), a_j = sqrt(2/n): the real part of a 2n-point FFT of
    a_j c_j exp(-i pi j / 2n).
    """
    n = coefficients.shape[-1]
    scale = np.full(n, math.sqrt(2 / n))
    scale[0] = math.sqrt(1 / n)
    turned = coefficients * scale * np.exp(-0.5j * np.pi * np.arange(n) / n)
    return np.fft.fft(turned, 2 * n, axis=-1).real[..., :n]
