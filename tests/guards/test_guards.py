"""The list of guards fits the code: `make mutants` has something to switch off, and a test to see it."""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from guard_list import GUARDS
from switch_off import REPOSITORY, verdict


@cache
def _tests_of(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text("utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: f"{guard.file}: {' '.join(guard.text.split())[:50]}")
def test_every_guard_is_there_once_and_so_is_its_test(guard: tuple[str, str, str, str]) -> None:
    file, text, off, test = guard
    assert (REPOSITORY / "holoray" / file).read_text("utf-8").count(text) == 1
    assert text != off
    where, _, name = test.partition("::")
    assert name in _tests_of(REPOSITORY / "tests" / where)


def test_no_guard_is_listed_twice() -> None:
    assert [guard for guard, count in Counter((g.file, g.text, g.off) for g in GUARDS).items() if count > 1] == []


@pytest.mark.parametrize(
    ("status", "output", "expected"),
    [
        (1, "...\nFAILED tests/a/test_b.py::test_c[3] - boom\n", "red: test_c[3]"),
        (-11, "", "red: died of signal 11"),
        (0, "3 passed", "SURVIVED"),
        (5, "no tests ran", "NO TEST RAN (5): no tests ran"),
        (None, "stands 2 times in x.py", "NO TEST RAN (None): stands 2 times in x.py"),
    ],
)
def test_what_counts_as_red(status: int | None, output: str, expected: str) -> None:
    assert verdict(status, output) == expected
