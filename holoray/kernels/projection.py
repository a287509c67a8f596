"""`projection` on the CPU: signs and fast Walsh-Hadamard transforms."""

from __future__ import annotations

from holoray.codecs.projection import ProjectionCodec
from holoray.kernels import hadamard
from holoray.kernels.dealt import Floats
from holoray.kernels.transform import RasterAccumulator, TransformEncoder


class ProjectionAccumulator(RasterAccumulator):
    """The transposed transform of a copy of the coefficients."""

    @staticmethod
    def inverse(codec: ProjectionCodec, raster: Floats) -> Floats:
        weights = raster.copy()
        hadamard.inverse(weights.reshape(-1), codec.seed)
        return weights


class ProjectionEncoder(TransformEncoder):
    accumulator = ProjectionAccumulator

    def _forward(self, raster: Floats) -> None:
        hadamard.forward(raster.reshape(-1), self.options.seed)

    def _make_codec(self, exponent: int, shifts: str, essential: int) -> ProjectionCodec:
        own = self.options
        return ProjectionCodec(own.fragments, exponent, essential, own.coefficients, own.seed, shifts)
