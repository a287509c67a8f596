"""Which tensors lie on which device: all on each, or a shard on each. A policy: no I/O, no clock, no randomness."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

from holoray.actors.messages import Shard
from holoray.errors import UsageError
from holoray.kernels.registry import state_nbytes
from holoray.manifest import Manifest

REPLICATE: Final = "replicate"
SHARD: Final = "shard"


@dataclass(frozen=True, slots=True)
class Placement:
    """What a user chose. `pins`: (glob, number of a shard) of tensors that are to lie there; the first match wins.

    Raises UsageError for a choice without meaning.
    """

    kind: str = REPLICATE
    pins: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in (REPLICATE, SHARD):
            raise UsageError(f"unknown placement {self.kind!r}", hint=f"choose one of {REPLICATE}, {SHARD}")
        if self.pins and not self.is_sharded:
            raise UsageError("places of tensors are for shards: here every device gets all", hint="add placement shard")

    @property
    def is_sharded(self) -> bool:
        return self.kind == SHARD

    @classmethod
    def parse(cls, kind: str, texts: Iterable[str]) -> Self:
        """From texts like `GLOB=NUMBER`."""
        return cls(kind, tuple(_parse_pin(text) for text in texts))

    def pinned(self, manifest: Manifest, count: int) -> dict[int, int]:
        """The shard of each tensor that a pattern names.

        Raises UsageError for a shard that is none of `count`, or a pattern that no tensor has.
        """
        names = [entry.spec.name for entry in manifest.tensors]
        for glob, number in self.pins:
            if not any(fnmatch.fnmatchcase(name, glob) for name in names):
                raise UsageError(f"{glob}={number}: no tensor has such a name", hint="see `holoray inspect`")
            if not 0 <= number < count:
                raise UsageError(
                    f"{glob}={number}: there is no shard {number}",
                    hint=f"shards count from 0 to {count - 1}: there is one for each device",
                )
        found = ((t, self._pin(name)) for t, name in enumerate(names))
        return {t: number for t, number in found if number is not None}

    def _pin(self, name: str) -> int | None:
        return next((number for glob, number in self.pins if fnmatch.fnmatchcase(name, glob)), None)


def _parse_pin(text: str) -> tuple[str, int]:
    glob, _, number = text.rpartition("=")
    if not glob or not (number.isascii() and number.isdecimal()):
        raise UsageError(f"place {text!r} is not of the form GLOB=NUMBER", hint="e.g. '*.embed*=0'")
    return glob, int(number)


def deal(sizes: Mapping[int, int], loads: Sequence[int]) -> dict[int, int]:
    """The place of each tensor: greedy, the largest first, each to where least is so far.

    `sizes`: bytes of each tensor; `loads`: bytes that each place has already. Places that began empty differ by no
    more than the largest tensor (longest processing time first; Graham, 1969).
    """
    totals = list(loads)
    places: dict[int, int] = {}
    for tensor in sorted(sizes, key=lambda t: (-sizes[t], t)):
        places[tensor] = min(range(len(totals)), key=lambda place: (totals[place], place))
        totals[places[tensor]] += sizes[tensor]
    return places


class Shards:
    """Who is to hold what: every tensor has one holder, or is vacant. All else is derived from that.

    `sizes`: bytes that each tensor takes; `count`: devices that are expected, each with a shard of about the same size;
    `pinned`: tensors whose shard is given. `reign`: of the coordinator; what a later one gives counts more.
    """

    def __init__(
        self, sizes: Sequence[int], count: int, pinned: Mapping[int, int] | None = None, reign: int = 1
    ) -> None:
        self._sizes, self._count, self._reign, self._given = sizes, count, reign, 0
        self._held: dict[str, Shard] = {}
        places = dict(pinned or {})
        loads = [0] * count
        for tensor, place in places.items():
            loads[place] += sizes[tensor]
        places |= deal({t: size for t, size in enumerate(sizes) if t not in places}, loads)
        self._dealt = [frozenset(t for t in places if places[t] == place) for place in range(count)]

    @classmethod
    def of(cls, manifest: Manifest, count: int, placement: Placement, reign: int = 1) -> Self:
        """The shards of a manifest's tensors; a tensor takes its own bytes and those of its state."""
        pairs = zip(manifest.tensors, manifest.codecs, strict=True)
        sizes = [entry.spec.nbytes + state_nbytes(entry.spec, codec) for entry, codec in pairs]
        return cls(sizes, count, placement.pinned(manifest, count), reign)

    def of_node(self, node: str) -> Shard | None:
        """What a node is to hold; None for one that was not seated."""
        return self._held.get(node)

    def claim(self, node: str, shard: Shard | None) -> None:
        """A node says what it was told to hold. Of two who were told the same, the later one holds it."""
        if shard is None or node in self._held:
            return
        kept = set(shard.tensors)
        for other, held in self._held.items():
            if held.number > shard.number:
                kept -= held.tensors
            elif held.tensors & kept:
                self._held[other] = Shard(held.number, held.tensors - kept)
        self._held[node] = Shard(shard.number, frozenset(kept))

    def seat(self, node: str) -> None:
        """Give a vacant shard to a node that has none; nothing, if there is none: it is spare."""
        seated = self._held.get(node)
        if seated and seated.tensors:
            return
        vacant = self._vacant()
        if vacant or seated is None:
            self._give(node, vacant[0] if vacant else frozenset())

    def vacate(self, node: str) -> None:
        """A node is gone."""
        self._held.pop(node, None)

    @property
    def are_all_held(self) -> bool:
        """Whether no tensor is vacant."""
        return sum(len(shard.tensors) for shard in self._held.values()) == len(self._sizes)

    def are_enough(self, nodes: Collection[str]) -> bool:
        """Whether all is held, or will be: one of these nodes is spare, or was not seated yet."""
        return self.are_all_held or any(not self._tensors_of(node) for node in nodes)

    def spread(self, nodes: Collection[str]) -> bool:
        """Deal what is vacant to those of these nodes that are seated; False if none is."""
        over = [node for node in nodes if node in self._held]
        if not over:
            return False
        sizes = {tensor: self._sizes[tensor] for shard in self._vacant() for tensor in shard}
        places = deal(sizes, [self._nbytes(self._tensors_of(node)) for node in over])
        for place, node in enumerate(over):
            added = {tensor for tensor in places if places[tensor] == place}
            if added:
                self._give(node, self._tensors_of(node) | added)
        return True

    def _vacant(self) -> list[frozenset[int]]:
        """What nobody holds, as it was dealt, but in no more shards than devices are missing: the smallest together."""
        if self.are_all_held:
            return []
        held = frozenset[int]().union(*(shard.tensors for shard in self._held.values()))
        vacant = [left for shard in self._dealt if (left := shard - held)]
        missing = max(1, self._count - sum(bool(shard.tensors) for shard in self._held.values()))
        while len(vacant) > missing:
            vacant.sort(key=self._nbytes, reverse=True)
            vacant[-2:] = [vacant[-2] | vacant[-1]]
        return vacant

    def _give(self, node: str, tensors: frozenset[int]) -> None:
        self._given += 1
        self._held[node] = Shard((self._reign, self._given), tensors)

    def _tensors_of(self, node: str) -> frozenset[int]:
        return self._held[node].tensors if node in self._held else frozenset()

    def _nbytes(self, tensors: Iterable[int]) -> int:
        return sum(self._sizes[tensor] for tensor in tensors)
