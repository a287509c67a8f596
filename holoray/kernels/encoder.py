"""Turning a tensor into fragments: the interface that every codec's encoder follows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from holoray.codecs.base import Codec
from holoray.compression import ZSTD
from holoray.tensor import Array, TensorSpec


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """What a user may choose about an encoding; codecs ignore what does not concern them."""

    fragments: int = 8
    seed: int = 0
    compression: str = ZSTD
    tile: int = 0


@dataclass(frozen=True, slots=True)
class EncodedFragment:
    """A fragment fresh from the encoder: its stored payload and what was measured about it."""

    index: int
    layer: int
    slot: int
    requires: int
    compression: str
    raw_bytes: int
    gain: float
    payload: bytes = field(repr=False)


class Encoder(ABC):
    """Encodes one tensor: construction measures what the codec's configuration needs, parts are then independent.

    `encode(part)` for part in range(`parts`) may run concurrently and in any order; the bytes do not depend on it.
    `residual` is the squared error left when all fragments are present.
    """

    codec: Codec
    parts: int
    residual: float = 0.0

    def __init__(self, spec: TensorSpec, array: Array, options: EncodeOptions) -> None:
        self.spec = spec
        self.array = array
        self.options = options

    @abstractmethod
    def encode(self, part: int) -> list[EncodedFragment]:
        """The fragments of one part, by index."""
