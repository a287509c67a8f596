"""What a warm-up goes on without: fragments of which no source has an honest copy. A policy: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from holoray.actors.goals import Goal, cut, lost_with
from holoray.errors import IntegrityError, QualityError
from holoray.manifest import Manifest
from holoray.pipelines.curve import Key
from holoray.pipelines.ledger import QualityLedger
from holoray.pipelines.plan import check_mandatory


class Losses:
    """What is lost, and how much may be.

    `skips`: whether anything may. `min_quality`: what the last generation has at least. After a dead coordinator:
    `announced` is the newest generation that the consumer has heard of, and `lost` what that lacks.
    """

    def __init__(
        self, *, skips: bool = False, min_quality: float = 0.0, lost: Collection[Key] = (), announced: int = 0
    ) -> None:
        self.skips = skips
        self.lost = frozenset(lost)
        self._min_quality = min_quality
        self._announced = announced

    def cut(
        self, manifest: Manifest, found: Sequence[Goal], missed: Collection[Key], published: int
    ) -> tuple[Goal, ...]:
        """The goals without what is missed from now on.

        Raises QualityError if a mandatory tensor is among it, or the end would be below the least quality, and
        IntegrityError if one of the published generations counts what is missed: quality does not fall.
        """
        check_mandatory(manifest, _mandatory(manifest) - set(missed), "it is corrupt or missing in every source")
        _check_unpublished(manifest, found[: max(published, self._announced)], missed)
        lost = lost_with(manifest, found[-1], missed)
        left = cut(manifest, found, lost)
        check_least(manifest, left, self._min_quality)
        self.lost |= lost
        return left


def check_least(manifest: Manifest, found: Sequence[Goal], least: float) -> None:
    """Raise QualityError if the last of the goals has less than this quality."""
    if not least:
        return
    ledger = QualityLedger(manifest.tensors)
    for unit in found[-1].whole.values():
        for fragment in unit.fragments:
            ledger.add(unit.tensor, fragment.index)
    if not ledger.quality.reaches(least):
        raise QualityError(
            f"the warm-up can only end at quality {ledger.quality.ratio!r} instead of {least}",
            hint="add a source with an honest copy, or accept less",
        )


def _mandatory(manifest: Manifest) -> set[Key]:
    return {(t, f.index) for t, tensor in enumerate(manifest.tensors) if tensor.mandatory for f in tensor.fragments}


def _check_unpublished(manifest: Manifest, published: Sequence[Goal], missed: Collection[Key]) -> None:
    for t, index in sorted(missed):
        fragment = manifest.tensors[t].fragments[index]
        unit = published[-1].whole.get((t, fragment.slot)) if published else None
        if unit is not None and fragment in unit.fragments:
            raise IntegrityError(
                "a fragment of a published generation was lost with its workers, and is corrupt or missing in every "
                "source by now",
                hint="repair the store, and warm up again",
                tensor=manifest.tensors[t].name,
                fragment=index,
            )
