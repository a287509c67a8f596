"""`spectral` on the CPU: scipy's DCT."""

from __future__ import annotations

import numpy as np
import scipy.fft

from holoray.codecs.spectral import SpectralCodec, tiles
from holoray.kernels.dealt import Floats
from holoray.kernels.transform import RasterAccumulator, TransformEncoder


class SpectralAccumulator(RasterAccumulator):
    """Inverse DCT of the whole matrix or of its tiles."""

    @staticmethod
    def inverse(codec: SpectralCodec, raster: Floats) -> Floats:
        if not codec.tile:
            weights: Floats = scipy.fft.idctn(raster, type=2, norm="ortho", workers=1)
            return weights
        return inverse_tiles(raster, codec.tile)


def inverse_tiles(raster: Floats, tile: int) -> Floats:
    """The inverse DCT of the tiles of float32[rows, columns], as a new array."""
    weights = np.empty_like(raster)
    for part in tiles(raster.shape, tile):
        weights[part] = scipy.fft.idctn(raster[part], type=2, norm="ortho", workers=1)
    return weights


class SpectralEncoder(TransformEncoder):
    accumulator = SpectralAccumulator

    def _forward(self, raster: Floats) -> None:
        for tile in tiles(raster.shape, self.options.tile):
            raster[tile] = scipy.fft.dctn(raster[tile], type=2, norm="ortho", workers=1)

    def _make_codec(self, exponent: int, shifts: str, essential: int) -> SpectralCodec:
        own = self.options
        return SpectralCodec(own.fragments, exponent, essential, own.coefficients, own.seed, shifts, own.tile)
