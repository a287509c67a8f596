"""Writes the table fault -> behaviour -> tests into SECURITY.md, from the catalogue and the marks on tests.

python tests/security/security_table.py
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from fault_catalogue import CATALOGUE

REPOSITORY: Final = Path(__file__).resolve().parents[2]
SECURITY: Final = REPOSITORY / "SECURITY.md"
BEGIN: Final = "<!-- begin of the table: `make security` writes it -->\n"
END: Final = "<!-- end of the table -->\n"


def marked_tests(tests: Path) -> dict[str, list[str]]:
    """Tests by the fault that their mark names, as paths below `tests` and names, in order.

    Read from the sources, since importing them all takes half a minute: a mark is a decorator of a function or of a
    class, `pytest.mark.fault("a name", ...)`.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(tests.rglob("test_*.py")):
        for fault, test in _marks(ast.parse(path.read_text("utf-8"), str(path))):
            found[fault].append(f"{path.relative_to(tests).as_posix()}::{test}")
    return dict(found)


def _marks(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            for decorator in child.decorator_list:
                for fault in _faults_of(decorator):
                    yield fault, prefix + child.name
        if isinstance(child, ast.ClassDef):
            yield from _marks(child, f"{prefix}{child.name}::")


def _faults_of(decorator: ast.expr) -> Iterator[str]:
    if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.fault":
        for argument in decorator.args:
            yield ast.literal_eval(argument)


def table(tests: Mapping[str, Sequence[str]]) -> str:
    """The table in Markdown; a test is written by its file (below `tests/`) and its name."""
    lines = ["| fault | what happens | what you get | tests |", "|---|---|---|---|"]
    for fault in CATALOGUE:
        proofs = "<br>".join(f"`{test}`" for test in tests.get(fault.name, ()))
        lines.append(f"| {fault.name} | {fault.what} | {fault.behaviour} | {proofs} |")
    return "\n".join(lines) + "\n"


def with_table(text: str, new: str) -> str:
    """The document with another table between its two comments; raises ValueError where they are missing."""
    before, _ = text.split(BEGIN)
    _, after = text.split(END)
    return before + BEGIN + "\n" + new + "\n" + END + after


def main() -> None:
    SECURITY.write_text(with_table(SECURITY.read_text("utf-8"), table(marked_tests(REPOSITORY / "tests"))), "utf-8")


if __name__ == "__main__":
    main()
