"""How quality grows with the bytes read, from the gains in the manifest: of a tensor, of a store, of any subset."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, NamedTuple, TypeVar

from holoray.codecs.registry import get_codec
from holoray.errors import CapacityError, QualityError, UsageError
from holoray.fragment import TensorEntry
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

    order: tuple[F, ...]
    """The fragments in streaming order."""
    floor: int
    """How many fragments of the stream come before any target: those of the mandatory tensors of a store; those from
    which a tensor can be reconstructed at all."""
    nbytes: tuple[int, ...] = field(repr=False)
    qualities: tuple[Quality, ...] = field(repr=False)
    _tensors: Sequence[TensorEntry] = field(repr=False)
    _key: Callable[[F], Key] = field(repr=False)

    @cached_property
    def minimum_fragments(self) -> int:
        """The fewest fragments, if one may choose, from which every tensor can be reconstructed."""
        return sum(minimum_fragments(tensor) for tensor in self._tensors)

    @property
    def sufficient_fragments(self) -> int:
        """How many fragments make the result complete: all of them."""
        return len(self.order)

    @cached_property
    def points(self) -> tuple[CurvePoint, ...]:
        """(bytes, quality) before the first fragment and after each."""
        return tuple(CurvePoint(n, q.ratio) for n, q in zip(self.nbytes, self.qualities, strict=True))

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
        for count in range(self.floor, len(self.order)):
            if self.qualities[count].reaches(quality):
                return count
        # With every fragment there, quality 1 is reached by definition; a transform's rounding may deny the last
        # digits of a lower one.
        whole = self.qualities[-1].ratio
        if quality < 1.0 and whole < quality:
            raise QualityError(
                f"quality {quality} is not reachable: all {len(self.order)} fragments give {whole!r}",
                hint="lower the target, or encode with --codec planes, which ends exact",
            )
        return len(self.order)

    def bytes_for_quality(self, quality: float) -> int:
        """How many bytes of the stream reach a quality; raises as `fragments_for_quality` does."""
        return self.nbytes[self.fragments_for_quality(quality)]

    def fragments_within(self, nbytes: int) -> int:
        """How many fragments of the stream are best within a number of bytes.

        That is not always the longest prefix: a layer may lose before the next one gains. Raises CapacityError if not
        even the first `floor` fragments fit.
        """
        least = self.nbytes[self.floor]
        if nbytes < least:
            raise CapacityError(
                f"{nbytes} bytes do not hold what comes first ({least} bytes): the manifest and the mandatory tensors "
                "of a store, or the fragments without which a tensor cannot be reconstructed",
                hint=f"allow at least {least} bytes",
            )
        longest = bisect_right(self.nbytes, nbytes) - 1
        if longest == len(self.order):
            return longest
        return max(range(self.floor, longest + 1), key=lambda count: (self.qualities[count].ratio, -count))

    def _checked(self, fragment: F) -> Key:
        try:
            tensor, index = self._key(fragment)
            if not 0 <= index < len(self._tensors[tensor].fragments):
                raise KeyError(index)
        except (KeyError, TypeError, ValueError):
            raise UsageError(f"there is no fragment {fragment!r}", hint=f"one of them is {self.order[0]!r}") from None
        return tensor, index


def curve_of(entry: TensorEntry) -> QualityCurve[int]:
    """The curve of one tensor; its bytes are those of its fragments alone."""
    order = tuple(f.index for f in sorted(entry.fragments, key=lambda f: (f.order, f.index)))
    return _curve([entry], order, lambda index: (0, index), 0, _reconstructible_prefix(entry, order))


def store_curve(manifest: Manifest, codec: str | None = None) -> QualityCurve[tuple[str, int]]:
    """The curve of a whole store, whose bytes begin with the manifest; or that of all its tensors under one codec.

    Mandatory tensors belong to the whole alone. Raises UsageError for a codec that no other tensor has.
    """
    kept = [t for t, e in enumerate(manifest.tensors) if codec is None or (e.codec == codec and not e.mandatory)]
    if codec is not None and not kept:
        raise UsageError(f"no tensor is encoded with {codec!r}", hint="`holoray inspect` lists the tensors")
    tensors = [manifest.tensors[t] for t in kept]
    place = {t: i for i, t in enumerate(kept)}
    position = {tensor.name: i for i, tensor in enumerate(tensors)}
    order = tuple((tensors[place[t]].name, index) for t, index in streaming_keys(manifest) if t in place)
    floor = sum(len(t.fragments) for t in tensors if t.mandatory)
    overhead_bytes = len(manifest.encoded) if codec is None else 0
    return _curve(tensors, order, lambda named: (position[named[0]], named[1]), overhead_bytes, floor)


def streaming_keys(manifest: Manifest) -> list[Key]:
    """All fragments in streaming order."""
    ordered = sorted((f.order, t, f.index) for t, tensor in enumerate(manifest.tensors) for f in tensor.fragments)
    return [(t, index) for _, t, index in ordered]


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


def _curve(
    tensors: Sequence[TensorEntry], order: tuple[F, ...], key: Callable[[F], Key], overhead_bytes: int, floor: int
) -> QualityCurve[F]:
    nbytes, qualities = zip(*_walk(tensors, map(key, order), overhead_bytes), strict=True)
    return QualityCurve(order, floor, nbytes, qualities, tensors, key)


def _walk(tensors: Sequence[TensorEntry], keys: Iterable[Key], nbytes: int) -> Iterator[tuple[int, Quality]]:
    ledger = QualityLedger(tensors)
    yield nbytes, ledger.quality
    for t, index in keys:
        ledger.add(t, index)
        nbytes += tensors[t].fragments[index].stored_bytes
        yield nbytes, ledger.quality
