"""`load` and `warmup` with several stores: named one after the other, or in a file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import holoray
from holoray.checkpoint import open_checkpoint
from holoray.stores import fragment_file
from holoray.tensor import Array

Model = dict[str, Array]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "holoray", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def as_json(*arguments: object) -> Any:
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory, model: Model) -> tuple[Path, Path]:
    """A damaged store and a good one: one bit of one fragment differs."""
    directory = tmp_path_factory.mktemp("copies")
    holoray.encode(model, directory / "good")
    entry = holoray.open(directory / "good").entry("embed.weight").fragments[2]
    shutil.copytree(directory / "good", directory / "bad")
    with open(directory / "bad" / fragment_file(entry.file), "r+b") as file:
        file.seek(entry.offset)
        byte = file.read(1)[0]
        file.seek(entry.offset)
        file.write(bytes([byte ^ 4]))
    return directory / "bad", directory / "good"


def assert_exact(path: Path, model: Model) -> None:
    checkpoint = open_checkpoint(path)
    assert all(checkpoint.read(name).tobytes() == array.tobytes() for name, array in model.items())


def test_what_one_source_has_wrong_comes_from_another(copies: tuple[Path, Path], model: Model, tmp_path: Path) -> None:
    bad, good = copies
    out = tmp_path / "out.safetensors"
    values = as_json("load", bad, good, out)
    assert (values["quality"], values["skipped"]) == (1.0, 0)
    assert [source["source"] for source in values["sources"]] == [str(bad), str(good)]
    assert_exact(out, model)
    (tmp_path / "sources.toml").write_text(f'[[source]]\nuri = "{bad}"\n[[source]]\nuri = "{good}"\n', encoding="utf-8")
    out.unlink()
    as_json("load", out, "--sources", tmp_path / "sources.toml")
    assert_exact(out, model)


def test_without_an_honest_copy(copies: tuple[Path, Path], model: Model, tmp_path: Path) -> None:
    bad, _ = copies
    out = tmp_path / "out.safetensors"
    done = run("load", bad, out)
    assert done.returncode == 3
    assert not out.exists()
    values = as_json("load", bad, out, "--skip-corrupted")
    assert 0 < values["quality"] < 1
    gone = {2}
    for entry in holoray.open(bad).entry("embed.weight").fragments:  # a prerequisite comes before what requires it
        gone |= {entry.index} if entry.requires in gone else set()
    assert values["skipped"] == len(gone) > 1
    assert f"{len(gone)} fragments are missing" in run("load", bad, out, "--skip-corrupted").stderr
    done = run("load", bad, tmp_path / "not.safetensors", "--skip-corrupted", "--min-quality", "0.99999")
    assert done.returncode == 4
    assert not (tmp_path / "not.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["load", "out.safetensors"], "Missing argument 'STORE...'"),
        (["load", "a", "a", "out.safetensors"], "named twice"),
        (["load", "a", "out.safetensors", "--min-quality", "0.5"], "--skip-corrupted"),
        (["load", "--sources", "none.toml", "out.safetensors"], "cannot read none.toml"),
        (["warmup"], "Missing argument 'STORE...'"),
        (["warmup", "a", "--min-quality", "0.5"], "--skip-corrupted"),
        (["load", "out.safetensors", "--sources", "some.toml", "--share", "a"], "--share is about STORE"),
    ],
)
def test_what_makes_no_sense(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode in (2, 6)
    assert message in done.stderr


@pytest.mark.ray
def test_a_warm_up_from_two_sources(copies: tuple[Path, Path], model: Model, tmp_path: Path) -> None:
    bad, good = copies
    values = as_json("warmup", bad, good, "--workers", 1, "--out", tmp_path, "--skip-corrupted")
    assert (values["quality"], values["skipped"]) == (1.0, 0)
    assert_exact(tmp_path / "model.safetensors", model)


@pytest.mark.ray
@pytest.mark.fault("lost-share")
def test_shares_in_several_folders_and_a_copy_of_them(model: Model, tmp_path: Path) -> None:
    one, two, whole = tmp_path / "one", tmp_path / "two", tmp_path / "whole"
    root = holoray.encode(model, whole, shares=holoray.Shares.usable(4, 2, 3)).root
    for half in (one, two):
        shutil.copytree(whole, half)
    for lost in (one / "share-0", one / "share-1", two / "share-2", two / "share-3", whole / "share-0"):
        shutil.rmtree(lost)
    out = tmp_path / "out.safetensors"
    assert as_json("load", one, "--share", two, out)["root"] == root
    assert_exact(out, model)
    values = as_json("load", whole, one, out)
    assert [note.partition(":")[0] for note in values["notes"] if "is missing" in note] == [str(whole)] + [str(one)] * 2
    command = ("warmup", one, "--share", two / "share-0", "--workers", 1, "--quality", 1.0, "--out", tmp_path / "again")
    values = as_json(*command)
    assert (values["root"], values["quality"]) == (root, 1.0)
    assert sum("is missing" in note for note in values["notes"]) == 1
    assert_exact(tmp_path / "again" / "model.safetensors", model)
