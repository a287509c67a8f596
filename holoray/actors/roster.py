"""The brain's records: its bounds, tasks, workers and nodes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from holoray.actors.messages import Kind, Slot

T = TypeVar("T")

ANYWHERE: Final = ""


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
    """A worker that does not answer for so long is killed and replaced."""
    patience_s: float = 60.0
    """How long to go on without any worker, or without one on the consumer's node."""


@dataclass(frozen=True, slots=True)
class Task:
    """Work for one worker: of `node`, or of any; `failed_on` is who tried last in vain."""

    kind: Kind
    node: str
    slots: tuple[Slot, ...] = ()
    tensors: tuple[int, ...] = ()
    source: str = ""
    attempts: int = 0
    failed_on: str = ""


@dataclass(slots=True)
class Worker:
    """A living worker and its unanswered tasks by epoch, each with the time when it was given."""

    node: str
    ingests: bool
    flying: dict[int, tuple[Task, float]] = field(default_factory=dict)


@dataclass(slots=True)
class Node:
    """What a node holds: `base`, the last generation whole; of the one in the making, `have` and `sealed`."""

    base: bool = False
    have: set[Slot] = field(default_factory=set)
    sealed: set[int] = field(default_factory=set)
    closed: bool = False
    queue: deque[Task] = field(default_factory=deque)


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
