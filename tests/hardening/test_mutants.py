"""Ten thousand random mutants: each ends in a typed error or a well-formed result, none crashes, hangs or lies.

`make soak` tries a million; `mutants.py SEED` replays one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import mutants
import pytest
from mutant_farm import SCRIPT, harvest
from small_store import blobs, pristine, store_of

import holoray

MUTANTS = 10_000
A_MILLION = 1_000_000
WORKERS = len(os.sched_getaffinity(0))


def _run(count: int, directory: Path) -> Counter[str]:
    """Outcomes of `count` mutants by name; fails the test if there is a bad one."""
    found = harvest(range(count), directory, WORKERS)
    assert not found.failures, "\n".join(found.failures)
    return found.outcomes


def _check_reach(tally: Counter[str], count: int) -> None:
    """That the mutants got everywhere: a fuzzer whose mutants all end at the first check proves nothing."""
    assert tally.total() == count
    assert tally["well-formed"] >= count / 20
    assert tally["unchanged"] >= count / 50
    assert {"FormatError", "IntegrityError", "LimitError", "SourceError", "TruncatedError"} <= tally.keys()


@pytest.mark.fault("mutated")
@pytest.mark.timeout(600)
def test_ten_thousand_mutants(tmp_path: Path) -> None:
    _check_reach(_run(MUTANTS, tmp_path), MUTANTS)


@pytest.mark.fault("mutated")
@pytest.mark.soak
@pytest.mark.timeout(6 * 3600)
def test_a_million_mutants(tmp_path: Path) -> None:
    _check_reach(_run(A_MILLION, tmp_path), A_MILLION)


def test_a_mutant_is_its_seed() -> None:
    assert [mutants.mutant(seed) for seed in range(40)] == [mutants.mutant(seed) for seed in range(40)]


def test_the_harness_sees_another_tensor_behind_a_true_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """With verification switched off, flipped payloads load silently, and that is a failure."""
    pristine()
    monkeypatch.setattr("holoray.pipelines.fragment_pipeline.check_integrity", lambda *_, **__: None)
    files = blobs()
    entry = holoray.open(store_of(files)).manifest.tensors[3].fragments[0]
    name, data = "fragments-00000.arrow", bytearray(files["fragments-00000.arrow"])
    data[entry.offset] ^= 1
    with pytest.raises(AssertionError, match="true root"):
        mutants.outcome(0, files | {name: bytes(data)})


@pytest.mark.parametrize(
    ("crime", "status"),
    [
        ("os.kill(os.getpid(), 11)", -11),
        ("time.sleep(60)", -14),
        ("bytearray(8 << 30)", 1),
        ("1 / 0", 1),
    ],
)
def test_the_harness_names_the_seed_of_a_crime(crime: str, status: int, tmp_path: Path) -> None:
    """A crash, a hang, a runaway allocation and a foreign exception end a worker, and the report names the seed."""
    code = (
        "import os, sys, time, pathlib; import mutants\n"
        "mutants.ALARM_S = 2.0\n"
        "honest = mutants.outcome\n"
        f"mutants.outcome = lambda seed, files: {crime} if seed == 3 else honest(seed, files)\n"
        "mutants.run(range(6), pathlib.Path(sys.argv[1]))\n"
    )
    path = os.pathsep.join((str(SCRIPT.parent), str(Path(holoray.__file__).parents[1])))
    command = [sys.executable, "-c", code, str(tmp_path / "seed")]
    worker = subprocess.run(command, capture_output=True, check=False, env=os.environ | {"PYTHONPATH": path})
    assert worker.returncode == status
    assert int((tmp_path / "seed").read_text()) == 3
