"""Store files that are cut, overwritten, replaced or removed while a load runs, and files that are no files.

Each load runs in a child process: reading through a memory map would be killed by SIGBUS, which no test survives.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_store import blobs, load, pristine

import holoray
from holoray.errors import HolorayError, IntegrityError, SourceError
from holoray.stores import MANIFEST, ROOT, LocalStore

FRAGMENTS = "fragments-00000.arrow"
LOADER = """
import sys, holoray, numpy
sealed = holoray.open(sys.argv[1])
reads = [0]
read_into = sealed.store.read_into

def slow_read(*arguments):
    reads[0] += 1
    if reads[0] == 3:  # in the middle of the load: the parent does its worst and answers
        print("reading", flush=True)
        sys.stdin.readline()
    return read_into(*arguments)

sealed.store.read_into = slow_read
try:
    print("same" if (sealed.load()["w"] == 7).all() else "changed")
except holoray.HolorayError as error:
    print(type(error).__name__, error.tensor, error.fragment is not None)
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A store with one file of 16 MiB."""
    path = tmp_path_factory.mktemp("original") / "store"
    holoray.encode({"w": np.full(16 << 20, 7, np.uint8)}, path, compression="none")
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def store(original: dict[str, bytes], tmp_path: Path) -> Path:
    for name, data in original.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(8 << 20)
        file.write(bytes(8 << 20))


def extend(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(bytes(4096))


def replace(path: Path) -> None:
    path.with_name("new").write_bytes(bytes(path.stat().st_size))
    path.with_name("new").rename(path)


def remove(path: Path) -> None:
    path.unlink()


DAMAGED, UNTOUCHED = "IntegrityError w True", "same"


@pytest.mark.fault("changing-file")
@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        (truncate, DAMAGED),
        (empty, DAMAGED),
        (overwrite, DAMAGED),
        (extend, UNTOUCHED),
        (replace, UNTOUCHED),  # the open descriptor keeps the old file
        (remove, UNTOUCHED),
    ],
)
def test_a_file_that_changes_during_a_load(store: Path, change: Callable[[Path], None], outcome: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(holoray.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", LOADER, str(store)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "reading\n"
        change(store / FRAGMENTS)
        answer, _ = child.communicate("go\n", timeout=60)
    assert child.returncode == 0
    assert answer == f"{outcome}\n"


@pytest.mark.fault("changing-file")
@pytest.mark.parametrize("change", [truncate, empty, remove])
def test_a_file_that_changes_between_open_and_load(store: Path, change: Callable[[Path], None]) -> None:
    sealed = holoray.open(store)
    change(store / FRAGMENTS)
    with pytest.raises(HolorayError):
        sealed.load()
    assert sealed.verify()[0].file == FRAGMENTS


@pytest.mark.fault("changing-file", "replayed")
def test_a_store_replaced_between_open_and_load_is_not_mixed(store: Path) -> None:
    """The old manifest with new fragments: refused; opened again, the new store is there."""
    sealed = holoray.open(store)
    holoray.encode({"w": np.full(16 << 20, 8, np.uint8)}, store, compression="none", overwrite=True)
    with pytest.raises(IntegrityError):
        sealed.load()
    np.testing.assert_array_equal(holoray.open(store).load()["w"][:9], 8)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small"
    path.mkdir()
    for name, data in blobs().items():
        (path / name).write_bytes(data)
    return path


def test_links_to_whole_files_and_directories_are_followed(small: Path, tmp_path: Path) -> None:
    for name in blobs():
        (small / name).rename(tmp_path / name)
        (small / name).symlink_to(tmp_path / name)
    (tmp_path / "link").symlink_to(small)
    assert load(LocalStore(tmp_path / "link")) == pristine()


@pytest.mark.fault("changing-file")
@pytest.mark.parametrize("target", ["nowhere", "itself", "/dev/zero", "/dev/null", "/proc/self/mem", "/", "fifo"])
@pytest.mark.parametrize("name", [ROOT, MANIFEST, FRAGMENTS])
def test_links_to_anything_else_are_refused(small: Path, name: str, target: str) -> None:
    (small / name).unlink()
    if target == "fifo":
        os.mkfifo(small / "fifo")
    (small / name).symlink_to({"itself": name}.get(target, target))
    regular = target.startswith("/proc")  # by what it says of itself
    with pytest.raises(HolorayError if regular else SourceError):
        load(LocalStore(small))


def test_a_directory_that_cannot_be_listed_is_a_source_error(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    assert holoray.open(small).manifest.tensors  # a whole store is opened by name
    (small / ROOT).unlink()
    with pytest.raises(SourceError, match="Permission"):
        holoray.open(small)


@pytest.mark.fault("changing-file")
def test_writing_replaces_links_and_leaves_their_targets(small: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    for name in (ROOT, MANIFEST, FRAGMENTS, f"{MANIFEST}.partial", f"{FRAGMENTS}.partial", "ROOT.partial"):
        (small / name).unlink(missing_ok=True)
        (small / name).symlink_to(victim)
    holoray.encode({"w": np.arange(9)}, small, overwrite=True)
    assert victim.read_bytes() == b"precious"
    np.testing.assert_array_equal(holoray.open(small).load()["w"], np.arange(9))
