"""Marks at the end of a segment: what it holds for sure. They outlive whoever set them, as the segment does."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from holoray.actors.messages import Holdings, Slot
from holoray.manifest import Manifest


class Marks:
    """A byte a slot (1: whole) and a byte a tensor (1: sealed) in `memory`, uint8 of `nbytes(manifest)`.

    A slot's mark goes before the slot is written and comes back afterwards: who dies in between leaves none.
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

    def hold(self, slot: Slot) -> None:
        self._slots[self._starts[slot[0]] + slot[1]] = 1

    def holds(self, slot: Slot) -> bool:
        return bool(self._slots[self._starts[slot[0]] + slot[1]])

    def seal(self, tensor: int) -> None:
        self._sealed[tensor] = 1

    def holdings(self) -> Holdings:
        """What is marked now."""
        places = np.flatnonzero(self._slots)
        tensors = np.searchsorted(self._starts, places, side="right") - 1
        slots = places - np.asarray(self._starts)[tensors]
        return Holdings(
            frozenset(zip(tensors.tolist(), slots.tolist(), strict=True)),
            frozenset(np.flatnonzero(self._sealed).tolist()),
        )


def _slot_counts(manifest: Manifest) -> list[int]:
    return [1 + max((f.slot for f in t.fragments), default=-1) for t in manifest.tensors]
