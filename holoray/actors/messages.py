"""What the brain hears (events) and what it says (commands): plain values, no Ray.

A *slot* is (position of the tensor, slot of its codec). Every command that asks a worker for something carries
an *epoch*, a number never used twice; the answer repeats it, and one whose epoch is not awaited is stale.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from holoray.pipelines.curve import Key
from holoray.pipelines.plan import Unit
from holoray.quality import Quality

Slot = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Holdings:
    """What the segment of a generation holds for sure: slots, with the number of their fragments; tensors sealed."""

    slots: Mapping[Slot, int] = field(default_factory=dict)
    sealed: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Shard:
    """The tensors that one device is to hold while others hold others.

    `number`: reign of the coordinator that gave it, and how many it had given. Of two devices that were given the same
    tensor it belongs to the one with the greater number.
    """

    number: tuple[int, int]
    tensors: frozenset[int] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Survey:
    """What a node holds, read from the node itself: of the last generation and of the one in the making.

    `shard`: what it was told to hold; None if it was told nothing, or holds everything.
    """

    last: Holdings = Holdings()
    making: Holdings = Holdings()
    shard: Shard | None = None


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    """A worker answers, and does nothing any more that another brain asked of it.

    Ids are never reused: a restarted worker joins under a new one.
    """

    now: float
    worker: str
    node: str
    ingests: bool = True
    """False for the zero-CPU receiver on a consumer's node, which takes what others ingested."""


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker died (or never came up); what it was doing is void."""

    now: float
    worker: str


@dataclass(frozen=True, slots=True)
class NodeLost:
    """A node and its segments are gone."""

    now: float
    node: str


@dataclass(frozen=True, slots=True)
class TaskDone:
    """What was asked under this epoch is in the segment of the worker's node; a SURVEY has what it found.

    `missed`: fragments that are not, since no source of this worker has an honest copy, or since they require one of
    these. Their slots hold what is left.
    """

    now: float
    worker: str
    epoch: int
    survey: Survey | None = None
    missed: frozenset[Key] = frozenset()


@dataclass(frozen=True, slots=True)
class Pulse:
    """A worker's process answers, whatever it is busy with."""

    now: float
    worker: str


@dataclass(frozen=True, slots=True)
class TaskFailed:
    """What was asked under this epoch raised; the slots concerned may hold anything."""

    now: float
    worker: str
    epoch: int
    error: Exception


@dataclass(frozen=True, slots=True)
class Taken:
    """The consumer has this generation in hand: the one before may go, the next may start."""

    now: float
    generation: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passes; deadlines are looked at."""

    now: float


Event = WorkerJoined | WorkerLost | NodeLost | Pulse | TaskDone | TaskFailed | Taken | Tick


class Kind(enum.Enum):
    """What a task does with its slots in the segment of the worker's node."""

    SURVEY = "survey"
    """Read from the node's segments what they hold: a node is what they say, whoever filled them. With a `shard`, it is
    told first what it is to hold from now on."""
    INGEST = "ingest"
    """Fetch, verify, decode: refine what the last generation holds, or start from nothing."""
    CARRY = "carry"
    """Copy slots without new fragments from the last generation's segment; one that is to hold none is cleared."""
    TRANSFER = "transfer"
    """Take over slots that another node holds."""
    COMBINE = "combine"
    """Exchange slots with all members of a group of devices at once: each slot comes from its one contributor."""
    SEAL = "seal"
    """Turn accumulated state into tensors where a codec needs that; the segment is whole afterwards."""


@dataclass(frozen=True, slots=True)
class Group:
    """Devices that combine together, once: `owners` are the ranks that contribute the `slots`, one each.

    `number` is used for no other attempt of this coordinator.
    """

    number: int
    size: int
    slots: tuple[Slot, ...] = field(repr=False)
    owners: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Assign:
    """One task for one worker.

    INGEST has `units` (their first fragment tells where refinement starts: at layer 0 from nothing); CARRY
    and TRANSFER have `slots`, TRANSFER the `source` worker as well; SEAL has `tensors`. COMBINE has the `slots` that
    the worker takes, and its `rank` in the `group`, whose members are all asked at the same time. `counts`: how many
    fragments each of the `slots` then holds. `fence` names dead workers of this node that must be gone for sure before
    anything is written.
    """

    kind: Kind
    worker: str
    epoch: int
    generation: int
    units: tuple[Unit, ...] = ()
    slots: tuple[Slot, ...] = ()
    counts: tuple[int, ...] = ()
    tensors: tuple[int, ...] = ()
    source: str = ""
    fence: tuple[str, ...] = ()
    group: Group | None = None
    rank: int = 0
    shard: Shard | None = None

    @property
    def held(self) -> dict[Slot, int]:
        """The slots, and how many fragments each then holds."""
        return dict(zip(self.slots, self.counts, strict=True))


@dataclass(frozen=True, slots=True)
class Abort:
    """The worker's part in a group is over: somebody else's failed, and it would wait in vain."""

    worker: str
    group: int


@dataclass(frozen=True, slots=True)
class Publish:
    """Every node holds this generation whole, but for what is `lost`; `final`: no other follows."""

    generation: int
    quality: Quality
    final: bool
    lost: frozenset[Key] = frozenset()


@dataclass(frozen=True, slots=True)
class Retire:
    """Nobody needs the segment of this generation on the worker's node any more."""

    worker: str
    generation: int


@dataclass(frozen=True, slots=True)
class Restart:
    """Kill what may be left of a worker and start another one in its place."""

    worker: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """It cannot go on; nothing is commanded afterwards."""

    error: Exception


Command = Assign | Abort | Publish | Retire | Restart | GiveUp
