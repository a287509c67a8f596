"""An encode that is killed at any moment leaves the old store, the new one, or one that the next encode completes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import kills
import pytest

import holoray
from holoray.stores import MANIFEST, ROOT, LocalStore, fragment_file


def run(directory: Path, *arguments: str) -> Counter[str]:
    """Outcomes by what was there before and what is there now; in a process of its own, since forks want no threads."""
    environment = os.environ | {"PYTHONPATH": str(Path(holoray.__file__).parents[1])}
    command = [sys.executable, kills.__file__, str(directory), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    return Counter({name: int(number) for number, name in (line.split() for line in ran.stdout.splitlines())})


@pytest.mark.fault("killed-encode")
def test_kills_at_some_steps_and_random_moments(tmp_path: Path) -> None:
    found = run(tmp_path, "--every", "8", "--random", "6")
    assert found["store-old"] > found["store-none"] > 0
    assert found["nothing-none"] > 5
    assert found.total() > 40


class Killed(BaseException):
    """In the place of a signal that nobody survives."""


@pytest.mark.fault("killed-encode")
@pytest.mark.parametrize("moved", range(3))
def test_a_store_that_is_half_replaced_is_none(moved: int, tmp_path: Path) -> None:
    """The root moves last, and the next writer ends what was begun."""
    store, files, left = LocalStore(tmp_path), (ROOT, MANIFEST, fragment_file(0)), iter(range(moved))
    move = os.replace

    def move_some(source: Path, target: Path) -> None:
        if next(left, None) is None:
            raise Killed
        move(source, target)

    with pytest.raises(Killed), ExitStack() as while_moving, store.replacement() as fresh:
        for name in files:
            with fresh.create(name) as file:
                file.write(b"new")
        while_moving.enter_context(mock.patch.object(os, "replace", move_some))
    assert not store.exists(ROOT)
    with store.exclusive():
        assert sorted(store.names()) == sorted(files)


@pytest.mark.soak
@pytest.mark.fault("killed-encode")
def test_kills_at_every_step_and_two_hundred_random_moments(tmp_path: Path) -> None:
    found = run(tmp_path, "--every", "1", "--random", "200")
    assert found.total() > 500
    assert set(found) >= {"store-old", "store-none", "store-new", "nothing-none", "nothing-new"}
