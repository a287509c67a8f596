"""Switches off each guard of the list once, in a copy of the code, and demands that its test turns red.

    python tests/guards/switch_off.py [PART OF A FILE OR TEXT...] [--jobs N]

First all named tests must be green as things are. Prints a table; a guard whose test stays green has survived.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from guard_list import GUARDS, Guard

REPOSITORY: Final = Path(__file__).resolve().parents[2]
PARTS: Final = ("holoray", "tests", "examples", "dashboards", "benchmarks", "pyproject.toml", "SECURITY.md")
GREEN, RED = 0, 1  # exit statuses of pytest; all others mean that no test ran


def copy_of_the_code(directory: Path) -> Path:
    """The code with its compiled kernels, whose cache goes by the times of the files."""
    for part in PARTS:
        source = REPOSITORY / part
        copy = shutil.copytree if source.is_dir() else shutil.copy2
        copy(source, directory / part)
    return directory


def run(where: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Exit status and output of pytest over tests of a copy."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(where)}
    ran = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False, env=environment)
    return ran.returncode, ran.stdout + ran.stderr


def named(tests: Sequence[str]) -> list[str]:
    """Arguments for pytest. A test of a base class is found in its subclasses, so files and names go separately."""
    files = sorted({f"tests/{test.partition('::')[0]}" for test in tests})
    names = sorted({test.partition("::")[2] for test in tests})
    return [*files, "-k", " or ".join(names)]


def switched_off(guard: Guard, where: Path) -> tuple[int | None, str]:
    """What its test says of a copy without the guard; the copy is mended again."""
    path = where / "holoray" / guard.file
    text = path.read_text("utf-8")
    before = path.stat()
    if text.count(guard.text) != 1:
        return None, f"stands {text.count(guard.text)} times in {guard.file}"
    path.write_text(text.replace(guard.text, guard.off), "utf-8")
    try:
        return run(where, named([guard.test]))
    finally:
        path.write_text(text, "utf-8")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def verdict(status: int | None, output: str) -> str:
    if status is not None and status < 0:
        return f"red: died of signal {-status}"
    if status == RED:
        failed = re.search(r"^(?:FAILED|ERROR) \S*?::(\S+)", output, re.MULTILINE)
        return f"red: {failed[1] if failed else '?'}"
    return "SURVIVED" if status == GREEN else f"NO TEST RAN ({status}): {output.strip()[-300:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="guards whose file or text contains one of these")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    guards = [g for g in GUARDS if not arguments.only or any(part in g.file + " " + g.text for part in arguments.only)]
    copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory() as directory:
        for job in range(arguments.jobs):
            copies.put(copy_of_the_code(Path(directory) / str(job)))
        status, output = run(Path(directory) / "0", named([g.test for g in guards]))
        if status != GREEN:
            sys.exit(f"not green to begin with:\n{output[-3000:]}")

        def judge(guard: Guard) -> str:
            where = copies.get()
            try:
                found = verdict(*switched_off(guard, where))
            finally:
                copies.put(where)
            print(f"{guard.file:30} {' '.join(guard.text.split())[:60]:60} {found}", flush=True)
            return found

        with ThreadPoolExecutor(arguments.jobs) as pool:
            verdicts = list(pool.map(judge, guards))
    bad = [v for v in verdicts if not v.startswith("red")]
    print(f"{len(guards)} guards, {len(guards) - len(bad)} turn a test red, {len(bad)} do not")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
