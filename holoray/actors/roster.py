"""The brain's records: its bounds, tasks, workers and nodes."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final, Self

from holoray.actors.goals import first_layer
from holoray.actors.messages import Group, Kind, Shard, Slot
from holoray.errors import UsageError
from holoray.pipelines.plan import Unit

ANYWHERE: Final = ""


def slots_of(units: Iterable[Unit]) -> Iterator[Slot]:
    """The slots that units fill."""
    return ((unit.tensor, unit.slot) for unit in units)


@dataclass(frozen=True, slots=True)
class Policy:
    """Bounds of a warm-up."""

    in_flight: int = 2
    batch_bytes: int = 8 << 20
    """Stored bytes of an INGEST task at most; fewer where workers would get less than `batches_per_worker`."""
    batches_per_worker: int = 4
    copy_bytes: int = 32 << 20
    """Tensor bytes of a CARRY, TRANSFER or SEAL task."""
    max_attempts: int = 4
    """Tries of one task before its last error ends the warm-up."""
    max_restarts: int = 6
    """Workers replaced without any task finished in between."""
    task_timeout_s: float = 300.0
    """A worker whose task takes longer is killed and replaced."""
    combine_timeout_s: float = 120.0
    """A group of devices that takes longer to combine is given up; slots then travel one by one."""
    silence_s: float = 10.0
    """A worker whose process gives no sign of life for so long (stopped, deadlocked) is killed and replaced."""
    return_s: float = 15.0
    """How long what a node holds is waited for when it has no worker any more, before it is read again."""
    patience_s: float = 60.0
    """How long to go on without any worker, or without one on the consumer's node."""

    def __post_init__(self) -> None:
        for name in ("in_flight", "batch_bytes", "batches_per_worker", "copy_bytes", "max_attempts"):
            _check(name, getattr(self, name), 1)
        for name in ("max_restarts", "task_timeout_s", "combine_timeout_s", "silence_s", "return_s", "patience_s"):
            _check(name, getattr(self, name), 0)


def _check(name: str, value: float, least: int) -> None:
    if not value >= least:
        raise UsageError(f"{name} is {value}, but must be at least {least}", hint="leave it out for the usual bound")


@dataclass(frozen=True, slots=True)
class Task:
    """Work for one worker: of `node`, or of any; `failed_on` is who tried last in vain.

    `missed`: sources of a worker had no honest copy of some of it.
    """

    kind: Kind
    node: str
    units: tuple[Unit, ...] = ()
    slots: tuple[Slot, ...] = ()
    tensors: tuple[int, ...] = ()
    source: str = ""
    group: Group | None = None
    rank: int = 0
    shard: Shard | None = None
    attempts: int = 0
    failed_on: str = ""
    missed: bool = False

    @property
    def refines(self) -> bool:
        """Whether its units add to what the last generation holds; a task has units of one sort."""
        return bool(self.units and first_layer(self.units[0]))

    def without(self, held: Collection[Slot]) -> Self:
        """The task without the units of slots that are held already."""
        return replace(self, units=tuple(unit for unit in self.units if (unit.tensor, unit.slot) not in held))


@dataclass(slots=True)
class Worker:
    """A living worker, when it was last heard, and its unanswered tasks by epoch, each with when it was given."""

    node: str
    ingests: bool
    heard: float
    flying: dict[int, tuple[Task, float]] = field(default_factory=dict)


@dataclass(slots=True)
class Node:
    """What a node holds: slots of the last generation, `base`; of the one in the making, `have` and `sealed`.

    `known`: it was surveyed since its first worker joined. `alone_since`: it has no worker any more. `shard`: what it
    says that it was told to hold; None for everything.
    """

    base: set[Slot] = field(default_factory=set)
    have: set[Slot] = field(default_factory=set)
    sealed: set[int] = field(default_factory=set)
    closed: bool = False
    known: bool = False
    alone_since: float | None = None
    queue: deque[Task] = field(default_factory=deque)
    shard: Shard | None = None

    def takes(self, slot: Slot) -> bool:
        """Whether the slot is to be here."""
        return self.shard is None or slot[0] in self.shard.tensors

    def has_base_of(self, task: Task) -> bool:
        """Whether all that the task refines is here."""
        return not task.refines or self.base.issuperset(slots_of(task.units))
