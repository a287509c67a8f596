"""Any k of N shares are the store, byte for byte; fewer say so; and parity is read only where something is missing."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import served
from shares_cases import (
    CHUNK,
    SHARES,
    UNIT,
    CountingStore,
    bits,
    copies,
    encoded,
    flip,
    load,
    random_bytes,
    small_chunks,
    spread,
    weights,
)

import holoray
from holoray.checkpoint import save_checkpoint
from holoray.errors import FormatError, HolorayError, IntegrityError, QualityError, SourceError, UsageError
from holoray.pipelines import store_writer
from holoray.pipelines.share_check import check_shares
from holoray.stores import ROOT, HttpStore, LocalStore, MemoryStore, Shares, ShareSet, ShareTarget, Store, open_shares
from holoray.stores.base import SHARE
from holoray.stores.shares import Footer, part_file, read_share
from holoray.stores.stripes import Stripes


@pytest.fixture(autouse=True)
def chunks() -> Iterator[None]:
    with small_chunks():
        yield


@pytest.fixture(scope="module")
def sealed() -> list[MemoryStore]:
    with small_chunks():
        return encoded()


# -- every subset ----------------------------------------------------------------------------------------


@pytest.mark.fault("lost-share")
def test_every_subset_gives_what_it_should(sealed: list[MemoryStore]) -> None:
    """All 256 of them: everything from 7 on, the usable part from 4 on, and a typed error that counts below."""
    whole = bits(weights())
    usable: set[tuple[tuple[str, bytes], ...]] = set()
    for size in range(9):
        for subset in itertools.combinations(sealed, size):
            if size >= 7:
                assert load(list(subset)) == whole
            elif size >= 4:
                store = holoray.open(open_shares(subset))
                with pytest.raises(QualityError, match=f"{size} of the 7 .* {7 - size} more needed") as refused:
                    store.load()
                reachable = float(refused.value.hint.rpartition(" ")[2])
                assert 0.5 < reachable < 1
                usable.add(tuple(sorted(bits(store.load(quality=reachable)).items())))
            elif size:
                with pytest.raises(SourceError, match=f"{size} of the 4 .* {4 - size} more needed"):
                    holoray.open(open_shares(subset))
            else:
                with pytest.raises(UsageError):
                    open_shares(subset)
    assert len(usable) == 1


@pytest.mark.fault("lost-share")
@given(
    nbytes=st.one_of(st.integers(0, 200), st.integers(0, 20 * CHUNK)),
    code=st.integers(1, 9).flatmap(lambda total: st.tuples(st.integers(1, total), st.just(total))),
    data=st.data(),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_range_of_any_file_under_any_damage(nbytes: int, code: tuple[int, int], data: st.DataObject) -> None:
    """Against the bytes themselves; a stripe is lost only if more than N - k of its chunks are."""
    needed, total = code
    blob = random_bytes(nbytes, nbytes)
    where, shares, name = spread(blob, needed, total, number=data.draw(st.integers(0, 9)))
    stripes = shares.files[name].stripes
    bad: dict[int, set[int]] = {stripe: set() for stripe in range(stripes.count)}
    for share in data.draw(st.sets(st.integers(0, total - 1), max_size=total - 1)):
        place, part = where[share], part_file(name)
        harm = data.draw(st.sampled_from(["gone", "cut", "flip"]))
        hit = range(stripes.count)
        if harm == "gone":
            del place.blobs[part]
        elif harm == "cut":
            place.blobs[part] = place.blobs[part][:-1]
        elif stripes.part_bytes:
            at = data.draw(st.integers(0, stripes.part_bytes - 1))
            flip(place, part, at)
            hit = range(at // CHUNK, at // CHUNK + 1)
        for stripe in hit:
            bad[stripe].add(stripes.chunk_on(stripe, share))
    offset = data.draw(st.integers(0, nbytes + 10))
    out = bytearray(data.draw(st.integers(0, nbytes + 10)))
    touched = range(offset // stripes.stripe_bytes, -(-min(offset + len(out), nbytes) // stripes.stripe_bytes))
    if all(len(bad.get(stripe, ())) <= total - needed for stripe in touched):
        got = shares.read_into(name, offset, memoryview(out))
        assert bytes(out[:got]) == blob[offset : offset + len(out)]
    else:
        with suppress(SourceError):  # what is lost may also lie outside the units that were asked for
            got = shares.read_into(name, offset, memoryview(out))
            assert bytes(out[:got]) == blob[offset : offset + len(out)]


@given(nbytes=st.integers(1, 30 * CHUNK), total=st.integers(1, 9), data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_data_lie_in_plain_sight(nbytes: int, total: int, data: st.DataObject) -> None:
    """Each byte of a file is in exactly one data chunk, where the layout says, and the shares are equally long."""
    needed = data.draw(st.integers(1, total))
    blob = random_bytes(nbytes, nbytes)
    where, shares, name = spread(blob, needed, total)
    stripes = shares.files[name].stripes
    parts = [place.blobs[part_file(name)] for place in where]
    assert {len(part) for part in parts} == {shares.files[name].part_bytes}
    found = b""
    for stripe in range(stripes.count):
        for chunk in range(needed):
            start = stripes.part_offset(stripe)
            found += parts[stripes.share_of(stripe, chunk)][start : start + stripes.chunk_bytes(stripe)]
    assert found[:nbytes] == blob
    assert not any(found[nbytes:])
    assert len(found) - nbytes < 16 * needed


# -- what is read ----------------------------------------------------------------------------------------


def counted(sealed: list[MemoryStore]) -> list[CountingStore]:
    return [CountingStore(place) for place in copies(sealed)]


def chunk_reads(places: list[CountingStore], shares: ShareSet) -> set[tuple[str, int, int]]:
    """(file, stripe, chunk) of everything read but the digests."""
    found = set()
    for share, place in enumerate(places):
        for name, file in shares.files.items():
            for part, offset, got in place.reads:
                if part == part_file(name) and offset < file.stripes.part_bytes and got:
                    stripe = offset // CHUNK
                    found.add((name, stripe, file.stripes.chunk_on(stripe, share)))
    return found


def test_parity_is_read_only_where_something_is_missing(sealed: list[MemoryStore]) -> None:
    places = counted(sealed)
    store = holoray.open(open_shares(places))
    shares = store.store
    assert isinstance(shares, ShareSet)
    assert bits(store.load()) == bits(weights())
    reads = chunk_reads(places, shares)
    assert len(reads) > 100
    assert all(chunk < shares.files[name].stripes.needed for name, _, chunk in reads)
    assert shares.rebuilt_bytes == 0
    assert not shares.notes()

    places = counted(sealed)
    name, stripe = "fragments-00001.arrow", 2
    file = shares.files[name]
    home = file.stripes.share_of(stripe, 1)
    flip(places[home], part_file(name), file.stripes.part_offset(stripe) + UNIT + 3)
    store = holoray.open(open_shares(places))
    assert bits(store.load()) == bits(weights())
    assert (name, stripe, 1) in reads
    extra = {read for read in chunk_reads(places, shares) - reads if read[2] >= shares.files[read[0]].stripes.needed}
    assert extra == {(name, stripe, file.stripes.needed)}  # one parity chunk of one stripe
    assert isinstance(store.store, ShareSet)
    assert 0 < store.store.rebuilt_bytes <= CHUNK
    assert any("holoray repair" in note for note in store.store.notes())


def test_reads_are_spread_over_the_shares(sealed: list[MemoryStore]) -> None:
    places = counted(sealed)
    holoray.open(open_shares(places)).load()
    nbytes = [sum(n for part, n in place.read_bytes.items() if part.startswith("fragments")) for place in places]
    assert max(nbytes) < 1.25 * min(nbytes)


def test_a_place_that_fails_is_not_asked_for_every_chunk(sealed: list[MemoryStore]) -> None:
    failed: list[str] = []

    class Dying(CountingStore):
        def read_into(self, name: str, offset: int, out: memoryview) -> int:
            if name in [asked for asked, _, _ in self.reads]:  # after the digests, which come first
                failed.append(name)
                raise SourceError("the disk is gone", source=self.uri)
            return super().read_into(name, offset, out)

    places: list[CountingStore] = counted(sealed)
    places[2] = Dying(places[2])
    shares, whole = open_shares(places), open_shares(sealed)
    for name in shares.files:
        assert shares.read(name, 1 << 20) == whole.read(name, 1 << 20)
    assert len(failed) > 5
    assert len(failed) == len(set(failed))  # once a file
    assert any("the disk is gone" in note for note in shares.notes())


@pytest.mark.fault("lost-share")
def test_places_that_did_not_answer_for_a_while_are_asked_again(sealed: list[MemoryStore]) -> None:
    class Flaky(MemoryStore):
        down = False

        def read_into(self, name: str, offset: int, out: memoryview) -> int:
            if self.down:
                raise SourceError("503", source=self.uri)
            return super().read_into(name, offset, out)

    places = []
    for place in sealed:
        places.append(Flaky(place.uri))
        places[-1].blobs.update(place.blobs)
    store = holoray.open(open_shares(places))
    for place in places[:4]:
        place.down = True
    with pytest.raises(SourceError, match="4 of the 7"):
        store.load()
    for place in places:
        place.down = False
    assert bits(store.load()) == bits(weights())


# -- lies ------------------------------------------------------------------------------------------------


def forged(place: MemoryStore, share: int, shares: ShareSet, name: str) -> None:
    """Another chunk, and digests of it: the part alone looks right."""
    stripes = shares.files[name].stripes
    data = bytes(b ^ 1 for b in place.blobs[part_file(name)][: stripes.part_bytes])
    footer = Footer()
    for stripe in range(stripes.count):
        at = stripes.part_offset(stripe)
        footer.add(data[at : at + stripes.chunk_bytes(stripe)])
    place.blobs[part_file(name)] = data + footer.encoded(stripes, share)


@pytest.mark.fault("forged-share")
def test_a_share_cannot_vouch_for_itself(sealed: list[MemoryStore]) -> None:
    places = copies(sealed)
    shares = open_shares(places)
    forged(places[5], 5, shares, "fragments-00001.arrow")
    store = holoray.open(open_shares(places))
    assert bits(store.load()) == bits(weights())
    assert any("digests at the end" in note for note in store.store.notes())


def test_what_came_over_a_network_is_checked_with_sha256() -> None:
    """With an xxh3 that says the same of everything, as a forger makes it say."""
    with mock.patch("xxhash.xxh3_64_intdigest", return_value=7):
        places = encoded()
        stripes = open_shares(places).files["fragments-00001.arrow"].stripes
        home = stripes.share_of(2, 1)
        flip(places[home], "fragments-00001.share", stripes.part_offset(2) + UNIT + 3)
        assert [(bad.share, bad.chunk) for bad in check_shares(open_shares(places))] == [(home, 2)]
        with pytest.raises(IntegrityError, match="forged"):  # here by the fragment's own digest: it is local
            holoray.open(open_shares(places), expect=open_shares(places).table.root).load()
        for place in places:
            place.remote = True
        assert load(places) == bits(weights())


@pytest.mark.fault("forged-share", "replayed")
def test_shares_of_another_version_are_no_shares_of_this_one(sealed: list[MemoryStore]) -> None:
    old = {n: a + (n == "bias") for n, a in weights().items()}
    stale = [MemoryStore(f"memory:old-{i}") for i in range(8)]
    holoray.encode(old, ShareTarget(stale, SHARES), threads=1)
    store = holoray.open(open_shares([*sealed[:7], stale[7]]))
    assert bits(store.load()) == bits(weights())
    assert any("another version" in note for note in store.store.notes())
    with pytest.raises(QualityError, match="5 of the 7"):
        holoray.open(open_shares([*sealed[:5], *stale[:3]])).load()
    with pytest.raises(SourceError, match="two stores"):
        open_shares([*sealed[:4], *stale[4:]])


def test_the_root_pins_shares_like_any_store(sealed: list[MemoryStore]) -> None:
    shares = open_shares(sealed)
    assert bits(holoray.open(shares, expect=shares.table.root).load()) == bits(weights())
    with pytest.raises(IntegrityError, match="not the expected one"):
        holoray.open(shares, expect="sha256:" + "0" * 64)


@pytest.mark.fault("forged-share")
@given(at=st.integers(0, 5000), byte=st.integers(0, 255), cut=st.booleans())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_description_is_refused(sealed: list[MemoryStore], at: int, byte: int, cut: bool) -> None:
    text = sealed[3].blobs[SHARE]
    at %= len(text)
    damaged = text[:at] if cut else text[:at] + bytes([byte]) + text[at + 1 :]
    try:
        index, table = read_share(damaged)
    except FormatError:
        return
    assert table.encoded(index) == damaged  # another root, digest, size or number: the other shares disagree


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"index": 8},
        {"index": -1},
        {"total": 1 << 40},
        {"total": 0},
        {"root": "sha256:12"},
        {"files": []},
        {"files": [[]]},
        {"extra": 1},
    ],
    ids=str,
)
def test_impossible_descriptions(sealed: list[MemoryStore], change: dict[str, object]) -> None:
    table = json.loads(sealed[0].blobs[SHARE]) | change
    with pytest.raises(FormatError):
        read_share(json.dumps(table, sort_keys=True, separators=(",", ":")).encode() + b"\n")


@pytest.mark.parametrize(
    "change",
    [{"bytes": 1 << 62}, {"bytes": -1}, {"needed": 9}, {"needed": 0}, {"name": "../x"}, {"footers": []}],
    ids=str,
)
def test_impossible_files(sealed: list[MemoryStore], change: dict[str, object]) -> None:
    table = json.loads(sealed[0].blobs[SHARE])
    table["files"][0] |= change
    with pytest.raises(FormatError):
        read_share(json.dumps(table, sort_keys=True, separators=(",", ":")).encode() + b"\n")


def test_a_size_that_all_shares_claim_allocates_nothing(sealed: list[MemoryStore]) -> None:
    places = copies(sealed)
    for place in places:
        place.blobs[SHARE] = place.blobs[SHARE].replace(b'"bytes":', b'"bytes":9999999999999', 1)
    shares = open_shares(places)
    name = shares.table.files[0].stripes.name
    with pytest.raises(SourceError, match="0 of the 4"):
        shares.read_into(name, 0, memoryview(bytearray(100)))
    assert "0 of the 4" in shares.unreadable([name])[name]


@pytest.mark.fault("forged-share")
@pytest.mark.parametrize("lie", ["garbage", "good digests"])
def test_a_liar_that_takes_the_name_of_another_costs_one_share(sealed: list[MemoryStore], lie: str) -> None:
    """Exact from any seven of eight: also where the eighth says it is one of them, and is asked first."""
    places = copies(sealed)
    stripes = open_shares(sealed).files["fragments-00001.arrow"].stripes
    for name, data in places[3].blobs.items():
        if name.endswith(".share"):
            body = stripes.part_bytes if lie == "good digests" and name == part_file(stripes.name) else len(data)
            places[0].blobs[name] = bytes(b ^ 1 for b in data[:body]) + data[body:]
    places[0].blobs[SHARE] = places[3].blobs[SHARE]
    shares = open_shares(places)
    assert bits(holoray.open(shares).load()) == bits(weights())
    assert list(shares.missing) == [0]


@pytest.mark.fault("bomb")
def test_a_description_is_no_bomb(sealed: list[MemoryStore]) -> None:
    places = copies(sealed)
    places[2].blobs[SHARE] = b"[" + b"[]," * 20_000_000 + b"[]]"
    tracemalloc.start()
    try:
        assert bits(holoray.open(open_shares(places)).load()) == bits(weights())
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    for place in places:
        place.blobs[SHARE] = b"{}"
    with pytest.raises(SourceError, match="malformed"):
        open_shares(places)


@pytest.mark.fault("forged-share")
def test_sizes_that_all_shares_forge_are_those_of_the_manifest(sealed: list[MemoryStore]) -> None:
    places, name = copies(sealed), "fragments-00001.arrow"
    table = open_shares(sealed).table
    files = [
        replace(f, stripes=replace(f.stripes, nbytes=1 << 50)) if f.stripes.name == name else f for f in table.files
    ]
    for index, place in enumerate(places):
        place.blobs[SHARE] = replace(table, files=tuple(files)).encoded(index)
    with pytest.raises(IntegrityError, match="the manifest"):
        holoray.open(open_shares(places))


# -- places ----------------------------------------------------------------------------------------------


def test_folders_one_of_them_alone_and_pickles(tmp_path: Path) -> None:
    report = holoray.encode(weights(), tmp_path / "s", shares=SHARES)
    sizes = sum(path.stat().st_size for path in (tmp_path / "s").rglob("*") if path.is_file())
    assert report.bytes_stored == sizes
    store = holoray.open(tmp_path / "s")
    assert store.root == report.root
    assert store.store.uri == str(tmp_path / "s")
    assert bits(pickle.loads(pickle.dumps(store)).load()) == bits(weights())  # noqa: S301 - as Ray does
    with pytest.raises(SourceError, match=r"1 of the 4 .* 3 more needed"):
        holoray.open(tmp_path / "s" / "share-3")
    (tmp_path / "s" / "share-3").rename(tmp_path / "elsewhere")
    assert bits(holoray.open(tmp_path / "s").load()) == bits(weights())
    (tmp_path / "empty" / "share-0").mkdir(parents=True)
    with pytest.raises(SourceError, match="no share of a store is there"):
        holoray.open(tmp_path / "empty")


def test_what_shares_are_not_for(tmp_path: Path, sealed: list[MemoryStore]) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / ROOT).touch()
    with pytest.raises(UsageError, match="in one piece"):
        holoray.encode(weights(), tmp_path / "s", shares=SHARES)
    with pytest.raises(UsageError, match="as many places"):
        ShareTarget([MemoryStore()], SHARES)
    with pytest.raises(UsageError, match="lost together"):
        ShareTarget([MemoryStore()] * 8, SHARES)
    shares = open_shares(sealed)
    for write in (lambda: shares.create("a"), lambda: shares.delete("a"), shares.exclusive, shares.replacement):
        with pytest.raises(UsageError, match="can only be read") as refused:
            write()
        assert "holoray encode --shares" in refused.value.hint
    with pytest.raises(SourceError, match="hold no"):
        shares.size("fragments-00099.arrow")


def test_an_encode_of_shares_replaces_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "SEGMENT_BYTES", 1)
    save_checkpoint(tmp_path / "in.safetensors", weights())
    few = Shares.usable(3, 1, 2, layers=1.5)
    done: list[str] = []

    def stop(name: str, nbytes: int) -> None:
        done.append(name)
        if len(done) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        holoray.encode(tmp_path / "in.safetensors", tmp_path / "s", shares=few, on_tensor=stop)
    with pytest.raises(SourceError, match="interrupted"):
        holoray.open(tmp_path / "s")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("fragments-*.share")}
    assert before
    holoray.encode(tmp_path / "in.safetensors", tmp_path / "s", shares=few)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert bits(holoray.open(tmp_path / "s").load()) == bits(weights())
    with pytest.raises(UsageError, match="already holds a store"):
        holoray.encode(weights(), tmp_path / "s", shares=few)
    holoray.encode(weights(), tmp_path / "s", shares=Shares(4, (2,)), overwrite=True)
    assert bits(holoray.open(open_shares([tmp_path / "s" / f"share-{i}" for i in (1, 3)])).load()) == bits(weights())
    other = {"w": weights()["planes"]}
    with pytest.raises(UsageError, match="holds shares"):
        holoray.encode(other, tmp_path / "s")
    holoray.encode(other, tmp_path / "s", shares=Shares(2, (1,)), overwrite=True)
    assert bits(holoray.open(tmp_path / "s").load()) == bits(other)  # the two of the old store that are left were more
    assert not any(list((tmp_path / "s" / f"share-{i}").glob("*.share")) for i in (2, 3))


def test_shares_behind_servers_one_of_which_goes(tmp_path: Path) -> None:
    holoray.encode(weights(), tmp_path / "s", shares=SHARES)
    local: list[Store] = [LocalStore(tmp_path / "s" / f"share-{i}") for i in range(6)]
    with served(tmp_path / "s" / "share-6") as six, served(tmp_path / "s" / "share-7") as seven:
        store = holoray.open(open_shares([*local, HttpStore(six.url), HttpStore(seven.url)]))
        assert store.strict  # some bytes come over a network
        assert bits(store.load()) == bits(weights())
        assert store.store.notes() == []
        seven.mode = 503
        assert bits(store.load()) == bits(weights())
        assert "share 7" in store.store.notes()[0]
        six.mode = "silent"
        with pytest.raises(SourceError, match="6 of the 7"):
            store.load()


# -- which layers ----------------------------------------------------------------------------------------


def test_layers_and_shares() -> None:
    shares = Shares.usable(8, 4, 7)
    assert (shares.needed, shares.lead, shares.lead_layer) == ((4, 4, 7), 0.25, 2)
    files = {"manifest.arrow": 4, "fragments-00000.arrow": 4, "fragments-00002.arrow": 4, "fragments-00003.arrow": 7}
    files |= {"fragments-00015.arrow": 4, "fragments-00014.arrow": 7, "fragments-00017.arrow": 4}
    assert {name: shares.needed_for(name) for name in files} == files
    assert [i for i in range(12) if shares.leads(i)] == [3, 7, 11]
    assert Shares(3, (1, 2, 3)).lead_layer is None
    assert Shares(8, (4, 4), 0.5).lead_layer is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: Shares(0, (1,)),
        lambda: Shares(33, (1,)),
        lambda: Shares(4, ()),
        lambda: Shares(4, (5,)),
        lambda: Shares(4, (0, 1)),
        lambda: Shares(4, (3, 2)),
        lambda: Shares(4, (2,), 1.0),
        lambda: Shares.usable(8, 4, 7, layers=0.5),
        lambda: Shares.usable(8, 5, 4),
    ],
)
def test_shares_without_meaning(make: object) -> None:
    with pytest.raises(UsageError):
        make()  # type: ignore[operator]


def test_the_largest_file_has_no_more_than_its_share_of_memory() -> None:
    """Chunks and digests are found by arithmetic: nothing grows with the size of a file but its digests."""
    stripes = Stripes("fragments-00001.arrow", 1 << 50, 7, 8)
    piece = next(stripes.pieces((1 << 50) - 5, 5))
    assert piece.stripe == stripes.count - 1
    assert stripes.part_bytes >= (1 << 50) // 7


def test_errors_are_ours_whatever_is_in_a_place(sealed: list[MemoryStore]) -> None:
    """Each file of a place replaced by another one, and of two places by nothing: exact, or a typed error."""
    whole = bits(weights())
    for name, other in itertools.pairwise([*sealed[0].blobs, ROOT, "manifest.share"]):
        places = copies(sealed)
        places[0].blobs[name] = places[0].blobs[other]
        assert load(places) == whole
    for name in sealed[0].blobs:
        places = copies(sealed)
        for place in places[:2]:
            place.blobs[name] = b""
        try:
            assert load(places) == whole
        except HolorayError:
            assert name not in (ROOT, "manifest.share", "fragments-00000.share")


def test_numbers_of_what_was_written_are_digests(sealed: list[MemoryStore]) -> None:
    index, table = read_share(sealed[6].blobs[SHARE])
    assert index == 6
    for file in table.files:
        part = sealed[6].blobs[part_file(file.stripes.name)]
        assert hashlib.sha256(part[file.stripes.part_bytes :]).digest() == file.footers[6]
    assert np.unique([len(file.footers) for file in table.files]) == [8]
