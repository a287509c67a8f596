"""Shares on the command line: spread, look, lose, load, repair."""

from __future__ import annotations

import json
import shutil
import signal
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from holoray.checkpoint import open_checkpoint, save_checkpoint
from holoray.cli.main import main
from holoray.cli.shares import spread
from holoray.errors import UsageError
from holoray.tensor import Array, as_bytes

Model = dict[str, Array]


@dataclass(frozen=True)
class Done:
    returncode: object
    stdout: str
    stderr: str


def run(*args: object) -> Done:
    """A command in this process: what a process of its own adds is tested elsewhere, and takes seconds to start."""
    out, err = StringIO(), StringIO()
    before = signal.getsignal(signal.SIGINT)
    try:
        argv = mock.patch("sys.argv", ["holoray", *map(str, args)])
        with argv, redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGINT, before)
    return Done(ended.value.code, out.getvalue(), err.getvalue())


def as_json(*args: object) -> Any:
    done = run(*args, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory, model: Model) -> Path:
    directory = tmp_path_factory.mktemp("shares")
    save_checkpoint(directory / "in.safetensors", {n: a for n, a in model.items() if "embed" not in n})
    options = ["--shares", 4, "--usable-from", 2, "--exact-from", 3]
    encoded = as_json("encode", directory / "in.safetensors", directory / "store", *options)
    on_disk = sum(path.stat().st_size for path in (directory / "store").rglob("*") if path.is_file())
    assert encoded["bytes_stored"] == on_disk
    return directory


@pytest.fixture
def store(shares: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shares / "store", tmp_path / "store"))


def tensors(path: Path) -> dict[str, bytes]:
    checkpoint = open_checkpoint(path)
    return {spec.name: as_bytes(checkpoint.read(spec.name)).tobytes() for spec in checkpoint.specs}


def test_lose_load_verify_repair(shares: Path, store: Path, tmp_path: Path) -> None:
    seen = as_json("inspect", store)["shares"]
    assert (seen["total"], seen["there"], seen["missing"]) == (4, [0, 1, 2, 3], {})
    assert seen["needed"]["manifest.arrow"] == seen["needed"]["fragments-00002.arrow"] == 2
    assert seen["needed"]["fragments-00003.arrow"] == 3
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}

    shutil.rmtree(store / "share-2")
    out = tmp_path / "out.safetensors"
    done = run("load", store, out)
    assert done.returncode == 0
    assert "share 2 of 4 is missing" in done.stderr
    assert tensors(out) == tensors(shares / "in.safetensors")
    verified = run("verify", store)
    assert verified.returncode == 3
    assert "can be read, but its shares have 1 fault," in verified.stderr
    assert "share 2: " in verified.stderr
    assert "is whole" not in verified.stderr

    shutil.rmtree(store / "share-1")
    done = run("load", store, tmp_path / "no")
    assert done.returncode == 4
    assert "2 of the 3 shares" in done.stderr
    assert "missing or damaged: 1, 2" in done.stderr
    reachable = done.stderr.rpartition("--quality ")[2].strip()
    assert not (tmp_path / "no").exists()
    partial = as_json("load", store, out, "--quality", reachable)
    assert partial["quality"] >= float(reachable)
    assert as_json("load", store, out, "--bytes", partial["bytes_read"])["quality"] > 0.5
    bad = run("verify", store, "--json")
    assert bad.returncode == 3
    assert '"share": 1' in bad.stdout

    refused = run("repair", store)
    assert refused.returncode == 3
    assert "1 more needed" in refused.stderr
    shutil.copytree(shares / "store" / "share-2", store / "share-2", dirs_exist_ok=True)
    repaired = as_json("repair", store)
    assert repaired["ok"]
    assert {part["share"] for part in repaired["repaired"]} == {1}
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    assert as_json("verify", store)["ok"]
    assert "all 4 shares are whole" in run("repair", store).stderr


def test_places_one_by_one(shares: Path, store: Path, tmp_path: Path) -> None:
    moved = store.rename(tmp_path / "elsewhere")
    first, *others = [str(moved / f"share-{i}") for i in (3, 0, 1)]
    more = [word for place in others for word in ("--share", place)]
    done = run("load", first, tmp_path / "out", *more)
    assert done.returncode == 0
    assert tensors(tmp_path / "out") == tensors(shares / "in.safetensors")
    damaged = moved / "share-1" / "fragments-00001.share"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    verified = run("verify", first, *more)
    assert verified.returncode == 3
    assert "fragments-00001.share" in verified.stderr
    assert "holoray repair" in verified.stderr
    shutil.rmtree(moved / "share-2")
    repaired = as_json("repair", first, *others, moved / "share-2")
    assert {part["share"] for part in repaired["repaired"]} == {1, 2}
    assert as_json("verify", moved)["ok"]


@pytest.mark.parametrize(
    ("layers", "needed", "message"),
    [
        (None, "7,4", "fewer shares than the one before it"),
        (None, "4,x", "no list of numbers"),
        (float("inf"), None, "too much"),
        (float("nan"), None, "too much"),
        (1e9, None, "too much"),
        (0.5, None, "no usable model"),
    ],
)
def test_spreads_without_meaning(layers: float | None, needed: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        spread(8, None, None, layers, needed)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--usable-from", 2], "add --shares"),
        (["--shares", 40], "1 to 32"),
        (["--shares", 4, "--usable-from", 3, "--exact-from", 2], "before it"),
        (["--shares", 4, "--layer-shares", "2,x"], "4,4,7"),
        (["--shares", 4, "--layer-shares", "2,3", "--usable-from", 2], "leave"),
    ],
)
def test_shares_without_meaning(shares: Path, tmp_path: Path, options: list[object], hint: str) -> None:
    done = run("encode", shares / "in.safetensors", tmp_path / "s", *options)
    assert done.returncode == 2
    assert hint in done.stderr
    assert not (tmp_path / "s").exists()
