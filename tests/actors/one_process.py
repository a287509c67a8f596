"""A warm-up on devices in one process, without Ray: the brain, and workers that do at once what they are asked."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Collection
from typing import Final

import numpy as np

from holoray.actors.device_worker import DeviceWorker
from holoray.actors.goals import count_with
from holoray.actors.losses import Losses
from holoray.actors.messages import (
    Assign,
    Command,
    GiveUp,
    Kind,
    Publish,
    Retire,
    Taken,
    TaskDone,
    TaskFailed,
    WorkerJoined,
)
from holoray.actors.placement import Placement
from holoray.actors.roster import Policy
from holoray.actors.state import Brain
from holoray.actors.worker import JobSpec
from holoray.errors import SourceError
from holoray.pipelines.plan import Unit
from holoray.pipelines.sealed_store import SealedStore

STUBBORN: Final = Policy(max_attempts=1000, batch_bytes=256 << 10)
_names: Final = itertools.count()  # of workers, none of which lives twice


class OneProcess:
    """Runs to the end; `look` is called with each generation, as a consumer is.

    `failing`: generations and numbers of units in them, counted over all devices, after which a task fails and leaves
    garbage in their place.
    """

    def __init__(
        self,
        spec: JobSpec,
        sealed: SealedStore,
        qualities: tuple[float, ...],
        look: Callable[[OneProcess, int], None],
        *,
        devices: int = 1,
        failing: Collection[tuple[int, int]] = (),
        policy: Policy = STUBBORN,
    ) -> None:
        self._look, self._failing, self._held = look, failing, Counter[int]()
        self.published: list[Publish] = []
        self.workers: dict[str, DeviceWorker] = {}
        assert spec.accelerator is not None
        self._brain = Brain(
            sealed.manifest,
            qualities,
            home=None,
            expected=devices,
            placement=spec.placement,
            in_place=spec.accelerator.in_place,
            losses=Losses(skips=spec.fault_policy.skip_corrupted),
            policy=policy,
        )
        self.error: Exception | None = None
        todo = deque[Command]()
        for _ in range(devices):
            name = f"p{next(_names)}"
            worker = DeviceWorker(spec, name, "node", np.frombuffer(sealed.manifest.encoded, np.uint8))
            assert worker.hello().error is None
            vars(worker)["_hold"] = self._hold_of(worker)
            self.workers[name] = worker
            todo += self._brain.handle(WorkerJoined(0.0, name, f"{name}@node"))
        while todo:
            todo += self._obey(todo.popleft())

    def _obey(self, command: Command) -> list[Command]:
        match command:
            case Assign():
                return self._do(command)
            case Publish(generation=generation):
                self.published.append(command)
                self._look(self, generation)
                return self._brain.handle(Taken(0.0, generation))
            case Retire(worker=name, generation=generation):
                self.workers[name].retire(0, generation)
            case GiveUp(error=error):
                self.error = error
        return []

    def _do(self, task: Assign) -> list[Command]:
        worker, digest, contents = self.workers[task.worker], 0, None
        if task.kind is Kind.TRANSFER:
            digest, _, contents = self.workers[task.source].export(0, task.generation, task.slots)
        report = worker.do(0, task, digest, contents)
        if report.error is not None:
            return self._brain.handle(TaskFailed(0.0, task.worker, task.epoch, report.error))
        return self._brain.handle(TaskDone(0.0, task.worker, task.epoch, report.survey, report.missed))

    def _hold_of(self, worker: DeviceWorker) -> Callable[[Unit], None]:
        def hold(unit: Unit) -> None:
            generation = self._brain.generation
            self._held[generation] += 1
            if (generation, self._held[generation]) in self._failing:
                accumulator = worker._device_memory.accumulator(unit.tensor)
                if accumulator.needs_finalize:  # its essential part is compared, not overwritten: nothing is left
                    accumulator.resume(unit.slot, 0)
                else:
                    accumulator.write_slot(unit.slot, np.full(accumulator.slot_nbytes(unit.slot), 0xA5, np.uint8))
                raise SourceError("lost half-way")
            worker._device_memory.hold((unit.tensor, unit.slot), count_with(unit))

        return hold


def sharded(choice: bool) -> Placement:
    return Placement("shard" if choice else "replicate")
