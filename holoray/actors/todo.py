"""What is left to do for a generation: derived, whenever it is asked, from what the nodes hold."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from holoray.actors.goals import Goal, count_with, first_layer, needs_sealing
from holoray.actors.messages import Group, Holdings, Kind, Shard, Slot, Survey
from holoray.actors.roster import ANYWHERE, Node, Policy, Task, slots_of
from holoray.manifest import Manifest
from holoray.pipelines.plan import Unit, batches

T = TypeVar("T")


class Todo:
    """The work of one generation; `last` is the goal of the one before, if there is one.

    `expected` is the number of workers that batches are cut for.
    """

    def __init__(self, manifest: Manifest, goal: Goal, last: Goal | None, policy: Policy, expected: int) -> None:
        self.goal = goal
        self._last = last
        self._manifest = manifest
        self._policy = policy
        self._expected = expected
        self._new = dict(zip(slots_of(goal.new), goal.new, strict=True))
        self._stateful = _stateful(manifest, goal)
        self._slot_bytes = [_slot_bytes(manifest, t) for t in range(len(manifest.tensors))]

    def learn(self, node: Node, found: Survey) -> None:
        """Take over what a survey of the node found."""
        last, making = found.last, found.making
        node.known, node.shard = True, found.shard
        node.base = set()
        if self._last is not None:
            stale = set(_stateful(self._manifest, self._last)) - last.sealed
            whole = _whole(last, self._last)
            node.base = {slot for slot in whole if slot[0] not in stale and node.takes(slot)}
        node.have = {slot for slot in _whole(making, self.goal) if node.takes(slot)}
        node.sealed = set(making.sealed)

    def alone(self, name: str, node: Node, shard: Shard | None) -> Iterator[Task]:
        """What a node that is to hold a shard does next, none of which another node could do for it."""
        if node.shard != shard:
            yield Task(Kind.SURVEY, name, shard=shard)
            return
        filling = [*self.ingest([node], name), *self.combine(name, {name: node}, together=False)]
        yield from filling or self.seal(name, node)

    def ingest(self, nodes: Collection[Node], where: str = ANYWHERE) -> Iterator[Task]:
        """Slots that no node has: those with new fragments, and those that no node has of the last generation either.

        A task refines either all its slots, which only a node with all of them in the last generation can, or none.
        """
        held = held_anywhere(nodes)
        groups: dict[tuple[int, ...], list[Unit]] = {(): []}
        for slot, whole in self.goal.whole.items():
            if slot in held or not any(node.takes(slot) for node in nodes):
                continue
            bases = tuple(number for number, node in enumerate(nodes) if slot in node.base)
            unit = self._new.get(slot) if bases else whole
            if unit is not None and unit.fragments:  # else it is carried by whoever has it
                groups.setdefault(bases if first_layer(unit) else (), []).append(unit)
        total = sum(unit.stored_bytes for group in groups.values() for unit in group)
        workers = self._expected if where == ANYWHERE else 1
        share = total // (workers * self._policy.batches_per_worker)
        for group in groups.values():
            for batch in batches(group, min(share, self._policy.batch_bytes)):
                yield Task(Kind.INGEST, where, units=batch)

    def again(self, task: Task, nodes: Collection[Node]) -> Iterator[Task]:
        """An INGEST that failed as it can be done now: what none of these nodes could refine begins from nothing."""
        if not task.refines:
            yield from [task] if task.units else []
            return
        base = set().union(*(node.base for node in nodes))
        kept = tuple(unit for unit in task.units if (unit.tensor, unit.slot) in base)
        begun = tuple(self.goal.whole[slot] for slot in slots_of(task.units) if slot not in base)
        yield from (replace(task, units=units) for units in (kept, begun) if units)

    def combine(self, name: str, nodes: Mapping[str, Node], *, together: bool) -> Iterator[Task]:
        """What one of the nodes lacks, by where it is to be had; what nobody has yet is being carried somewhere.

        `together`: only what it has itself, in the last generation; `group` sees to the rest.
        """
        node = nodes[name]
        groups: dict[str, list[Slot]] = {}
        for slot in self.lacking(node):
            if (slot in node.base and slot not in self._new) or not self.goal.whole[slot].fragments:
                groups.setdefault(name, []).append(slot)
                continue
            peer = next((peer for peer, other in nodes.items() if slot in other.have), None)
            if peer is not None and not together:
                groups.setdefault(peer, []).append(slot)
        for source, slots in groups.items():
            kind = Kind.CARRY if source == name else Kind.TRANSFER
            for group in cut(slots, [self._slot_bytes[t] for t, _ in slots], self._policy.copy_bytes):
                yield Task(kind, name, slots=tuple(group), source=source)

    def group(self, nodes: Mapping[str, Node], number: int) -> Iterator[Task]:
        """A task for each of the nodes, after which all of them have what one of them has; none if all is in place."""
        ranks, lacking = list(nodes.values()), {name: set(self.lacking(node)) for name, node in nodes.items()}
        wanted = set().union(*lacking.values())
        holders = {slot: _holder(slot, ranks) for slot in self.goal.whole if slot in wanted}
        owners = {slot: rank for slot, rank in holders.items() if rank is not None}
        if not owners:
            return
        group = Group(number, len(ranks), tuple(owners), tuple(owners.values()))
        for rank, name in enumerate(nodes):
            slots = tuple(slot for slot in owners if slot in lacking[name])
            yield Task(Kind.COMBINE, name, slots=slots, group=group, rank=rank)

    def lacking(self, node: Node) -> list[Slot]:
        """Slots of the generation that a node is to hold and does not."""
        return [slot for slot in self.goal.whole if slot not in node.have and node.takes(slot)]

    def seal(self, name: str, node: Node) -> Iterator[Task]:
        """Tensors of a node that hold all their slots and are not up to date with them; at least one task a node."""
        todo = [t for t in self._stateful if t not in node.sealed and (node.shard is None or t in node.shard.tensors)]
        for group in cut(todo, [self._manifest.tensors[t].spec.nbytes for t in todo], self._policy.copy_bytes):
            yield Task(Kind.SEAL, name, tensors=tuple(group))
        if not todo and not node.closed:
            yield Task(Kind.SEAL, name)

    def new_bytes(self, slots: Collection[Slot]) -> int:
        """Stored bytes of the generation's new fragments in these slots."""
        return sum(unit.stored_bytes for unit in self.goal.new if (unit.tensor, unit.slot) in slots)


def held_anywhere(nodes: Iterable[Node]) -> set[Slot]:
    """Slots of the generation in the making that some node holds."""
    return set().union(*(node.have for node in nodes))


def _whole(found: Holdings, goal: Goal) -> set[Slot]:
    """Slots that hold what the goal wants of them: no more, nor what was left when something had been lost."""
    return {slot for slot, count in found.slots.items() if slot in goal.whole and count == count_with(goal.whole[slot])}


def _holder(slot: Slot, nodes: Sequence[Node]) -> int | None:
    return next((rank for rank, node in enumerate(nodes) if slot in node.have), None)


def _stateful(manifest: Manifest, goal: Goal) -> list[int]:
    return sorted({t for t, _ in goal.whole if needs_sealing(manifest.codecs[t])})


def _slot_bytes(manifest: Manifest, tensor: int) -> int:
    entry = manifest.tensors[tensor]
    return entry.spec.nbytes // max(1, len({f.slot for f in entry.fragments}))


def cut(items: Sequence[T], sizes: Iterable[int], limit: int) -> Iterator[list[T]]:
    """Consecutive items in groups of at most `limit` (a larger item alone)."""
    group: list[T] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(item)
        total += size
    if group:
        yield group
