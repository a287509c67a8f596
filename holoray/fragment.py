"""What travels: a fragment's bytes, and what the manifest knows about them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from holoray.tensor import TensorSpec

NO_PREREQUISITE = -1


def fragment_file(number: int) -> str:
    """Name of a fragment file: built from a number, never from bytes of a manifest."""
    return f"fragments-{number:05d}.arrow"


@dataclass(frozen=True, slots=True)
class FragmentEntry:
    """One fragment as the manifest describes it.

    `slot` is the disjoint part of the accumulator that the fragment fills: a run of blocks (`planes`), a run of
    bytes (`raw`), a share of the coefficients or of the terms (the others). Fragments of one slot build on each
    other through `requires` (the index of the prerequisite, or -1). `gain` is the squared error that the fragment
    removes once its prerequisites are present (float64, may be negative). `order` is its place in the streaming order.
    `file` and `offset` say where the stored payload lies; both digests cover exactly those stored bytes.
    """

    index: int
    layer: int
    slot: int
    requires: int
    compression: str
    stored_bytes: int
    raw_bytes: int
    gain: float
    xxh3_64: int
    sha256: bytes
    file: int = -1
    offset: int = -1
    order: int = -1


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as the manifest describes it.

    `config` is the codec's own configuration (JSON values). `residual` is the squared error that remains when every
    fragment is present (float64, measured when encoding, 0 for exact codecs). `mandatory` tensors are raw, load first
    and count as needed by everything. `sha256` is the digest of the tensor's little-endian bytes. `essential_gain` is
    the squared error that the part removes which every fragment carries: counted once, with whichever comes first.
    """

    spec: TensorSpec
    codec: str
    config: Mapping[str, Any]
    residual: float
    mandatory: bool
    sha256: bytes
    fragments: tuple[FragmentEntry, ...] = field(repr=False)
    essential_gain: float = 0.0

    @property
    def energy(self) -> float:
        """Squared error with nothing loaded: the sum of squares of the finite floating elements."""
        return self.residual + math.fsum((self.essential_gain, *(f.gain for f in self.fragments)))

    @property
    def stored_bytes(self) -> int:
        return sum(f.stored_bytes for f in self.fragments)

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True, slots=True)
class Fragment:
    """A fragment in hand: the stored bytes of (tensor, index)."""

    tensor: str
    index: int
    payload: bytes = field(repr=False)
