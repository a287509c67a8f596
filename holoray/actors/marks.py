"""Marks at the end of a segment: what it holds for sure. They outlive whoever set them, as the segment does."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from holoray.actors.messages import Holdings, Slot
from holoray.manifest import Manifest


class Marks:
    """A byte a slot and a byte a tensor (1: sealed) in `memory`, uint8 of `nbytes(manifest)`.

    A slot's mark is 0 while it is not whole, else 1 and the fragments it holds: how much was wanted may change, where
    fragments turn out to be lost. It goes before the slot is written and comes back afterwards: who dies in between
    leaves none.
    """

    def __init__(self, manifest: Manifest, memory: npt.NDArray[np.uint8]) -> None:
        counts = _slot_counts(manifest)
        self._starts = [0, *itertools.accumulate(counts)]
        self._slots = memory[: self._starts[-1]]
        self._sealed = memory[self._starts[-1] :]

    @staticmethod
    def nbytes(manifest: Manifest) -> int:
        return sum(_slot_counts(manifest)) + len(manifest.tensors)

    def forget(self, slot: Slot) -> None:
        """The slot is about to be written: it is not whole, nor is its tensor up to date."""
        self._sealed[slot[0]] = 0
        self.spoil(slot)

    def spoil(self, slot: Slot) -> None:
        """The slot is not there any more; its tensor stays as it is."""
        self._slots[self._starts[slot[0]] + slot[1]] = 0

    def hold(self, slot: Slot, count: int) -> None:
        """The slot is whole, and holds so many fragments."""
        self._slots[self._starts[slot[0]] + slot[1]] = 1 + count

    def holds(self, slot: Slot) -> bool:
        return bool(self._slots[self._starts[slot[0]] + slot[1]])

    def count(self, slot: Slot) -> int:
        """How many fragments a slot holds that is whole."""
        return int(self._slots[self._starts[slot[0]] + slot[1]]) - 1

    def seal(self, tensor: int) -> None:
        self._sealed[tensor] = 1

    def holdings(self) -> Holdings:
        """What is marked now."""
        places = np.flatnonzero(self._slots)
        tensors = np.searchsorted(self._starts, places, side="right") - 1
        slots = places - np.asarray(self._starts)[tensors]
        counts = self._slots[places] - 1
        return Holdings(
            dict(zip(zip(tensors.tolist(), slots.tolist(), strict=True), counts.tolist(), strict=True)),
            frozenset(np.flatnonzero(self._sealed).tolist()),
        )


def _slot_counts(manifest: Manifest) -> list[int]:
    return [1 + max((f.slot for f in t.fragments), default=-1) for t in manifest.tensors]
