"""Errors travel between processes whole, and every one says what its exit code is."""

from __future__ import annotations

import inspect
import pickle

import pytest

from holoray import errors

ALL = [e for _, e in inspect.getmembers(errors, inspect.isclass) if issubclass(e, errors.HolorayError)]


@pytest.mark.parametrize("kind", ALL)
def test_errors_pickle_with_everything_they_know(kind: type[errors.HolorayError]) -> None:
    error = kind("it broke", hint="mend it", tensor="t", fragment=3, source="s3://x")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(again) is kind
    assert str(again) == str(error) == "it broke"
    assert (again.hint, again.tensor, again.fragment, again.source) == ("mend it", "t", 3, "s3://x")
    assert 1 <= kind.exit_code <= 6


def test_errors_are_also_what_python_expects() -> None:
    assert issubclass(errors.FormatError, ValueError)
    assert issubclass(errors.UsageError, ValueError)
    assert issubclass(errors.SourceError, OSError)
