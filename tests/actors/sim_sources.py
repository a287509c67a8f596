"""What simulated sources have no honest copy of."""

from __future__ import annotations

import random

from holoray.manifest import Manifest
from holoray.pipelines.curve import Key
from holoray.pipelines.plan import Unit


class SimSources:
    """`corrupt`: fragments that are bad in every source, a share of those that may be skipped; for each worker a share,
    `rotten`, is bad besides, in all of its own.
    """

    def __init__(self, manifest: Manifest, rng: random.Random, corrupt: float, rotten: float) -> None:
        self._manifest, self._rotten = manifest, rotten
        entries = enumerate(manifest.tensors)
        optional = [(t, f.index) for t, entry in entries if not entry.mandatory for f in entry.fragments]
        self.corrupt = {key for key in optional if corrupt and rng.random() < corrupt}
        self.skips = bool(corrupt or rotten)

    def missed(self, worker: str, unit: Unit) -> set[Key]:
        """Fragments of a unit that a worker cannot read, and what requires one of these."""
        missed = set[Key]()
        for fragment in unit.fragments:
            key = unit.tensor, fragment.index
            if self._is_bad(worker, key) or (unit.tensor, fragment.requires) in missed:
                missed.add(key)
        return missed

    def _is_bad(self, worker: str, key: Key) -> bool:
        if key in self.corrupt or self._manifest.tensors[key[0]].mandatory:
            return key in self.corrupt
        return random.Random(f"{worker} {key}").random() < self._rotten
