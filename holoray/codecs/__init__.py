"""What fragments mean: one file a codec, each with its NumPy oracle."""

from holoray.codecs.base import Codec, FragmentShape
from holoray.codecs.lowrank import LowRankCodec
from holoray.codecs.planes import PlanesCodec
from holoray.codecs.projection import ProjectionCodec
from holoray.codecs.raw import RawCodec
from holoray.codecs.registry import get_codec, register_codec
from holoray.codecs.spectral import SpectralCodec

__all__ = [
    "Codec",
    "FragmentShape",
    "LowRankCodec",
    "PlanesCodec",
    "ProjectionCodec",
    "RawCodec",
    "SpectralCodec",
    "get_codec",
    "register_codec",
]
