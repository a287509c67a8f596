"""The generations of a warm-up: what each adds to the one before."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from holoray.actors.messages import Slot
from holoray.codecs.base import Codec
from holoray.errors import UsageError
from holoray.kernels.registry import ACCUMULATORS
from holoray.manifest import Manifest
from holoray.pipelines.curve import Key
from holoray.pipelines.plan import Target, Unit, select, units
from holoray.quality import check_target


@dataclass(frozen=True, slots=True)
class Goal:
    """One generation: the target quality it reaches and the units that it adds."""

    quality: float
    new: tuple[Unit, ...] = field(repr=False)
    whole: Mapping[Slot, Unit] = field(repr=False)
    """Everything wanted so far, slot by slot: what a node that holds nothing must ingest."""


def check_qualities(qualities: Sequence[float]) -> tuple[float, ...]:
    """The targets in rising order, each once; raises UsageError for none or impossible ones."""
    if not qualities:
        raise UsageError("a warm-up needs at least one target quality")
    return tuple(sorted({check_target(float(q)) for q in qualities}))


def goals(manifest: Manifest, qualities: Sequence[float], *, skip_lost: bool = False) -> tuple[Goal, ...]:
    """A goal per target, without those that an earlier one reaches already.

    Raises QualityError if a target cannot be reached; with `skip_lost` only if a mandatory tensor is lost.
    """
    found: list[Goal] = []
    held: frozenset[Key] = frozenset()
    for quality in check_qualities(qualities):
        keys = select(manifest, Target(quality=quality), skip_lost=skip_lost)
        fresh = [key for key in keys if key not in held]
        if found and not fresh:
            found[-1] = Goal(quality, found[-1].new, found[-1].whole)
            continue
        whole = {(u.tensor, u.slot): u for u in units(manifest, keys)}
        found.append(Goal(quality, tuple(units(manifest, fresh)), whole))
        held = frozenset(keys)
    return tuple(found)


def lost_with(manifest: Manifest, goal: Goal, missed: Collection[Key]) -> frozenset[Key]:
    """What is missed of a goal, and what of it requires that."""
    lost = set(missed)
    for slot in {(t, manifest.tensors[t].fragments[index].slot) for t, index in missed}:
        for fragment in goal.whole[slot].fragments:  # in the order of their layers
            if (slot[0], fragment.requires) in lost:
                lost.add((slot[0], fragment.index))
    return frozenset(lost)


def cut(manifest: Manifest, found: Sequence[Goal], lost: Collection[Key]) -> tuple[Goal, ...]:
    """The goals without what is lost, which is with all that requires it.

    A slot of which nothing is left stays, empty: zeros, whatever somebody had begun to write there.
    """
    if not lost:
        return tuple(found)
    slots = {(t, manifest.tensors[t].fragments[index].slot) for t, index in lost}

    def left(unit: Unit) -> Unit:
        if (unit.tensor, unit.slot) not in slots:
            return unit
        return replace(unit, fragments=tuple(f for f in unit.fragments if (unit.tensor, f.index) not in lost))

    return tuple(
        Goal(
            goal.quality,
            tuple(unit for unit in map(left, goal.new) if unit.fragments),
            {**goal.whole, **{slot: left(goal.whole[slot]) for slot in slots & goal.whole.keys()}},
        )
        for goal in found
    )


def first_layer(unit: Unit) -> int:
    """How many layers of the slot must be in place before the unit is added."""
    return unit.fragments[0].layer


def count_with(unit: Unit) -> int:
    """How many fragments its slot holds once the unit is added."""
    return first_layer(unit) + len(unit.fragments) if unit.fragments else 0


def needs_sealing(codec: Codec) -> bool:
    """Whether the tensors of this codec are stale until their accumulated state is turned into them."""
    return ACCUMULATORS[codec.name].needs_finalize
