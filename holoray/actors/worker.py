"""A worker: does one task at a time in the segments of its node, and pulls the data itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import xxhash

from holoray.actors import shared_memory
from holoray.actors.messages import Assign, Kind, Slot
from holoray.actors.segment import NodeMemory
from holoray.actors.shared_memory import Names
from holoray.errors import IntegrityError
from holoray.kernels import registry
from holoray.kernels.accumulator import Accumulator
from holoray.pipelines.fragment_pipeline import FragmentPipeline
from holoray.pipelines.meter import Meter, Tally, stage
from holoray.pipelines.sealed_store import SealedStore
from holoray.stores import Store


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What every process of a job must know: the store, the root it had, and whether sha256 is checked."""

    job: str
    store: Store
    root: str
    strict: bool


@dataclass(frozen=True, slots=True)
class Hello:
    """What a worker says when it is ready, or why it never will be."""

    node: str
    pid: int
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What a task took; `error` is why it failed, if it did."""

    tally: Tally = field(default_factory=Tally)
    error: Exception | None = None


class Worker:
    """Lives in a process of its own. Holds nothing that matters: all state is in the node's segments."""

    def __init__(self, spec: JobSpec, name: str, node: str) -> None:
        self._spec = spec
        self._node = node
        self._names = Names(spec.job, node)
        self._lock = shared_memory.hold_lock(self._names.lock(name))
        self._gone: set[str] = set()
        self._meter = Meter()

    def hello(self) -> Hello:
        """Open the store and tidy up after dead jobs; an error is returned, not raised."""
        try:
            registry.warm_accumulators()
            shared_memory.sweep()
            sealed = open_expected(self._spec)
            self._pipeline = FragmentPipeline(
                sealed.store,
                sealed.manifest,
                strict=self._spec.strict,
                threads=1,
                meter=self._meter,
                finalize=False,
            )
            self._memory = NodeMemory(sealed.manifest, self._names)
        except Exception as error:
            return Hello(self._node, os.getpid(), error)
        return Hello(self._node, os.getpid())

    def do(self, task: Assign, digest: int = 0, contents: npt.NDArray[np.uint8] | None = None) -> Report:
        """Do one task; for a TRANSFER with what `export` of the source gave. Errors are returned, not raised."""
        error: Exception | None = None
        try:
            self._await_fenced(task.fence)
            self._memory.make(task.generation)
            self._perform(task, digest, contents)
        except Exception as raised:
            error = raised
        return Report(self._meter.take(), error)

    def export(self, generation: int, slots: Sequence[Slot]) -> tuple[int, int, npt.NDArray[np.uint8]]:
        """Digest, size and contents of slots, for another node."""
        self._memory.make(generation)
        contents = self._memory.read(slots)
        return xxhash.xxh3_64_intdigest(contents.data), contents.nbytes, contents

    def retire(self, generation: int) -> None:
        """Forget a generation that nobody needs any more."""
        self._memory.retire(generation)

    def remove_job(self) -> None:
        """Unlink the job's files on this host."""
        shared_memory.remove_job(self._spec.job)

    def _perform(self, task: Assign, digest: int, contents: npt.NDArray[np.uint8] | None) -> None:
        tally = Tally()
        match task.kind:
            case Kind.INGEST:
                for unit in task.units:
                    self._memory.prepare(unit)
                self._pipeline.run(task.units, _InPlace(self._memory))
            case Kind.CARRY:
                with stage(tally, "combine"):
                    for slot in task.slots:
                        self._memory.carry(slot)
            case Kind.TRANSFER:
                with stage(tally, "combine"):
                    if contents is None or xxhash.xxh3_64_intdigest(contents.data) != digest:
                        raise IntegrityError("slots were damaged on their way between nodes")
                    self._memory.write(task.slots, contents)
            case Kind.SEAL:
                with stage(tally, "finalize"):
                    self._memory.seal(task.tensors)
        self._meter.add(tally)

    def _await_fenced(self, fence: Sequence[str]) -> None:
        """A killed process may go on for some milliseconds: write nothing before it is gone."""
        for name in fence:
            if name not in self._gone:
                shared_memory.await_gone(self._names.lock(name))
                self._gone.add(name)


class _InPlace:
    """The pipeline's destination: accumulators over the node's segments, which stay open."""

    def __init__(self, memory: NodeMemory) -> None:
        self._memory = memory

    def open(self, tensor: int) -> Accumulator:
        return self._memory.accumulator(tensor)

    def close(self, tensor: int) -> None:
        """Nothing to do."""


def open_expected(spec: JobSpec) -> SealedStore:
    """The job's store; raises IntegrityError if it is not the one that the job began with."""
    sealed = SealedStore(spec.store)
    if sealed.root != spec.root:
        raise IntegrityError(
            f"{spec.store.uri} has root {sealed.root}, but the warm-up began with {spec.root}",
            hint="the store was replaced meanwhile, or another node sees another one under this path",
            source=spec.store.uri,
        )
    return sealed
