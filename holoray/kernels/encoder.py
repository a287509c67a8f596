"""Turning a tensor into fragments: the interface that every codec's encoder follows."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from holoray.codecs.base import Codec
from holoray.codecs.dealing import MAX_FRAGMENTS
from holoray.codecs.dealt import VALUE_DTYPES
from holoray.compression import ZSTD, check_name
from holoray.errors import UsageError
from holoray.tensor import Array, TensorSpec


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """What a user may choose about an encoding; codecs ignore what does not concern them."""

    fragments: int = 8
    seed: int = 0
    compression: str = ZSTD
    tile: int = 0
    essential: float = 0.0
    """Share of the energy that rides in every fragment, below 1; 0 is none."""
    rank: int = 0
    """Greatest rank of `lowrank`; 0 is the full one."""
    energy: float = 0.0
    """Share of the energy that `lowrank` keeps; 0 and 1 are all of it."""
    coefficients: str = "float32"

    def __post_init__(self) -> None:
        check_name(self.compression)
        if self.coefficients not in VALUE_DTYPES:
            raise UsageError(
                f"unknown coefficients {self.coefficients!r}", hint=f"choose one of {', '.join(VALUE_DTYPES)}"
            )
        self._check_whole_numbers()
        self._check_shares()

    def _check_whole_numbers(self) -> None:
        limits = (("fragments", MAX_FRAGMENTS), ("seed", (1 << 64) - 1), ("tile", 1 << 31), ("rank", 1 << 31))
        for name, most in limits:
            least = 1 if name == "fragments" else 0
            try:
                value = operator.index(getattr(self, name))  # a NumPy integer is one, 1.5 and "1" are none
            except TypeError:
                raise UsageError(f"{name} must be a whole number", hint=f"choose {least} to {most}") from None
            if not least <= value <= most:
                raise UsageError(f"{name} {value} is out of range", hint=f"choose {least} to {most}")
            object.__setattr__(self, name, value)

    def _check_shares(self) -> None:
        for name in ("essential", "energy"):
            try:
                value = float(getattr(self, name))
            except (TypeError, ValueError):
                raise UsageError(f"{name} must be a number", hint="choose a share of the energy, e.g. 0.6") from None
            if not 0.0 <= value <= 1.0 or (name == "essential" and value == 1.0):
                raise UsageError(f"{name} {value} is out of range", hint="choose a share of the energy, e.g. 0.6")
            object.__setattr__(self, name, value)


@dataclass(frozen=True, slots=True)
class EncodedFragment:
    """A fragment fresh from the encoder: its stored payload (a memoryview is one of bytes) and what was measured."""

    index: int
    layer: int
    slot: int
    requires: int
    compression: str
    raw_bytes: int
    gain: float
    payload: bytes | memoryview = field(repr=False)


class Encoder(ABC):
    """Encodes one tensor: construction measures what the codec's configuration needs, parts are then independent.

    `encode(part)` for part in range(`parts`) may run concurrently and in any order; the bytes do not depend on it.
    `residual` is the squared error left when all fragments are present.
    """

    codec: Codec
    parts: int
    residual: float = 0.0
    essential_gain: float = 0.0
    """The squared error that the essential part removes; counted once, whichever fragment brings it."""
    faithful: bool = True
    """Whether the gains are the truth about partial results; if not, the tensor had better be stored raw."""

    def __init__(self, spec: TensorSpec, array: Array, options: EncodeOptions) -> None:
        self.spec = spec
        self.array = array
        self.options = options

    @abstractmethod
    def encode(self, part: int) -> list[EncodedFragment]:
        """The fragments of one part, by index."""
