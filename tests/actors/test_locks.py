"""Locks tell who lives; what nobody lives to use is removed, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from warming import until

from holoray.actors import locks, watchdog
from holoray.actors.locks import Names, hold_lock, is_held, join_job, new_job, remove_job, remove_node, sweep
from holoray.actors.shared_memory import create_or_attach
from holoray.errors import WorkerLostError


@pytest.fixture
def names() -> Iterator[Names]:
    job = new_job()
    yield Names(job, "node")
    remove_job(job)


def hold_in_child(path: Path) -> subprocess.Popen[str]:
    code = "import sys, time; from holoray.actors.locks import *; hold_lock(Path(sys.argv[1])); "
    code += "print('held', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


def test_the_lock_of_a_process_tells_whether_it_lives(names: Names) -> None:
    path = names.lock("w0")
    assert not is_held(path)
    child = hold_in_child(path)
    try:
        assert is_held(path)
        with pytest.raises(WorkerLostError):
            locks.await_gone(path, timeout_s=0.05)
    finally:
        child.kill()
        locks.await_gone(path)
        child.communicate()
    assert not is_held(path)


def test_who_holds_a_lock_can_be_ended_though_it_is_stopped(names: Names) -> None:
    child, other = (hold_in_child(names.lock(process)) for process in ("w0", "w1"))
    try:
        child.send_signal(signal.SIGSTOP)
        locks.end_holder(names.lock("w0"), child.pid)
        assert child.wait(timeout=30) == -signal.SIGKILL
        locks.end_holder(names.lock("w0"), other.pid)  # as if the number had been given to another
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(timeout=0.5)
    finally:
        for process in (child, other):
            process.kill()
            process.communicate()


@pytest.mark.fault("orphans")
def test_sweep_removes_dead_jobs_and_only_those() -> None:
    dead, alive = Names(new_job(), "n"), Names(new_job(), "n")
    for job in (dead, alive):
        create_or_attach(job.segment(1), 10)
    lock = hold_lock(alive.lock("driver"))
    os.close(hold_lock(dead.lock("driver")))
    try:
        swept = sweep()
        assert dead.job in swept
        assert alive.job not in swept
        assert alive.segment(1).exists()
        assert not dead.segment(1).exists()
    finally:
        os.close(lock)
        remove_job(alive.job)
    assert not list(locks.DIRECTORY.glob(f"holoray-{alive.job}-*"))


def test_nobody_waits_for_a_foreign_job_that_is_stopped_while_it_joins() -> None:
    foreign = Names(new_job(), "n")
    guard = hold_lock(foreign.guard)
    with ThreadPoolExecutor(1) as pool:
        swept = pool.submit(sweep)
        try:
            assert foreign.job not in swept.result(timeout=20)
            assert foreign.guard.exists()
        finally:
            os.close(guard)
    assert foreign.job in sweep()


def test_a_node_is_cleared_unless_a_worker_lives_there(names: Names) -> None:
    other = Names(names.job, "other")
    create_or_attach(names.segment(1), 10)
    create_or_attach(other.segment(1), 10)
    lock = join_job(names, "w0")
    assert not remove_node(names)
    assert names.segment(1).exists()
    os.close(lock)
    assert remove_node(names)
    assert not names.files
    assert other.segment(1).exists()


@pytest.mark.fault("orphans")
def test_a_watchdog_outlives_the_workers_of_a_node_and_removes_what_they_leave(names: Names) -> None:
    child = hold_in_child(names.lock("w0"))  # first: what nobody holds is swept by any worker that starts meanwhile
    create_or_attach(names.segment(1), 10)
    watchdog.watch_job(names, linger_s=0.1)
    until(lambda: is_held(names.lock("watchdog")))
    time.sleep(2 * watchdog.POLL_S)
    assert names.segment(1).exists(), "a worker lives"
    child.kill()
    child.communicate()
    until(lambda: not names.files)


def test_a_worker_that_is_back_in_time_keeps_what_is_there(names: Names) -> None:
    create_or_attach(names.segment(1), 10)
    os.close(join_job(names, "w0"))  # it died
    watchdog.watch_job(names, linger_s=3600.0)
    until(lambda: is_held(names.lock("watchdog")))
    time.sleep(2 * watchdog.POLL_S)
    assert names.segment(1).exists()


@pytest.mark.fault("orphans")
def test_a_directory_goes_with_who_holds_it(tmp_path: Path) -> None:
    kept, gone = tmp_path / "kept", tmp_path / "gone"
    for directory in (kept, gone):
        (directory / "session").mkdir(parents=True)
    held = watchdog.watch_directory(str(kept))
    os.close(watchdog.watch_directory(str(gone)))
    until(lambda: not gone.exists())
    assert kept.exists()
    os.close(held)
    until(lambda: not kept.exists())
