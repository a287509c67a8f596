"""The generations of a warm-up: what each adds to the one before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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


def goals(manifest: Manifest, qualities: Sequence[float]) -> tuple[Goal, ...]:
    """A goal per target, without those that an earlier one reaches already.

    Raises QualityError if a target cannot be reached.
    """
    found: list[Goal] = []
    held: frozenset[Key] = frozenset()
    for quality in check_qualities(qualities):
        keys = select(manifest, Target(quality=quality))
        fresh = [key for key in keys if key not in held]
        if found and not fresh:
            found[-1] = Goal(quality, found[-1].new, found[-1].whole)
            continue
        whole = {(u.tensor, u.slot): u for u in units(manifest, keys)}
        found.append(Goal(quality, tuple(units(manifest, fresh)), whole))
        held = frozenset(keys)
    return tuple(found)


def first_layer(unit: Unit) -> int:
    """How many layers of the slot must be in place before the unit is added."""
    return unit.fragments[0].layer


def needs_sealing(codec: Codec) -> bool:
    """Whether the tensors of this codec are stale until their accumulated state is turned into them."""
    return ACCUMULATORS[codec.name].needs_finalize
