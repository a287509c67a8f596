"""A worker: does one task at a time in the segments of its node, and pulls the data itself."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash

from holoray.actors import locks, watchdog
from holoray.actors.accelerator import Accelerator
from holoray.actors.goals import count_with
from holoray.actors.locks import Names
from holoray.actors.messages import Assign, Kind, Slot, Survey
from holoray.actors.placement import Placement
from holoray.actors.segment import NodeMemory
from holoray.actors.slot_memory import SlotMemory
from holoray.errors import IntegrityError, UsageError, WorkerLostError
from holoray.integrity import format_root
from holoray.kernels import registry
from holoray.kernels.accumulator import Accumulator
from holoray.manifest import Manifest, read_manifest
from holoray.pipelines.curve import Key
from holoray.pipelines.fault_policy import FaultPolicy
from holoray.pipelines.fragment_pipeline import FragmentPipeline
from holoray.pipelines.meter import Meter, Tally, stage
from holoray.pipelines.plan import Unit
from holoray.stores import ROOT, Store

Bytes = npt.NDArray[np.uint8]
_MAX_ROOT_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What every process of a job must know: the store, the root it had, whether sha256 is checked, files out of reach.

    `lost` maps numbers of fragment files to why they cannot be read: nobody plans with them. `accelerator`: weights go
    to devices, one a worker, as `placement` says; without one, to the memory of nodes. `fault_policy`: whether
    fragments without an honest copy are skipped, and how many may be.
    """

    job: str
    store: Store
    root: str
    strict: bool
    lost: Mapping[int, str] = field(default_factory=dict)
    accelerator: Accelerator | None = None
    placement: Placement = field(default_factory=Placement)
    fault_policy: FaultPolicy = field(default_factory=FaultPolicy)

    def check_root(self) -> None:
        """Raise IntegrityError if this node sees another store than the one that the job began with."""
        found = self.store.read(ROOT, _MAX_ROOT_BYTES).decode("ascii", "replace").strip()
        if found != self.root:
            raise IntegrityError(
                f"{self.store.uri} has root {found}, but the warm-up began with {self.root}",
                hint="the store was replaced meanwhile, or another node sees another one under this path",
                source=self.store.uri,
            )

    def manifest(self, encoded: Bytes) -> Manifest:
        """The job's manifest: the driver read it for all, so that the origin is asked once."""
        content = encoded.tobytes()
        if format_root(content) != self.root:
            raise IntegrityError("the manifest was damaged on its way between nodes", source=self.store.uri)
        return read_manifest(content).without(self.lost)


@dataclass(frozen=True, slots=True)
class Hello:
    """What a worker says when it is ready, or why it never will be."""

    node: str
    pid: int
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Member:
    """A worker that has said hello: what a coordinator must know of it."""

    name: str
    handle: Any
    node: str
    pid: int
    ingests: bool


@dataclass(frozen=True, slots=True)
class Report:
    """What a task took and, of a SURVEY, found; `error` is why it failed, if it did.

    `combined_bytes`: of slots that came from other devices. `missed`: fragments without an honest copy, which were
    skipped, and what requires them.
    """

    tally: Tally = field(default_factory=Tally)
    survey: Survey | None = None
    error: Exception | None = None
    combined_bytes: int = 0
    missed: frozenset[Key] = frozenset()


class Worker:
    """Lives in a process of its own. Holds nothing that matters: all state is in the node's segments.

    It obeys one coordinator, the latest it has heard of: each has a number, its `reign`, and asks under that.
    """

    def __init__(self, spec: JobSpec, name: str, node: str, encoded: Bytes) -> None:
        self._spec = spec
        self._node = node
        self._names = Names(spec.job, node)
        self._lock = locks.join_job(self._names, name)
        self._encoded = encoded
        self._reign = 0
        self._gone: set[str] = set()
        self._meter = Meter()
        self._combined_bytes = 0
        self._missed = frozenset[Key]()

    def hello(self) -> Hello:
        """Get ready, and tidy up after dead jobs; an error is returned, not raised."""
        try:
            watchdog.watch_job(self._names)
            registry.warm_accumulators()
            locks.sweep()
            self._spec.check_root()
            manifest = self._spec.manifest(self._encoded)
            self._memory = self._make_memory(manifest)
            self._pipeline = FragmentPipeline(
                self._spec.store,
                manifest,
                strict=self._spec.strict,
                cores=self.cores,
                meter=self._meter,
                finalize=False,
                skip_corrupted=self._spec.fault_policy.skip_corrupted,
                device=self._memory.device,
                opens_frames=self._memory.opens_frames,
            )
        except Exception as error:
            return Hello(self._node, os.getpid(), error)
        return Hello(self._node, os.getpid())

    @property
    def cores(self) -> int:
        """To be kept busy by decoding."""
        return 1

    def _make_memory(self, manifest: Manifest) -> SlotMemory:
        return NodeMemory(manifest, self._names)

    def beat(self) -> None:
        """Say that the process lives; answered whatever it is busy with."""

    def enlist(self, reign: int) -> None:
        """From now on obey the coordinator of this reign and none before: what those still ask is refused."""
        self._reign = max(self._reign, reign)

    def do(
        self, reign: int, task: Assign, digest: int = 0, contents: Bytes | None = None, ticket: bytes = b""
    ) -> Report:
        """Do one task; for a TRANSFER with what `export` of the source gave, for a COMBINE with the group's ticket.

        Errors are returned, not raised.
        """
        self._combined_bytes, self._missed = 0, frozenset()
        survey: Survey | None = None
        error: Exception | None = None
        try:
            self._check_reign(reign)
            self._await_fenced(task.fence)
            if task.kind is Kind.SURVEY:
                survey = self._survey(task)
            else:
                self._memory.make(task.generation)
                self._perform(task, digest, contents)
                if task.kind is Kind.COMBINE:
                    self._combine(reign, task, ticket)
        except Exception as raised:
            error = raised
        return Report(self._meter.take(), survey, error, self._combined_bytes, self._missed)

    def export(self, reign: int, generation: int, slots: Sequence[Slot]) -> tuple[int, int, Bytes]:
        """Digest, size and contents of slots, for another node."""
        self._check_reign(reign)
        self._memory.make(generation)
        contents = self._memory.read(slots)
        return xxhash.xxh3_64_intdigest(contents.data), contents.nbytes, contents

    def retire(self, reign: int, generation: int) -> None:
        """Forget a generation that nobody needs any more."""
        self._check_reign(reign)
        self._memory.retire(generation)

    def _check_reign(self, reign: int) -> None:
        if reign < self._reign:
            raise WorkerLostError(f"a coordinator of the past asked: its reign was {reign}, now it is {self._reign}")

    def _perform(self, task: Assign, digest: int, contents: Bytes | None) -> None:
        tally = Tally()
        match task.kind:
            case Kind.INGEST:
                self._ingest(task.units)
            case Kind.CARRY:
                with stage(tally, "combine"):
                    self._memory.carry(task.held)
            case Kind.TRANSFER:
                with stage(tally, "combine"):
                    if contents is None or xxhash.xxh3_64_intdigest(contents.data) != digest:
                        raise IntegrityError("slots were damaged on their way between nodes")
                    self._memory.write(task.held, contents)
            case Kind.SEAL:
                with stage(tally, "finalize"):
                    self._memory.seal(task.tensors)
        self._meter.add(tally)

    def _survey(self, task: Assign) -> Survey:
        return self._memory.survey(task.generation)

    def _combine(self, reign: int, task: Assign, ticket: bytes) -> None:
        raise UsageError("only devices combine all at once")

    def _ingest(self, units: Sequence[Unit]) -> None:
        self._memory.prepare(units)
        width = self._memory.width(units, self._pipeline.threads)
        self._pipeline.run(units, _InPlace(self._memory), self._hold, width=width)
        self._missed = frozenset(
            (unit.tensor, fragment.index) for unit in units for fragment in unit.fragments[self._memory.finish(unit) :]
        )

    def _hold(self, unit: Unit) -> None:
        self._memory.hold((unit.tensor, unit.slot), count_with(unit))

    def _await_fenced(self, fence: Sequence[str]) -> None:
        """A killed process may go on for some milliseconds: write nothing before it is gone."""
        for name in fence:
            if name not in self._gone:
                locks.await_gone(self._names.lock(name))
                self._gone.add(name)


class _InPlace:
    """The pipeline's destination: accumulators over the node's segments, which stay open."""

    def __init__(self, memory: SlotMemory) -> None:
        self._memory = memory

    def open(self, tensor: int) -> Accumulator:
        return self._memory.accumulator(tensor)

    def close(self, tensor: int) -> None:
        """Nothing to do."""
