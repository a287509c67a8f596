"""Repair: whatever happened to a share, it ends as encode wrote it, or as it was; also when the repair is killed."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shares_cases import SHARES, bits, copies, encoded, flip, load, small_chunks, weights

import holoray
from holoray.errors import CapacityError, IntegrityError, SourceError, UsageError
from holoray.pipelines.repair import repair
from holoray.pipelines.share_check import check_shares
from holoray.stores import ROOT, LocalStore, MemoryStore, ShareTarget, open_shares
from holoray.stores.base import SHARE

Blobs = list[dict[str, bytes]]


@pytest.fixture(autouse=True)
def chunks() -> Iterator[None]:
    with small_chunks():
        yield


@pytest.fixture(scope="module")
def sealed() -> list[MemoryStore]:
    with small_chunks():
        return encoded()


def blobs(places: list[MemoryStore]) -> Blobs:
    return [dict(place.blobs) for place in places]


@pytest.fixture
def on_disk(sealed: list[MemoryStore], tmp_path: Path) -> Path:
    for index, place in enumerate(sealed):
        (tmp_path / f"share-{index}").mkdir()
        for name, data in place.blobs.items():
            (tmp_path / f"share-{index}" / name).write_bytes(data)
    return tmp_path


def files(directory: Path) -> dict[str, bytes]:
    """What is there, but for locks: those of the dead hold nobody back."""
    found = (p for p in directory.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(directory)): p.read_bytes() for p in found}


def test_nothing_to_do_changes_nothing(on_disk: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in on_disk.rglob("*")}
    report = repair([LocalStore(on_disk)])
    assert (report.found, report.repaired, report.failed, report.shares) == ((), (), (), 8)
    assert {path: path.stat().st_mtime_ns for path in on_disk.rglob("*")} == before


@pytest.mark.fault("lost-share")
@given(seed=st.integers(0, 1 << 30))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_that_can_be_undone_is_undone(sealed: list[MemoryStore], seed: int) -> None:
    """Of each stripe of each file at most as many chunks are hit as may be lost; also both ROOT and description."""
    rng = random.Random(seed)
    places = copies(sealed)
    shares = open_shares(places)
    if rng.random() < 0.3:
        places[rng.randrange(8)].blobs.clear()
    else:
        for name, file in shares.files.items():
            for share in rng.sample(range(8), 8 - file.stripes.needed):
                part = name.replace(".arrow", ".share")
                kind = rng.randrange(4)
                if kind == 0:
                    del places[share].blobs[part]
                elif kind == 1:
                    places[share].blobs[part] = places[share].blobs[part][: rng.randrange(200)]
                elif kind == 2:
                    flip(places[share], part, rng.randrange(file.part_bytes))
        places[rng.randrange(8)].blobs[ROOT] = b"sha256:"
    report = repair(places)
    assert report.failed == ()
    assert blobs(places) == blobs(sealed)
    assert check_shares(open_shares(places)) == []


def test_each_fault_is_named(sealed: list[MemoryStore]) -> None:
    places = copies(sealed)
    flip(places[1], "fragments-00003.share", 300)
    flip(places[2], "fragments-00001.share", len(places[2].blobs["fragments-00001.share"]) - 1)
    places[3].blobs["manifest.share"] = b""
    places[4].blobs[ROOT] = b"sha256:0\n"
    found = check_shares(open_shares([*places[:7]]))
    assert [(f.share, f.file, f.chunk) for f in found] == [
        (1, "fragments-00003.share", 1),
        (2, "fragments-00001.share", None),
        (3, "manifest.share", None),
        (4, ROOT, None),
        (7, None, None),
    ]
    assert [word in f.why for f, word in zip(found, ("digest", "digests", "0 bytes", "root", "given"), strict=True)]


def test_what_cannot_be_had_is_named_and_the_rest_repaired(sealed: list[MemoryStore]) -> None:
    places = copies(sealed)
    for place in places[:2]:
        del place.blobs["fragments-00003.share"]  # needs 7 of 8
        del place.blobs["fragments-00001.share"]  # needs 4 of 8
    report = repair(places)
    assert {bad.file for bad in report.failed} == {"fragments-00003.arrow"}
    assert {(part.share, part.file) for part in report.repaired} == {(i, "fragments-00001.share") for i in (0, 1)}
    for place in places[:2]:
        place.blobs["fragments-00003.share"] = b""  # what encode wrote but for one file
    expected = blobs(sealed)
    for share in expected[:2]:
        share["fragments-00003.share"] = b""
    assert blobs(places) == expected
    with pytest.raises(SourceError, match="3 of the 4"):
        repair(places[:3])


def test_empty_places_take_missing_shares(sealed: list[MemoryStore]) -> None:
    fresh = MemoryStore("memory:new")
    places = copies(sealed)
    report = repair([*places[:2], fresh, *places[3:]])
    assert {part.share for part in report.repaired} == {2}
    assert fresh.blobs == sealed[2].blobs
    assert repair(places[:7]).repaired == ()  # nowhere to put the other


def test_a_place_is_known_by_its_parts(sealed: list[MemoryStore]) -> None:
    """Its description is damaged, in full or in one digit of a digest: no other share is written there."""
    for harm in (lambda data: b"{}", lambda data: data.replace(b'"footers":["', b'"footers":["0', 1)[:-1]):
        places = copies(sealed)
        places[5].blobs[SHARE] = harm(places[5].blobs[SHARE])
        report = repair([places[0], *places[2:]])
        assert {(part.share, part.place) for part in report.repaired} == {(5, places[5].uri)}
        assert places[5].blobs == sealed[5].blobs
        assert any(bad.share == 1 for bad in report.found)


def test_a_digit_of_a_digest(sealed: list[MemoryStore]) -> None:
    places = copies(sealed)
    data = bytearray(places[2].blobs[SHARE])
    at = data.index(b'"footers":["') + len(b'"footers":["')
    data[at] = ord("1") if data[at] != ord("1") else ord("2")
    places[2].blobs[SHARE] = bytes(data)
    repair(places)
    assert blobs(places) == blobs(sealed)


def test_a_place_that_does_not_answer_stops_nothing(sealed: list[MemoryStore]) -> None:
    class Down(MemoryStore):
        def names(self) -> Iterator[str]:
            raise SourceError("down", source=self.uri)

        def read_into(self, name: str, offset: int, out: memoryview) -> int:
            raise SourceError("down", source=self.uri)

        def size(self, name: str) -> int:
            raise SourceError("down", source=self.uri)

    places = copies(sealed)
    damage = dict(places[2].blobs)
    del places[2].blobs["fragments-00001.share"]
    report = repair([*places[:6], Down("memory:down"), places[7]])
    assert {part.share for part in report.repaired} == {2}
    assert places[2].blobs == damage
    assert [(bad.file, bad.why) for bad in report.failed] == [("memory:down", "down")]


def test_a_place_that_cannot_be_written_stops_nothing(sealed: list[MemoryStore]) -> None:
    places = copies(sealed)
    for place in places[2:4]:
        del place.blobs["fragments-00001.share"]
    with places[2].exclusive():
        report = repair(places)
    assert {part.share for part in report.repaired} == {3}
    assert [bad.file for bad in report.failed] == [places[2].uri]


def test_a_store_that_is_replaced_before_its_lock_is_had_is_left_alone(sealed: list[MemoryStore]) -> None:
    other = copies(sealed)
    holoray.encode({"w": weights()["planes"]}, ShareTarget(other, SHARES), overwrite=True, threads=1)

    class Replaced(MemoryStore):
        @contextmanager
        def exclusive(self) -> Iterator[None]:
            with super().exclusive():
                self.blobs.clear()
                self.blobs.update(other[2].blobs)
                yield

    places = copies(sealed)
    slow = Replaced(places[2].uri)
    slow.blobs.update(places[2].blobs)
    del slow.blobs["fragments-00001.share"]
    report = repair([*places[:2], slow, *places[3:]])
    assert report.repaired == ()
    assert "written meanwhile" in report.failed[0].why
    assert slow.blobs == other[2].blobs


def test_other_peoples_places_are_left_alone(sealed: list[MemoryStore]) -> None:
    plain, foreign, old = MemoryStore("memory:plain"), MemoryStore("memory:foreign"), MemoryStore("memory:old")
    holoray.encode({"w": weights()["planes"]}, plain)
    others = [MemoryStore(f"memory:o{i}") for i in range(8)]
    holoray.encode({"w": weights()["planes"]}, ShareTarget(others, SHARES), threads=1)
    foreign.blobs.update(others[7].blobs)
    old.blobs.update({name: data for name, data in others[7].blobs.items() if name != SHARE})
    unsealed, rootless = MemoryStore("memory:unsealed"), MemoryStore("memory:rootless")
    unsealed.blobs.update({name: data for name, data in plain.blobs.items() if name != ROOT})
    rootless.blobs.update({name: data for name, data in foreign.blobs.items() if name != ROOT})
    for stranger in (plain, foreign, old, unsealed, rootless):
        before = dict(stranger.blobs)
        with pytest.raises(UsageError, match="left as it is"):
            repair([*copies(sealed)[:7], stranger])
        assert stranger.blobs == before


@pytest.mark.fault("forged-share")
def test_digests_that_all_shares_forge_replace_nothing(sealed: list[MemoryStore]) -> None:
    """All agree on the digest of a part that the data do not give: what is there stays."""
    places = copies(sealed)
    table = open_shares(places).table
    digest = table.files[0].footers[3]
    for index, place in enumerate(places):
        place.blobs[SHARE] = table.encoded(index).replace(digest.hex().encode(), digest[::-1].hex().encode())
    before = blobs(places)
    with pytest.raises(IntegrityError, match="is not what was lost"):
        repair(places)
    assert blobs(places) == before


def test_data_that_do_not_match_the_root_are_not_spread(sealed: list[MemoryStore]) -> None:
    """Shares that agree with each other, but not with the manifest that the root seals."""
    places = [MemoryStore(f"memory:{i}") for i in range(8)]
    target = ShareTarget(places, SHARES)
    honest = open_shares(sealed)
    for name in [*honest.files, ROOT]:
        data = bytearray(honest.read(name, 1 << 20))
        data[len(data) // 2] ^= name == "fragments-00001.arrow"
        with target.create(name) as out:
            out.write(data)
    places[7].blobs.clear()
    before = blobs(places)
    report = repair(places)
    assert {bad.file for bad in report.failed} == {"fragments-00001.arrow"}
    assert blobs(places)[:7] == before[:7]
    assert "fragments-00001.share" not in places[7].blobs


@pytest.mark.fault("disk-full")
def test_a_full_disk_leaves_what_was_there(on_disk: Path) -> None:
    """With the kernel's own limit on file sizes."""
    whole = files(on_disk)
    (on_disk / "share-2" / "fragments-00001.share").unlink()
    before = files(on_disk)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(CapacityError, match="no room"):
            repair([LocalStore(on_disk)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(on_disk) == before
    assert len(repair([LocalStore(on_disk)]).repaired) == 1
    assert files(on_disk) == whole


def load_folder(directory: Path) -> dict[str, bytes]:
    return bits(holoray.open(directory).load())


_KILLED_REPAIR = """
import os, signal, sys
from shares_cases import small_chunks
from holoray.pipelines.repair import repair
from holoray.stores import LocalStore

replace, left = os.replace, [int(sys.argv[2])]
def dying(*names):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)
os.replace = dying
with small_chunks():
    repair([LocalStore(sys.argv[1])])
"""


@pytest.mark.fault("killed-repair")
@pytest.mark.parametrize("after", [pytest.param(0, marks=pytest.mark.slow), 3, pytest.param(8, marks=pytest.mark.slow)])
def test_a_killed_repair_is_taken_up_again(on_disk: Path, after: int) -> None:
    """Killed just before a part would take its place: there, all of it has been written."""
    whole = files(on_disk)
    for path in (on_disk / "share-5").iterdir():
        path.unlink()
    (on_disk / "share-1" / "fragments-00000.share").write_bytes(b"bad")
    done = subprocess.run(
        [sys.executable, "-c", _KILLED_REPAIR, str(on_disk), str(after)],
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        timeout=110,
    )
    assert done.returncode == -signal.SIGKILL
    between = files(on_disk)
    assert any(name.endswith(".partial") for name in between)
    assert all(between[name] == data for name, data in whole.items() if name in between and "share-1/f" not in name)
    assert load_folder(on_disk) == bits(weights())
    report = repair([LocalStore(on_disk)])
    assert report.failed == ()
    assert files(on_disk) == whole


def test_shares_in_memory_are_loaded_after_repair(sealed: list[MemoryStore]) -> None:
    places = copies(sealed)
    for place in places[:4]:
        del place.blobs["fragments-00001.share"]
    assert load(places) == bits(weights())
    repair(places)
    assert load(places[1:]) == bits(weights())
