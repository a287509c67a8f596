"""SECURITY.md says what the marks on the tests say, and every fault of the catalogue has a test."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from fault_catalogue import CATALOGUE
from security_table import BEGIN, END, REPOSITORY, SECURITY, marked_tests, table, with_table

MARKED = marked_tests(REPOSITORY / "tests")


@pytest.mark.parametrize("fault", [fault.name for fault in CATALOGUE])
def test_every_fault_has_a_test(fault: str) -> None:
    assert MARKED.get(fault), f"no test is marked with pytest.mark.fault({fault!r})"


def test_marks_name_faults_of_the_catalogue() -> None:
    names = Counter(fault.name for fault in CATALOGUE)
    assert MARKED.keys() <= names.keys()
    assert set(names.values()) == {1}


def test_the_document_is_up_to_date() -> None:
    text = SECURITY.read_text("utf-8")
    assert with_table(text, table(MARKED)) == text, "run `make security`"


def test_marks_are_found_and_others_are_not(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "test_x.py").write_text(
        "import pytest\n"
        "@pytest.mark.fault('a')\n@pytest.mark.slow\ndef test_one(): ...\n"
        "@pytest.mark.timeout(3)\ndef test_two(): ...\n"
        "@pytest.mark.fault('b')\nclass TestIt:\n    @pytest.mark.fault('a', 'b')\n    def test_three(self): ...\n"
    )
    (tmp_path / "helper.py").write_text("import pytest\n@pytest.mark.fault('c')\ndef test_no(): ...\n")
    assert marked_tests(tmp_path) == {
        "a": ["deep/test_x.py::test_one", "deep/test_x.py::TestIt::test_three"],
        "b": ["deep/test_x.py::TestIt", "deep/test_x.py::TestIt::test_three"],
    }


def test_only_the_table_is_rewritten() -> None:
    assert with_table(f"prose\n{BEGIN}old\n{END}more\n", "new\n") == f"prose\n{BEGIN}\nnew\n\n{END}more\n"
    with pytest.raises(ValueError, match="unpack"):
        with_table("no comments", "new\n")
