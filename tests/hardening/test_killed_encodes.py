"""An encode that is killed at any moment leaves the old store, the new one, or one that the next encode completes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import kills
import pytest

import holoray


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


@pytest.mark.soak
@pytest.mark.fault("killed-encode")
def test_kills_at_every_step_and_two_hundred_random_moments(tmp_path: Path) -> None:
    found = run(tmp_path, "--every", "1", "--random", "200")
    assert found.total() > 500
    assert set(found) >= {"store-old", "store-none", "store-new", "nothing-none", "nothing-new"}
