"""What a codec says: how the fragments of a tensor are laid out, and what their bytes mean.

A codec *is* the configuration of one tensor (a frozen dataclass that round-trips through JSON). Encoding and fast
decoding live one floor up (`holoray.kernels`); `decode` here is the plain NumPy oracle that they are held against.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import islice
from typing import Any, ClassVar, Self

from holoray.errors import FormatError
from holoray.fragment import NO_PREREQUISITE, TensorEntry
from holoray.tensor import Array, TensorSpec


@dataclass(frozen=True, slots=True)
class FragmentShape:
    """Where a fragment belongs and how many raw bytes it may have (`min_bytes == max_bytes` where that is known)."""

    index: int
    layer: int
    slot: int
    requires: int
    min_bytes: int
    max_bytes: int


@dataclass(frozen=True)
class Codec(ABC):
    """Configuration of one tensor under one codec."""

    name: ClassVar[str]
    layered: ClassVar[bool] = False
    """Whether fragments of a slot are layers that build on each other (users then choose by layer)."""
    whole_fragment_compression: ClassVar[bool] = True
    """Whether `FragmentEntry.compression` covers the payload as a whole (else the codec compresses inside)."""

    @property
    def carries_essential(self) -> bool:
        """Whether every fragment carries the tensor's essential part in front of its own share."""
        return False

    @abstractmethod
    def check(self, spec: TensorSpec) -> None:
        """Raise FormatError if this configuration is impossible for `spec`."""

    @abstractmethod
    def shapes(self, spec: TensorSpec) -> Iterator[FragmentShape]:
        """The fragments that a tensor of this spec has, by index from 0."""

    @abstractmethod
    def decode(self, spec: TensorSpec, payloads: Mapping[int, Any]) -> Array:
        """The tensor as far as the raw (decompressed) payloads of the given fragments tell: the slow, plain oracle.

        Fragments whose prerequisites are missing do not count. Raises FormatError on malformed payloads.
        """

    @abstractmethod
    def can_reconstruct(self, spec: TensorSpec, present: frozenset[int]) -> bool:
        """Whether these fragments are enough for a usable tensor."""

    def get_config(self) -> dict[str, Any]:
        """The configuration as JSON values; `from_config` is its inverse."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Rebuild from JSON values; unknown, missing or ill-typed keys raise FormatError."""
        types = {f.name: f.type for f in fields(cls)}
        if set(config) != set(types):
            raise FormatError(f"codec {cls.name!r} has configuration keys {sorted(types)}, not {sorted(config)}")
        for key, value in config.items():
            # Annotations are strings under `from __future__ import annotations`.
            if type(value).__name__ != types[key]:
                raise FormatError(f"codec {cls.name!r}: {key} must be {types[key]}, not {type(value).__name__}")
        return cls(**config)


def check_entry(codec: Codec, entry: TensorEntry) -> None:
    """Raise FormatError unless the fragments of `entry` are those that `codec` lays out for its spec."""
    codec.check(entry.spec)
    # One more than there should be, not all: a spec may claim any size.
    shapes = list(islice(codec.shapes(entry.spec), len(entry.fragments) + 1))
    if len(shapes) != len(entry.fragments):
        raise FormatError(f"tensor {entry.name!r} has {len(entry.fragments)} fragments", tensor=entry.name)
    for shape, fragment in zip(shapes, entry.fragments, strict=True):
        same_place = (shape.index, shape.layer, shape.slot, shape.requires) == (
            fragment.index,
            fragment.layer,
            fragment.slot,
            fragment.requires,
        )
        if not same_place or not shape.min_bytes <= fragment.raw_bytes <= shape.max_bytes:
            raise FormatError(
                f"fragment {fragment.index} of tensor {entry.name!r} is not one that {codec.name!r} lays out",
                tensor=entry.name,
                fragment=fragment.index,
            )


def present_with_prerequisites(codec: Codec, spec: TensorSpec, indices: frozenset[int]) -> frozenset[int]:
    """Those of `indices` whose whole chain of prerequisites is among `indices`."""
    kept: set[int] = set()
    for shape in codec.shapes(spec):  # a prerequisite always has a smaller index
        if shape.index in indices and (shape.requires == NO_PREREQUISITE or shape.requires in kept):
            kept.add(shape.index)
    return frozenset(kept)
