"""Ten thousand random mutants: each ends in a typed error or a well-formed result, none crashes, hangs or lies.

Two worker processes loop over seeds; one that dies (signal, alarm, exception) names its seed and is started again
behind it. `mutants.py SEED` replays.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mutants
import pytest
from small_store import blobs, pristine, store_of

import holoray

SCRIPT = Path(mutants.__file__)
MUTANTS = 10_000
MANY_MUTANTS = 200_000
WORKERS = 2
MAX_FAILURES = 5


def _run_worker(start: int, end: int, report: Path) -> tuple[list[str], list[str]]:
    """Outcomes (as `COUNT NAME` lines) and failures of a stretch of seeds, however often its process dies."""
    outcomes: list[str] = []
    failures: list[str] = []
    while start < end and len(failures) < MAX_FAILURES:
        command = [sys.executable, str(SCRIPT), "--range", str(start), str(end), "--report", str(report)]
        environment = os.environ | {"PYTHONPATH": str(Path(holoray.__file__).parents[1])}
        worker = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        outcomes += worker.stdout.splitlines()
        if worker.returncode == 0:
            break
        seed = int(report.read_text())
        failures.append(f"python {SCRIPT} {seed}  (exit status {worker.returncode})\n{worker.stderr[-2000:]}")
        start = seed + 1
    return outcomes, failures


def _run(count: int, directory: Path) -> dict[str, int]:
    """Outcomes of `count` mutants by name; fails the test if there is a bad one."""
    share = -(-count // WORKERS)
    starts = range(0, count, share)
    with ThreadPoolExecutor(WORKERS) as pool:
        results = list(pool.map(lambda at: _run_worker(at, min(at + share, count), directory / f"seed-{at}"), starts))
    failures = [failure for _, failed in results for failure in failed]
    assert not failures, "\n".join(failures)
    tally: dict[str, int] = {}
    for line in (line for outcomes, _ in results for line in outcomes):
        number, name = line.split()
        tally[name] = tally.get(name, 0) + int(number)
    return tally


def _check_reach(tally: dict[str, int], count: int) -> None:
    """That the mutants got everywhere: a fuzzer whose mutants all end at the first check proves nothing."""
    assert sum(tally.values()) == count
    assert tally["well-formed"] >= count / 20
    assert tally["unchanged"] >= count / 50
    assert {"FormatError", "IntegrityError", "LimitError", "SourceError", "TruncatedError"} <= tally.keys()


@pytest.mark.timeout(600)
def test_ten_thousand_mutants(tmp_path: Path) -> None:
    _check_reach(_run(MUTANTS, tmp_path), MUTANTS)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_mutants(tmp_path: Path) -> None:
    _check_reach(_run(MANY_MUTANTS, tmp_path), MANY_MUTANTS)


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
