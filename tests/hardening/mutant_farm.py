"""Runs stretches of mutants in worker processes, and names the seed of each that must not be.

    python tests/hardening/mutant_farm.py COUNT [--first SEED] [--workers N]

A worker takes a batch of seeds in one process; one that dies (signal, alarm, exception) names its seed, and the batch
goes on behind it in a new process. `python tests/hardening/mutants.py SEED` replays a seed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import mutants

import holoray

SCRIPT = Path(mutants.__file__)
BATCH = 25_000
"""Mutants a process: starting one costs what some hundred mutants do, and a leak shall not add up for hours."""
MAX_FAILURES = 5


@dataclass
class Harvest:
    """What became of mutants: outcomes by name, and a text for each failure that begins with what replays it."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, other: Harvest) -> None:
        self.outcomes += other.outcomes
        self.failures += other.failures


def harvest(seeds: range, directory: Path, workers: int) -> Harvest:
    """Try all seeds; after some failures the rest is left. What a dead worker did before its death is not counted."""
    size = min(BATCH, -(-len(seeds) // workers))
    total = Harvest()
    with ThreadPoolExecutor(workers) as pool:
        cut = [seeds[at : at + size] for at in range(0, len(seeds), size)]
        for done in pool.map(lambda batch: _run_batch(batch, directory / f"seed-{batch.start}", total), cut):
            total.add(done)
            print(f"{total.outcomes.total():,} mutants", *done.failures, sep="\n", file=sys.stderr, flush=True)
    return total


def _run_batch(seeds: range, report: Path, total: Harvest) -> Harvest:
    found, start = Harvest(), seeds.start
    while start < seeds.stop and len(found.failures) + len(total.failures) < MAX_FAILURES:
        command = [sys.executable, str(SCRIPT), "--range", str(start), str(seeds.stop), "--report", str(report)]
        environment = os.environ | {"PYTHONPATH": str(Path(holoray.__file__).parents[1])}
        worker = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        found.outcomes += _tally(worker.stdout.splitlines())
        if worker.returncode == 0:
            break
        seed = int(report.read_text())
        found.failures.append(f"python {SCRIPT} {seed}  (exit status {worker.returncode})\n{worker.stderr[-2000:]}")
        start = seed + 1
    return found


def _tally(lines: Iterable[str]) -> Counter[str]:
    return Counter({name: int(count) for count, name in (line.split() for line in lines)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        seeds = range(arguments.first, arguments.first + arguments.count)
        found = harvest(seeds, Path(directory), arguments.workers)
    seconds = time.perf_counter() - start
    for name, count in found.outcomes.most_common():
        print(f"{count:9,} {name}")
    print(f"{found.outcomes.total():,} mutants in {seconds:,.0f} s: {found.outcomes.total() / seconds:,.0f} a second")
    print("\n".join(found.failures) or "none was bad")
    sys.exit(bool(found.failures))


if __name__ == "__main__":
    main()
