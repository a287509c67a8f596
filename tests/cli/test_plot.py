"""Drawings of quality curves: what they mark, any width, no colour, files, and what goes wrong."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import holoray
from holoray.cli.plot import CEILING_DB, lines_of, on_terminal, to_file
from holoray.errors import SourceError, UsageError
from holoray.pipelines.sealed_store import SealedStore
from holoray.tensor import Array

HOLORAY = [sys.executable, "-m", "holoray"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, model: dict[str, Array]) -> Path:
    """One codec by name, so that there are several."""
    path = tmp_path_factory.mktemp("plots") / "store"
    holoray.encode(model, path, pattern={"layers.0.mlp*": "spectral", "layers.1.mlp*": "raw"})
    return path


@pytest.fixture(scope="module")
def sealed(store: Path) -> SealedStore:
    return holoray.open(store)


def test_marks_say_how_much_must_be_read(sealed: SealedStore) -> None:
    whole, *codecs = lines_of(sealed)
    curve, size = sealed.curve(), sealed.manifest.bytes_in
    assert [mark.label for mark in whole.marks][:3] == [".9", ".99", ".999"]
    for mark, quality in zip(whole.marks, (0.9, 0.99, 0.999, 1.0), strict=True):
        assert mark.nbytes == curve.bytes_for_quality(quality)
        assert mark.percent == pytest.approx(100 * mark.nbytes / size)
    assert [mark.snr_db for mark in whole.marks] == pytest.approx([10, 20, 30, CEILING_DB])
    assert {line.label for line in codecs} == {"planes alone", "spectral alone", "raw alone"}
    by_label = {line.label: line for line in codecs}
    assert by_label["planes alone"].marks[-1].label == "exact"
    assert by_label["spectral alone"].marks[-1].label.startswith("all (")
    assert by_label["raw alone"].marks[-1].percent == pytest.approx(100, abs=15)


def test_a_line_is_what_is_reached_within_the_bytes(sealed: SealedStore) -> None:
    for line in lines_of(sealed):
        assert all(a <= b for a, b in pairwise(line.percent))
        assert all(0 <= db <= CEILING_DB for db in line.snr_db)
        assert line.at(line.percent[0] - 1e-9) is None
        assert line.at(line.percent[-1] + 1) == line.snr_db[-1]
        middle = len(line.percent) // 2
        assert line.at(line.percent[middle]) in line.snr_db[middle:]


@pytest.mark.parametrize("width", [20, 60, 80, 140, 250])
def test_a_terminal_drawing_fits_its_width_and_needs_no_colour(sealed: SealedStore, width: int) -> None:
    shown = on_terminal(lines_of(sealed), width)
    assert "\x1b" not in shown
    assert max(len(line) for line in shown.splitlines()) <= max(width, 72)
    assert all(f"◆ {label}" in shown for label in (".9", ".99", ".999"))
    rows = [line for line in shown.splitlines() if "|" in line]
    assert any(row.count("o") >= 2 for row in rows) or sum("o" in row for row in rows) >= 3
    assert "planes alone" in shown


def test_one_tensor(sealed: SealedStore) -> None:
    (line,) = lines_of(sealed, "layers.0.mlp.weight")
    assert line.label == "layers.0.mlp.weight (spectral)"
    assert line.percent[0] == 0
    with pytest.raises(UsageError):
        lines_of(sealed, "no.such")


def test_a_store_that_knows_one_codec_has_one_line() -> None:
    store = holoray.MemoryStore()
    holoray.encode({"w": np.ones((100, 100), np.float32), "ids": np.arange(9)}, store)
    assert [line.label for line in lines_of(holoray.open(store))] == ["whole store"]
    nothing = holoray.MemoryStore()
    holoray.encode({"ids": np.arange(9)}, nothing)  # no energy at all: quality 0, and exact once loaded
    (line,) = lines_of(holoray.open(nothing))
    assert [mark.label for mark in line.marks] == ["exact"]
    assert "exact" in on_terminal([line], 80)


@pytest.mark.parametrize("name", [r"_a$\frac{$", "a\nb", "\x1b[31m"])
def test_hostile_names_are_only_names(tmp_path: Path, name: str) -> None:
    store = holoray.MemoryStore()
    holoray.encode({name: np.ones((100, 100), np.float32)}, store)
    lines = lines_of(holoray.open(store), name)
    to_file(lines, tmp_path / "x.png", lines[0].label)
    assert lines[0].label in on_terminal(lines, 80)
    assert lines[0].label.isprintable()


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_files(sealed: SealedStore, tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = tmp_path / f"curve{suffix}"
    to_file(lines_of(sealed), path, "a title")
    assert path.read_bytes().startswith(magic)
    assert path.stat().st_size > 5000


def test_what_cannot_be_written(sealed: SealedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = lines_of(sealed)
    with pytest.raises(SourceError, match="cannot write"):
        to_file(lines, tmp_path / "no" / "x.png", "")
    with pytest.raises(UsageError, match="cannot draw"):
        to_file(lines, tmp_path / "x.bmp", "")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    with pytest.raises(UsageError, match="matplotlib") as caught:
        to_file(lines, tmp_path / "x.png", "")
    assert "holoray[plot]" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_the_command(store: Path, tmp_path: Path) -> None:
    def inspect(*args: object) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([*HOLORAY, "inspect", str(store), *map(str, args)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    drawn = inspect("--plot")
    assert drawn.stdout == ""
    assert "◆ .999" in drawn.stderr  # off a terminal too: it was asked for
    assert inspect("--plot", "-q").stderr == ""
    assert inspect(tmp_path / "x.png", "--plot").stderr.count("\n") == 1
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
