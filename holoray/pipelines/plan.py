"""Which fragments, in which order: greatest gain per byte first, respecting prerequisites.

A single layer may gain little or even lose while the next one gains much, so the fragments of a slot are grouped
into *steps*: the upper convex hull of cumulative gain over cumulative bytes. Taken greedily over all slots, steps
give the best quality for every number of bytes up to one step (the fractional-knapsack argument).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from holoray.codecs.base import present_with_prerequisites
from holoray.errors import QualityError, UsageError
from holoray.fragment import FragmentEntry, TensorEntry
from holoray.manifest import Manifest
from holoray.pipelines.curve import Key, store_curve, streaming_keys
from holoray.pipelines.fault_policy import FaultPolicy
from holoray.quality import Quality, check_target


@dataclass(frozen=True, slots=True)
class Target:
    """When to stop: at a quality, at a number of bytes, at given fragment indices of each tensor, or at the end."""

    quality: float | None = None
    bytes: int | None = None
    fragments: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.quality, self.bytes, self.fragments)) > 1:
            raise UsageError("a load has one target", hint="choose one of quality, bytes and fragments")
        if self.quality is not None:
            check_target(self.quality)
        if self.bytes is not None and self.bytes < 0:
            raise UsageError("a byte budget cannot be negative", hint="leave it out to load everything")
        if self.fragments is not None and (not self.fragments or min(self.fragments) < 0):
            raise UsageError("fragments must be a list of numbers from 0", hint="e.g. 0,1,2")


@dataclass(frozen=True, slots=True)
class Unit:
    """The fragments of one slot that are decoded together: the smallest piece of work."""

    tensor: int
    slot: int
    fragments: tuple[FragmentEntry, ...]

    @property
    def stored_bytes(self) -> int:
        return sum(f.stored_bytes for f in self.fragments)


def with_streaming_order(tensors: Sequence[TensorEntry]) -> tuple[TensorEntry, ...]:
    """The same tensors with `order` set: mandatory ones first, then steps by falling gain per byte."""
    keys = [(t, f.index) for t, tensor in enumerate(tensors) if tensor.mandatory for f in tensor.fragments]
    steps = [
        (-rate, t, first, indices)
        for t, tensor in enumerate(tensors)
        if not tensor.mandatory
        for rate, first, indices in _steps(tensor)
    ]
    keys += [(t, index) for _, t, _, indices in sorted(steps) for index in indices]
    place = {key: order for order, key in enumerate(keys)}
    return tuple(
        replace(tensor, fragments=tuple(replace(f, order=place[t, f.index]) for f in tensor.fragments))
        for t, tensor in enumerate(tensors)
    )


def _steps(tensor: TensorEntry) -> Iterator[tuple[float, int, tuple[int, ...]]]:
    """(gain per byte, first index, indices) of each step of each slot."""
    if tensor.essential_gain:
        tensor = _with_essential_gain_first(tensor)
    slots: dict[int, list[FragmentEntry]] = defaultdict(list)
    for fragment in tensor.fragments:
        slots[fragment.slot].append(fragment)
    for chain in slots.values():
        while chain:
            rates = list(_rates(chain))
            best = max(range(len(rates)), key=lambda i: (rates[i], i))
            yield rates[best], chain[0].index, tuple(f.index for f in chain[: best + 1])
            chain = chain[best + 1 :]


def _with_essential_gain_first(tensor: TensorEntry) -> TensorEntry:
    """The tensor with the essential gain added to the fragment that gains most per byte so: it comes first.

    Codecs with an essential part have no layers, so no other fragment has a greater rate.
    """
    carrier = max(tensor.fragments, key=lambda f: ((f.gain + tensor.essential_gain) / max(f.stored_bytes, 1), -f.index))
    gain = carrier.gain + tensor.essential_gain
    fragments = (replace(f, gain=gain) if f is carrier else f for f in tensor.fragments)
    return replace(tensor, fragments=tuple(fragments), essential_gain=0.0)


def _rates(chain: Sequence[FragmentEntry]) -> Iterator[float]:
    gain, nbytes = 0.0, 0
    for fragment in chain:
        gain += fragment.gain
        nbytes += fragment.stored_bytes
        yield gain / max(nbytes, 1)


def select(manifest: Manifest, target: Target, *, skip_lost: bool = False) -> list[Key]:
    """The fragments that reach the target, in streaming order (mandatory tensors always among them).

    Raises QualityError if the quality cannot be reached, also because files of the store are lost: it then says what
    can be, or, with `skip_lost`, all that is left is selected as long as the mandatory tensors are. Raises
    CapacityError if the byte budget does not even hold the manifest and the mandatory tensors.
    """
    keys = streaming_keys(manifest)
    if manifest.lost:
        why = next(iter(manifest.lost.values()))
        check_mandatory(manifest, set(keys), why)
        reached = max(quality.ratio for quality in store_curve(manifest).qualities)
        if _needs_more(manifest, keys, target, reached):
            if not skip_lost:
                raise _only(reached, target, why)
            target = target if target.fragments else Target()
    if target.quality is not None:
        return keys[: store_curve(manifest).fragments_for_quality(target.quality)]
    if target.bytes is not None:
        return keys[: store_curve(manifest).fragments_within(target.bytes)]
    if target.fragments is not None:
        return _given(manifest, keys, frozenset(target.fragments))
    return keys


def check_mandatory(manifest: Manifest, held: Container[Key], why: str) -> None:
    """Raise QualityError, with the reason, unless the fragments that are there hold all mandatory tensors."""
    for t, tensor in enumerate(manifest.tensors):
        if tensor.mandatory and any((t, fragment.index) not in held for fragment in tensor.fragments):
            hint = f"tensor {tensor.name!r}, which is mandatory, is among what is lost"
            raise QualityError(f"no quality can be had: {why}", hint=hint, tensor=tensor.name)


def _needs_more(manifest: Manifest, keys: Sequence[Key], target: Target, reached: float) -> bool:
    """Whether the target needs more than what is left of a store with lost files, which reaches a quality."""
    if target.fragments is not None:
        return _needs_lost(manifest, set(keys), target.fragments)
    return target.bytes is None and (target.quality is None or target.quality >= 1 or reached < target.quality)


def _only(reached: float, target: Target, why: str) -> QualityError:
    wanted = "everything" if target.quality is None else f"quality {target.quality}"
    return QualityError(
        f"{wanted} cannot be had, only quality {reached:.6f}: {why}",
        hint=f"add shares, or load to --quality {math.floor(reached * 1e6) / 1e6}",
    )


def _needs_lost(manifest: Manifest, left: set[Key], indices: Sequence[int]) -> bool:
    whole = _given(manifest, streaming_keys(manifest.without({})), frozenset(indices))
    return not left.issuperset(whole)


def _given(manifest: Manifest, keys: list[Key], indices: frozenset[int]) -> list[Key]:
    """`indices` counts layers for a codec with layers, fragments otherwise; what lacks prerequisites is left out."""
    wanted: set[Key] = set()
    for t, (tensor, codec) in enumerate(zip(manifest.tensors, manifest.codecs, strict=True)):
        chosen = frozenset(
            f.index for f in tensor.fragments if tensor.mandatory or (f.layer if codec.layered else f.index) in indices
        )
        wanted.update((t, index) for index in present_with_prerequisites(codec, tensor.spec, chosen))
    mandatory = sum(len(t.fragments) for t in manifest.tensors if t.mandatory)
    if len(wanted) == mandatory < len(keys):
        raise UsageError(
            f"no tensor can use fragments {sorted(indices)} alone",
            hint="indices count from 0; a layer of `planes` needs all layers before it",
        )
    return [key for key in keys if key in wanted]


def units(manifest: Manifest, keys: Iterable[Key]) -> list[Unit]:
    """The keys grouped by slot; mandatory tensors first, then in checkpoint order."""
    grouped: dict[tuple[bool, int, int], list[FragmentEntry]] = defaultdict(list)
    for t, index in keys:
        fragment = manifest.tensors[t].fragments[index]
        grouped[not manifest.tensors[t].mandatory, t, fragment.slot].append(fragment)
    return [
        Unit(t, slot, tuple(sorted(grouped[rank, t, slot], key=lambda f: f.layer))) for rank, t, slot in sorted(grouped)
    ]


def batches(work: Sequence[Unit], nbytes: int) -> list[tuple[Unit, ...]]:
    """Consecutive units in batches of about `nbytes` stored bytes (at least one unit each)."""
    out: list[tuple[Unit, ...]] = []
    batch: list[Unit] = []
    size = 0
    for unit in work:
        if batch and size + unit.stored_bytes > nbytes:
            out.append(tuple(batch))
            batch, size = [], 0
        batch.append(unit)
        size += unit.stored_bytes
    if batch:
        out.append(tuple(batch))
    return out


def check_quality_reached(quality: Quality, target: Target, policy: FaultPolicy) -> None:
    """Raise QualityError for a load that ended below what was asked for.

    Where corrupt fragments are skipped, that is the policy's `min_quality`; elsewhere it means that the manifest's
    gains lied.
    """
    wanted = policy.min_quality if policy.skip_corrupted else target.quality
    if wanted and not quality.reaches(wanted):
        raise QualityError(
            f"the load ended at quality {quality.ratio!r} instead of {wanted}",
            hint="add a source with an honest copy, or accept less" if policy.skip_corrupted else "",
        )
