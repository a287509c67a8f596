"""Keeping the books: which fragments are in, and what quality that makes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from holoray.fragment import NO_PREREQUISITE, TensorEntry
from holoray.quality import Quality


class QualityLedger:
    """Quality of any subset of fragments, each counted once and only when its prerequisites are counted."""

    def __init__(self, tensors: Sequence[TensorEntry]) -> None:
        self._tensors = [_TensorLedger(t) for t in tensors]
        self._energy = math.fsum(t.energy for t in self._tensors)
        self._error = self._energy
        self._lost_digits = 0.0  # of the running sum (Neumaier), so that the last fragments keep their precision
        self._missing = sum(t.missing for t in self._tensors)

    def add(self, tensor: int, index: int) -> bool:
        """Count a fragment; returns False for one that had been added before."""
        ledger = self._tensors[tensor]
        if index in ledger.added:
            return False
        gains = ledger.add(index)
        self._missing -= len(gains)
        if gains and len(gains) == ledger.counted:  # the first ones bring the essential part
            self._subtract(ledger.essential_gain)
        for gain in gains:
            self._subtract(gain)
        return True

    @property
    def quality(self) -> Quality:
        """Quality of the whole model."""
        if self._missing == 0:
            return Quality(self._energy, math.fsum(t.residual for t in self._tensors), complete=True)
        return Quality(self._energy, max(self._error + self._lost_digits, 0.0))

    def tensor_quality(self, tensor: int) -> Quality:
        """Quality of one tensor."""
        return self._tensors[tensor].quality

    def _subtract(self, gain: float) -> None:
        total = self._error - gain
        larger, smaller = (self._error, -gain) if abs(self._error) >= abs(gain) else (-gain, self._error)
        self._lost_digits += (larger - total) + smaller
        self._error = total


class _TensorLedger:
    def __init__(self, tensor: TensorEntry) -> None:
        self.energy = tensor.energy
        self.residual = tensor.residual
        self.essential_gain = tensor.essential_gain
        self.added: set[int] = set()
        self._fragments = tensor.fragments
        self._counted: set[int] = set()
        self._dependents = {f.requires: f.index for f in tensor.fragments if f.requires != NO_PREREQUISITE}

    @property
    def counted(self) -> int:
        return len(self._counted)

    @property
    def missing(self) -> int:
        return len(self._fragments) - len(self._counted)

    def add(self, index: int) -> list[float]:
        """Gains of the fragments that count from now on: this one and those that waited for it."""
        self.added.add(index)
        gains: list[float] = []
        following: int | None = index
        while following is not None and following in self.added:
            fragment = self._fragments[following]
            if fragment.requires != NO_PREREQUISITE and fragment.requires not in self._counted:
                break
            self._counted.add(following)
            gains.append(fragment.gain)
            following = self._dependents.get(following)
        return gains

    @property
    def quality(self) -> Quality:
        # Summing what is missing, not subtracting what is there, keeps small errors exact.
        gains = [f.gain for f in self._fragments if f.index not in self._counted]
        missing = math.fsum(gains if self._counted else [self.essential_gain, *gains])
        return Quality(self.energy, max(self.residual + missing, 0.0), complete=self.missing == 0)
