"""A disk that is full at each single write: a CapacityError, no debris, and what was there before is still there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_store import bits
from write_faults import Steps, no_room, nothing, stepping

import holoray
from holoray.checkpoint import save_checkpoint
from holoray.errors import CapacityError
from holoray.pipelines.api import load_file
from holoray.stores import LocalStore
from holoray.tensor import Array

NEW: dict[str, Array] = {
    "weight": np.random.default_rng(0).standard_normal((70, 70)).astype(np.float32),
    "bias": np.arange(9, dtype=np.float32),
}
OLD: dict[str, Array] = {"weight": np.ones((80, 80), np.float32)}


def encode(path: Path, model: dict[str, Array] = NEW, steps: Steps | None = None) -> int:
    """Encode, replacing what is there; returns the steps it took."""
    with stepping(steps or Steps(-1, nothing)) as taken:
        holoray.encode(model, path, codec="raw", overwrite=True, threads=1)
    return taken.count


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.fault("disk-full")
def test_a_disk_that_is_full_from_each_step_of_an_encode_on(tmp_path: Path) -> None:
    count = encode(tmp_path / "rehearsal")
    assert count > 40
    whole = files(tmp_path / "rehearsal")
    for step in range(count):
        store = tmp_path / str(step)
        with pytest.raises(CapacityError) as caught:
            encode(store, steps=Steps(step, no_room, lasting=True))
        assert "free some space" in caught.value.hint
        assert not list(store.glob("*.partial")), step
        if step == count - 1:  # only the directory's fsync was left
            assert files(store) == whole
        else:
            assert not (store / "ROOT").exists(), step
            encode(store)
            assert files(store) == whole


@pytest.mark.fault("disk-full")
def test_a_disk_that_is_full_at_each_step_of_an_overwrite(tmp_path: Path) -> None:
    """Until the new store is whole the old one stays as it is; from there on the next writer ends what was begun."""
    encode(tmp_path / "rehearsal", OLD)
    old = files(tmp_path / "rehearsal")
    count = encode(tmp_path / "rehearsal")
    whole, left = files(tmp_path / "rehearsal"), []
    for step in range(count):
        store = tmp_path / str(step)
        encode(store, OLD)
        with pytest.raises(CapacityError):
            encode(store, steps=Steps(step, no_room))
        now = {name: data for name, data in files(store).items() if not name.startswith(".replacement")}
        left.append(now == old)
        if left[-1]:
            encode(store)
        else:
            assert "ROOT" not in now or now == whole, step
            with LocalStore(store).exclusive():
                pass
        assert files(store) == whole
    assert left == sorted(left, reverse=True)
    assert left.count(False) < 10


@pytest.mark.fault("disk-full")
def test_a_disk_that_is_full_at_each_step_of_a_load(tmp_path: Path) -> None:
    store = holoray.MemoryStore()
    holoray.encode(NEW, store)
    sealed, out = holoray.open(store), tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    with stepping(Steps(-1, nothing)) as steps:
        load_file(sealed, tmp_path / "rehearsal")
    assert steps.count == 6  # room, header, two tensors, fsync, rename
    for step in range(steps.count):
        with pytest.raises(CapacityError), stepping(Steps(step, no_room)):
            load_file(sealed, out)
        assert out.read_bytes() == b"old"
        assert sorted(os.listdir(tmp_path)) == ["out.safetensors", "rehearsal"]
    load_file(sealed, out)
    assert out.read_bytes() == (tmp_path / "rehearsal").read_bytes()


@pytest.mark.fault("disk-full")
def test_a_disk_that_is_full_at_each_step_of_a_save(tmp_path: Path) -> None:
    with stepping(Steps(-1, nothing)) as steps:
        save_checkpoint(tmp_path / "rehearsal", NEW)
    for step in range(steps.count):
        with pytest.raises(CapacityError), stepping(Steps(step, no_room)):
            save_checkpoint(tmp_path / "out", NEW)
        assert os.listdir(tmp_path) == ["rehearsal"]


@pytest.mark.fault("disk-full")
def test_dev_full_is_a_capacity_error(tmp_path: Path) -> None:
    (tmp_path / "fragments-00000.arrow.partial").symlink_to("/dev/full")
    with pytest.raises(CapacityError), LocalStore(tmp_path).create("fragments-00000.arrow") as file:
        file.write(bytes(100_000))
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, sys, pathlib
import holoray
from holoray.pipelines.api import load_file
checkpoint, store, work = map(pathlib.Path, sys.argv[1:4])
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit in map(int, sys.argv[4:]):
    for verb in (
        lambda: holoray.encode(checkpoint, work / str(limit)),
        lambda: load_file(holoray.open(store), work / "out"),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        try:
            verb()
            print(limit, "done")
        except holoray.CapacityError:
            print(limit, "capacity")
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
"""


@pytest.mark.fault("disk-full")
def test_files_of_limited_size(tmp_path: Path) -> None:
    """The kernel's own refusal (EFBIG): at the first byte, within a file, one byte before its end."""
    save_checkpoint(tmp_path / "in.safetensors", NEW)
    holoray.encode(tmp_path / "in.safetensors", tmp_path / "store")
    (tmp_path / "work").mkdir()
    largest = max(p.stat().st_size for p in (tmp_path / "store").iterdir())
    out_size = (tmp_path / "in.safetensors").stat().st_size
    limits = sorted({0, 1, 500, 4096, largest - 1, largest, out_size - 1, out_size})
    arguments = [str(tmp_path / name) for name in ("in.safetensors", "store", "work")]
    command = [sys.executable, "-c", LIMITED, *arguments, *map(str, limits)]
    environment = os.environ | {"PYTHONPATH": str(Path(holoray.__file__).parents[1])}
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    expected = [
        f"{limit} {'done' if limit >= size else 'capacity'}" for limit in limits for size in (largest, out_size)
    ]
    assert ran.stdout.splitlines() == expected
    assert not list((tmp_path / "work").rglob("*.partial"))
    assert bits(holoray.open(tmp_path / "work" / str(limits[-1])).load()) == bits(NEW)


def test_the_deed_is_done_once_or_from_there_on() -> None:
    for lasting, failing in ((False, [2]), (True, [2, 3, 4])):
        steps, failed = Steps(2, no_room, lasting=lasting), []
        for step in range(5):
            try:
                steps.take()
            except OSError:
                failed.append(step)
        assert failed == failing
