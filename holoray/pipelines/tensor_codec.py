"""One tensor at a time: encode an array into fragments, rebuild it from any of them."""

from __future__ import annotations

import hashlib

import numpy as np

from holoray.codecs.base import check_entry
from holoray.codecs.registry import get_codec
from holoray.compression import ZSTD
from holoray.errors import FormatError, IntegrityError, QualityError
from holoray.fragment import Fragment, FragmentEntry, TensorEntry
from holoray.integrity import Digests
from holoray.integrity import check as check_integrity
from holoray.kernels.encoder import EncodeOptions, Encoder
from holoray.kernels.registry import make_accumulator, make_encoder
from holoray.kernels.scratch import Scratch
from holoray.pipelines.auto import best_encoding
from holoray.pipelines.curve import QualityCurve, curve_of
from holoray.pipelines.entries import fragment_entry, tensor_entry
from holoray.pipelines.ledger import QualityLedger
from holoray.pipelines.plan import with_streaming_order
from holoray.pipelines.policy import AUTO, check_choice, effective_codec
from holoray.quality import Quality
from holoray.tensor import Array, TensorSpec, as_bytes, canonical


def begin_encoding(codec: str, spec: TensorSpec, array: Array, options: EncodeOptions) -> Encoder:
    """An encoder of the named codec, or of the best for `auto`; of `raw` where that cannot represent the tensor."""
    codec = effective_codec(check_choice(codec), array, spec)
    if codec == AUTO:
        return best_encoding(spec, array, options)
    encoder = make_encoder(codec, spec, array, options)
    return encoder if encoder.faithful else make_encoder("raw", spec, array, options)


def encode_tensor(
    array: Array,
    codec: str = "planes",
    fragments: int = 8,
    seed: int = 0,
    *,
    compression: str = ZSTD,
    tile: int = 0,
    essential: float = 0.0,
    rank: int = 0,
    energy: float = 0.0,
    coefficients: str = "float32",
    name: str = "tensor",
) -> tuple[TensorEntry, list[Fragment]]:
    """Encode one array of any shape; returns its manifest entry and its fragments, by index.

    `codec` and options are those of `encode`; `raw` and `planes` cut by size. What the codec cannot represent goes
    `raw`. Raises FormatError for a dtype without a name in safetensors, UsageError for options without meaning.
    """
    array = canonical(array)
    options = EncodeOptions(fragments, seed, compression, tile, essential, rank, energy, coefficients)
    encoder = begin_encoding(codec, TensorSpec.of(name, array), array, options)
    encoded = sorted((f for part in range(encoder.parts) for f in encoder.encode(part)), key=lambda f: f.index)
    entries = [fragment_entry(f, Digests.of(f.payload)) for f in encoded]
    entry = tensor_entry(encoder, entries, sha256=hashlib.sha256(as_bytes(array).data).digest())
    (entry,) = with_streaming_order([entry])
    return entry, [Fragment(name, f.index, bytes(f.payload)) for f in encoded]


class TensorDecoder:
    """Rebuilds one tensor from its fragments, in any order; usable before the last one."""

    def __init__(self, entry: TensorEntry) -> None:
        self.entry = entry
        self._codec = get_codec(entry.codec, entry.config)
        check_entry(self._codec, entry)
        self._accumulator = make_accumulator(
            entry.spec, self._codec, np.zeros(entry.spec.shape, entry.spec.numpy_dtype)
        )
        self._ledger = QualityLedger([entry])
        self._added: set[int] = set()
        self._scratch = Scratch()

    def add(self, fragment: Fragment) -> float:
        """Add a fragment and return the quality reached; one that is already there changes nothing.

        Raises IntegrityError for a fragment that is not exactly the one the entry describes; nothing of it is used.
        """
        known = self._entry_of(fragment)
        check_integrity(self.entry.name, known, fragment.payload, strict=True)
        if fragment.index not in self._added:
            self._accumulate(known, fragment)
            self._added.add(fragment.index)
            self._ledger.add(0, fragment.index)
        return self.quality

    @property
    def quality(self) -> float:
        """1 - squared error / energy, from the gains measured when encoding."""
        return self._ledger.tensor_quality(0).ratio

    @property
    def report(self) -> Quality:
        """The quality with its other faces: relative error, SNR."""
        return self._ledger.tensor_quality(0)

    @property
    def curve(self) -> QualityCurve[int]:
        """How quality grows with the fragments, those included that are not there yet."""
        return curve_of(self.entry)

    @property
    def can_reconstruct(self) -> bool:
        """Whether there is enough for a usable tensor: one fragment; for `planes` all of layer 0."""
        return self._codec.can_reconstruct(self.entry.spec, frozenset(self._added))

    def reconstruct(self) -> Array:
        """The tensor as far as the fragments tell, as a copy; raises QualityError while `can_reconstruct` is false."""
        if not self.can_reconstruct:
            raise QualityError(
                f"{len(self._added)} fragments of {self.entry.name!r} are not enough to reconstruct it",
                hint="add a fragment; `planes` needs all of layer 0",
                tensor=self.entry.name,
            )
        self._accumulator.finalize()
        return self._accumulator.out.copy()

    def _entry_of(self, fragment: Fragment) -> FragmentEntry:
        if fragment.tensor != self.entry.name or not 0 <= fragment.index < len(self.entry.fragments):
            raise IntegrityError(
                f"fragment {fragment.index} of {fragment.tensor!r} does not belong to tensor {self.entry.name!r}",
                tensor=self.entry.name,
                fragment=fragment.index,
            )
        return self.entry.fragments[fragment.index]

    def _accumulate(self, known: FragmentEntry, fragment: Fragment) -> None:
        try:
            raw = self._accumulator.decompress([known], [memoryview(fragment.payload)], self._scratch)
            self._accumulator.accumulate(known.slot, raw, self._scratch)
        except FormatError as error:
            self._forget_waiting(known.slot)
            raise IntegrityError(
                f"fragment {fragment.index} of {self.entry.name!r} is malformed: {error}",
                hint="whoever sealed the store wrote it so: encode it again",
                tensor=self.entry.name,
                fragment=fragment.index,
            ) from error

    def _forget_waiting(self, slot: int) -> None:
        """A slot that met a malformed layer keeps what it held; layers that waited for their prerequisites are gone."""
        held = int(self._accumulator.state()["held"][slot])
        gone = {f.index for f in self.entry.fragments if f.slot == slot and f.layer >= held}
        self._added -= gone
        self._ledger = QualityLedger([self.entry])
        for index in self._added:
            self._ledger.add(0, index)
