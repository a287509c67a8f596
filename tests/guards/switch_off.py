"""Switches off each guard of the list once, in a copy of the code, and demands that its test turns red.

    python tests/guards/switch_off.py [PART OF A FILE OR TEXT...] [--jobs N]

First all named tests must be green as things are. Prints a table; a guard whose test stays green has survived.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest
from guard_list import GUARDS, Guard

REPOSITORY: Final = Path(__file__).resolve().parents[2]
PARTS: Final = ("holoray", "tests", "examples", "dashboards", "benchmarks", "pyproject.toml", "SECURITY.md")
HEAVY: Final = (
    "hypothesis",
    "ml_dtypes",
    "numba",
    "numpy",
    "pyarrow.fs",
    "scipy.fft",
    "scipy.linalg",
    "typer",
    "urllib3",
)
QUIET: Final = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # hypothesis is there before pytest
GREEN, RED, BROKEN = 0, 1, 70  # exit statuses of pytest; all others mean that no test ran


def copy_of_the_code(directory: Path) -> Path:
    """The code with its compiled kernels, whose cache goes by the times of the files."""
    directory.mkdir()
    for part in PARTS:
        source = REPOSITORY / part
        copy = shutil.copytree if source.is_dir() else shutil.copy2
        copy(source, directory / part)
    return directory


def run(where: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Exit status (negative for a signal) and output of pytest over tests of a copy, in a forked process."""
    log = where / "output.txt"
    child = os.fork()
    if child == 0:
        try:
            status = _pytest_in(where, tests, log)
        except BaseException:
            traceback.print_exc()
            status = BROKEN
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, log.read_text("utf-8", "replace")


def _pytest_in(where: Path, tests: Sequence[str], log: Path) -> int:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(where)
    sys.path.insert(0, str(where))
    os.environ["PYTHONPATH"] = str(where)  # for the processes that tests start
    return int(pytest.main(["-x", "-q", "--no-header", "-p", "no:cacheprovider", *QUIET, *tests]))


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


def share(guards: Sequence[Guard], where: Path) -> int:
    """Switch off some guards in one copy, a line for each; the number of those that turn nothing red."""
    bad = 0
    for guard in guards:
        found = verdict(*switched_off(guard, where))
        bad += not found.startswith("red")
        print(f"{guard.file:30} {' '.join(guard.text.split())[:60]:60} {found}", flush=True)
    return bad


def shared(guards: Sequence[Guard], jobs: int, directory: Path) -> int:
    """The same in as many processes as there are jobs, each with a copy of its own."""
    children = []
    for job in range(jobs):
        child = os.fork()
        if child == 0:
            os._exit(min(share(guards[job::jobs], directory / str(job)), 100))
        children.append(child)
    return sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="guards whose file or text contains one of these")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    guards = [g for g in GUARDS if not arguments.only or any(part in g.file + " " + g.text for part in arguments.only)]
    for name in HEAVY:  # once, before the forks: most of a short run of pytest is importing
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for job in range(arguments.jobs):
            copy_of_the_code(directory / str(job))
        status, output = run(directory / "0", named([g.test for g in guards]))
        if status != GREEN:
            sys.exit(f"not green to begin with:\n{output[-3000:]}")
        bad = shared(guards, arguments.jobs, directory)
    print(f"{len(guards)} guards, {len(guards) - bad} turn a test red, {bad} do not")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
