"""A worker without Ray: it obeys the latest coordinator, and takes no manifest but its job's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from holoray.actors import watchdog
from holoray.actors.goals import count_with, goals
from holoray.actors.locks import new_job, remove_job
from holoray.actors.messages import Assign, Kind
from holoray.actors.worker import JobSpec, Worker
from holoray.errors import IntegrityError, WorkerLostError
from holoray.pipelines.sealed_store import SealedStore


@pytest.fixture
def spec(sealed: SealedStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobSpec]:
    monkeypatch.setattr(watchdog, "watch_job", lambda names: None)
    job = new_job()
    yield JobSpec(job, sealed.store, sealed.root, strict=False)
    remove_job(job)


@pytest.mark.fault("stale-answer")
def test_a_coordinator_of_the_past_is_refused(spec: JobSpec, sealed: SealedStore) -> None:
    worker = Worker(spec, "w0", "node", np.frombuffer(sealed.manifest.encoded, np.uint8))
    assert worker.hello().error is None
    (goal,) = goals(sealed.manifest, (1.0,))
    slot = (goal.new[0].tensor, goal.new[0].slot)
    worker.enlist(1)
    assert worker.do(1, Assign(Kind.INGEST, "w0", 1, 1, units=goal.new[:1])).error is None
    worker.enlist(2)
    refused = worker.do(1, Assign(Kind.INGEST, "w0", 2, 1, units=goal.new[1:2]))
    assert isinstance(refused.error, WorkerLostError)
    with pytest.raises(WorkerLostError):
        worker.export(1, 1, [slot])
    with pytest.raises(WorkerLostError):
        worker.retire(1, 1)
    worker.enlist(1)  # late: it stays with the second
    survey = worker.do(2, Assign(Kind.SURVEY, "w0", 1, 1)).survey
    assert survey is not None
    assert survey.making.slots == {slot: count_with(goal.new[0])}


def test_another_manifest_is_no_manifest_of_the_job(spec: JobSpec, sealed: SealedStore) -> None:
    encoded = np.frombuffer(sealed.manifest.encoded, np.uint8).copy()
    encoded[100] ^= 1
    error = Worker(spec, "w0", "node", encoded).hello().error
    assert isinstance(error, IntegrityError)


@pytest.mark.fault("replayed")
def test_a_node_with_another_store_under_the_path_does_not_take_part(spec: JobSpec, sealed: SealedStore) -> None:
    other = replace(spec, root="sha256:" + "0" * 64)
    error = Worker(other, "w0", "node", np.frombuffer(sealed.manifest.encoded, np.uint8)).hello().error
    assert isinstance(error, IntegrityError)
    assert "began with" in str(error)
