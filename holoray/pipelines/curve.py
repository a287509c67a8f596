"""How quality grows with the bytes read, from the gains in the manifest: of a tensor, of a store, of any subset."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, islice
from typing import Generic, NamedTuple, TypeVar

from holoray.codecs.registry import get_codec
from holoray.errors import CapacityError, QualityError, UsageError
from holoray.fragment import NO_PREREQUISITE, TensorEntry
from holoray.manifest import Manifest
from holoray.pipelines.ledger import QualityLedger
from holoray.quality import Quality, check_target

Key = tuple[int, int]
"""A fragment of a manifest: (position of the tensor, index of the fragment)."""

F = TypeVar("F")


class CurvePoint(NamedTuple):
    """Quality after so many bytes, manifest included."""

    bytes: int
    quality: float


@dataclass(frozen=True, eq=False)
class QualityCurve(Generic[F]):
    """How the quality of a tensor or of a store grows, fragment by fragment in streaming order.

    Everything follows from the gains measured when encoding, so nothing is read, and what is said of a subset is what
    decoding it would give. A fragment is called by its index in the curve of a tensor, by (tensor name, index) in that
    of a store. Counts of fragments are lengths of prefixes of `order`; after the first k of them `nbytes[k]` bytes are
    read (with the manifest, in the curve of a store) and the quality is `qualities[k]`.
    """

    floor: int
    """How many fragments of the stream come before any target: those of the mandatory tensors of a store; those from
    which a tensor can be reconstructed at all."""
    _tensors: Sequence[TensorEntry] = field(repr=False)
    _keys: Sequence[Key] = field(repr=False)
    _overhead_bytes: Callable[[], int] = field(repr=False)
    _name: Callable[[Key], F] = field(repr=False)
    _key: Callable[[F], Key] = field(repr=False)

    @cached_property
    def order(self) -> tuple[F, ...]:
        """The fragments in streaming order."""
        return tuple(map(self._name, self._keys))

    @cached_property
    def nbytes(self) -> tuple[int, ...]:
        """Bytes read before the first fragment and after each."""
        return tuple(self._walk_bytes())

    @cached_property
    def qualities(self) -> tuple[Quality, ...]:
        """The quality before the first fragment and after each."""
        return tuple(self._walk())

    @cached_property
    def points(self) -> tuple[CurvePoint, ...]:
        """(bytes, quality) before the first fragment and after each."""
        return tuple(CurvePoint(n, quality.ratio) for n, quality in zip(self._walk_bytes(), self._walk(), strict=True))

    @cached_property
    def minimum_fragments(self) -> int:
        """The fewest fragments, if one may choose, from which every tensor can be reconstructed."""
        return sum(minimum_fragments(tensor) for tensor in self._tensors)

    @property
    def sufficient_fragments(self) -> int:
        """How many fragments make the result complete: all of them."""
        return len(self._keys)

    def quality_of(self, fragments: Iterable[F]) -> Quality:
        """The quality of any subset, in any order; what lacks its prerequisites does not count.

        Raises UsageError for a fragment that there is not.
        """
        ledger = QualityLedger(self._tensors)
        for fragment in fragments:
            ledger.add(*self._checked(fragment))
        return ledger.quality

    def fragments_for_quality(self, quality: float) -> int:
        """How many fragments of the stream reach a quality in (0, 1]; 1 means all.

        Raises QualityError if even all do not reach it, UsageError for a quality outside (0, 1].
        """
        check_target(quality)
        whole = 0.0
        for count, reached in enumerate(self._walk()):
            # A transform that is complete may lack the last digits of a quality below 1: that is not reached.
            enough = reached.complete if quality == 1.0 else reached.ratio >= quality
            if enough and count >= self.floor:
                return count
            whole = reached.ratio
        raise QualityError(
            f"quality {quality} is not reachable: all {len(self._keys)} fragments give {whole!r}",
            hint="lower the target, or encode with --codec planes, which ends exact",
        )

    def bytes_for_quality(self, quality: float) -> int:
        """How many bytes of the stream reach a quality; raises as `fragments_for_quality` does."""
        return self._bytes_after(self.fragments_for_quality(quality))

    def fragments_within(self, nbytes: int) -> int:
        """How many fragments of the stream are best within a number of bytes.

        That is not always the longest prefix: a layer may lose before the next one gains. Raises CapacityError if not
        even the first `floor` fragments fit.
        """
        least = self._bytes_after(self.floor)
        if nbytes < least:
            raise CapacityError(
                f"{nbytes} bytes do not hold what comes first ({least} bytes): the manifest and the mandatory tensors "
                "of a store, or the fragments without which a tensor cannot be reconstructed",
                hint=f"allow at least {least} bytes",
            )
        best, ratio = self.floor, -1.0
        for count, (read, reached) in enumerate(zip(self._walk_bytes(), self._walk(), strict=True)):
            if read > nbytes:
                return best
            if count >= self.floor and reached.ratio > ratio:
                best, ratio = count, reached.ratio
        return len(self._keys)

    def _walk(self) -> Iterator[Quality]:
        """The quality before the first fragment and after each, no further than asked for."""
        ledger = QualityLedger(self._tensors)
        yield ledger.quality
        for key in self._keys:
            ledger.add(*key)
            yield ledger.quality

    def _walk_bytes(self) -> Iterator[int]:
        stored = (self._tensors[t].fragments[index].stored_bytes for t, index in self._keys)
        return accumulate(stored, initial=self._overhead_bytes())

    def _bytes_after(self, count: int) -> int:
        return next(islice(self._walk_bytes(), count, None))

    def _checked(self, fragment: F) -> Key:
        try:
            tensor, index = self._key(fragment)
            if not 0 <= index < len(self._tensors[tensor].fragments):
                raise KeyError(index)
        except (KeyError, TypeError, ValueError):
            raise UsageError(
                f"there is no fragment {fragment!r}", hint=f"one of them is {self._name(self._keys[0])!r}"
            ) from None
        return tensor, index


def curve_of(entry: TensorEntry) -> QualityCurve[int]:
    """The curve of one tensor; its bytes are those of its fragments alone."""
    order = [f.index for f in sorted(entry.fragments, key=lambda f: (f.order, f.index))]
    floor = _reconstructible_prefix(entry, order)
    keys = [(0, index) for index in order]
    return QualityCurve(floor, [entry], keys, lambda: 0, lambda key: key[1], lambda index: (0, index))


def store_curve(manifest: Manifest, codec: str | None = None) -> QualityCurve[tuple[str, int]]:
    """The curve of a whole store, whose bytes begin with the manifest; or that of all its tensors under one codec.

    Mandatory tensors belong to the whole alone. Raises UsageError for a codec that no other tensor has.
    """
    tensors, keys, position = manifest.tensors, streaming_keys(manifest), manifest.by_name
    if codec is not None:
        kept = [t for t, e in enumerate(tensors) if e.codec == codec and not e.mandatory]
        if not kept:
            raise UsageError(f"no tensor is encoded with {codec!r}", hint="`holoray inspect` lists the tensors")
        place = {t: i for i, t in enumerate(kept)}
        tensors = tuple(tensors[t] for t in kept)
        keys = [(place[t], index) for t, index in keys if t in place]
        position = {tensor.name: i for i, tensor in enumerate(tensors)}
    return QualityCurve(
        floor=sum(len(t.fragments) for t in tensors if t.mandatory),
        _tensors=tensors,
        _keys=keys,
        _overhead_bytes=lambda: len(manifest.encoded) if codec is None else 0,
        _name=lambda key: (tensors[key[0]].name, key[1]),
        _key=lambda named: (position[named[0]], named[1]),
    )


def streaming_keys(manifest: Manifest) -> list[Key]:
    """The fragments that can be read and have their prerequisites, in streaming order: all but in degraded stores."""
    ordered = sorted((f.order, t, f.index) for t, tensor in enumerate(manifest.tensors) for f in tensor.fragments)
    keys = [(t, index) for _, t, index in ordered]
    if not manifest.lost:
        return keys
    present: set[Key] = set()
    for t, index in keys:  # a fragment streams after its prerequisite
        fragment = manifest.tensors[t].fragments[index]
        founded = fragment.requires == NO_PREREQUISITE or (t, fragment.requires) in present
        if fragment.file not in manifest.lost and founded:
            present.add((t, index))
    return [key for key in keys if key in present]


def minimum_fragments(entry: TensorEntry) -> int:
    """The fewest fragments from which the tensor can be reconstructed; all of a mandatory one.

    Codecs number fragments so that the first are the coarsest: no choice of fewer does what a prefix does not.
    """
    if entry.mandatory:
        return len(entry.fragments)
    return _reconstructible_prefix(entry, range(len(entry.fragments)))


def _reconstructible_prefix(entry: TensorEntry, order: Sequence[int]) -> int:
    codec = get_codec(entry.codec, entry.config)

    def enough(count: int) -> bool:
        return codec.can_reconstruct(entry.spec, frozenset(order[:count]))

    return bisect_left(range(len(order)), True, key=enough)  # more fragments never make it impossible again
