"""Opening several places: they must hold the same root; and files that list them."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import holoray
from holoray import FaultPolicy, Faults, FaultySource, SourceSpec
from holoray.errors import FormatError, HolorayError, IntegrityError, SourceError, UsageError
from holoray.pipelines.open_sources import read_sources
from holoray.pipelines.sealed_store import SealedStore
from holoray.stores import MANIFEST, MemoryStore, RemoteStore


def made(name: str, seed: int = 0) -> MemoryStore:
    store = MemoryStore(name)
    weights = np.random.default_rng(seed).standard_normal((64, 64)).astype(np.float32)
    holoray.encode({"w": weights}, store, codec="raw")
    return store


def test_a_source_with_another_root_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "holoray"):
        sealed = holoray.open(made("a"), made("other", 1), made("b"))
    assert [s.source for s in sealed.stats()] == ["a", "b"]
    assert "left out: other has root sha256:" in caplog.text


@pytest.mark.parametrize("seeds", [(0, 1), (0, 1, 1), (0, 1, 2)])
def test_nobody_agrees_with_the_first(seeds: tuple[int, ...]) -> None:
    stores = [made(f"s{i}", seed) for i, seed in enumerate(seeds)]
    with pytest.raises(IntegrityError, match=r"hold different stores: s0 has root .*; s1 has root") as caught:
        holoray.open(*stores)
    assert "--expect" in caught.value.hint
    root = holoray.open(stores[1]).root
    assert "s0" not in [s.source for s in holoray.open(*stores, expect=root).stats()]
    with pytest.raises(IntegrityError, match="no source has the expected root"):
        holoray.open(*stores, expect="sha256:" + "0" * 64)


def test_a_source_that_is_away_may_come_back(caplog: pytest.LogCaptureFixture) -> None:
    away = FaultySource(made("away"), Faults(dies_after=0))
    policy = FaultPolicy(breaker_s=0.01, backoff_s=0.01)
    with caplog.at_level(logging.WARNING, "holoray"):
        sealed = holoray.open(away, made("b"), fault_policy=policy)
    assert "does not answer yet: away" in caplog.text
    assert [s.state for s in sealed.stats()] == ["open", "healthy"]
    away.revive()
    for _ in range(1000):
        sealed.load()
        if sealed.stats()[0].state == "healthy":
            break
    assert sealed.stats()[0].received_bytes > 0


@pytest.mark.fault("dying-source")
def test_a_file_system_that_cannot_be_reached_is_a_source_that_is_away(tmp_path: Path) -> None:
    """Also where a worker opens the sources that the driver saw well."""
    holoray.encode({"w": np.ones((64, 64), np.float32)}, tmp_path / "near", codec="raw")
    sealed = holoray.open("hdfs://127.0.0.1:1/a", tmp_path / "near")
    assert [s.state for s in sealed.stats()] == ["open", "healthy"]
    pool = pickle.loads(pickle.dumps(sealed.store))  # noqa: S301
    assert (SealedStore(pool).load()["w"] == 1).all()


def test_nobody_answers() -> None:
    with pytest.raises(SourceError, match=r"no healthy source: a \(a is dead.*b is no holoray store"):
        holoray.open(FaultySource(made("a"), Faults(dies_after=0)), MemoryStore("b"))


def test_a_forged_manifest_is_read_elsewhere() -> None:
    liar = made("liar")
    liar.blobs[MANIFEST] = liar.blobs[MANIFEST][:-1] + b"x"
    assert holoray.open(liar, made("b")).load()
    with pytest.raises(IntegrityError, match="does not match its ROOT"):
        holoray.open(liar, replace_uri(liar, "second"))


def replace_uri(store: MemoryStore, uri: str) -> MemoryStore:
    other = MemoryStore(uri)
    other.blobs = dict(store.blobs)
    return other


def test_the_same_place_twice_is_a_mistake(tmp_path: Path) -> None:
    holoray.encode({"w": np.zeros(3, np.float32)}, tmp_path / "a")
    with pytest.raises(UsageError, match="named twice"):
        holoray.open(tmp_path / "a", str(tmp_path / "a"))


def test_two_endpoints_may_have_one_bucket(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What tells them apart is in no message, so they are numbered."""
    holoray.encode({"w": np.zeros(3, np.float32)}, tmp_path / "a")
    ends = [f"s3://k:hidden@b/m?endpoint_override=127.0.0.1:{port}&scheme=http&region=x" for port in (1, 2)]
    down = {name: mock.Mock(side_effect=SourceError("down")) for name in ("read", "exists", "folders")}
    with mock.patch.multiple(RemoteStore, **down):
        sealed = holoray.open(*ends, tmp_path / "a")
    assert [s.source for s in sealed.stats()] == ["s3://b/m", "s3://b/m (2)", str(tmp_path / "a")]
    assert "hidden" not in caplog.text
    for twins in ([ends[0], ends[0]], [f"{tmp_path}/a", f"{tmp_path}/./a/"]):
        with pytest.raises(UsageError, match="named twice") as caught:
            holoray.open(*twins)
        assert "hidden" not in caught.value.message


def test_shares_are_no_copies_of_each_other() -> None:
    places = [MemoryStore(f"memory:{i}") for i in range(4)]
    weights = {"w": np.ones((64, 64), np.float32)}
    holoray.encode(weights, holoray.ShareTarget(places, holoray.Shares.usable(4, 2, 3)), threads=1)
    with pytest.raises(UsageError, match="memory:0 and 2 more are shares of a store") as caught:
        holoray.open(*places[:3])
    assert "--share" in caught.value.hint
    assert "open_shares" in caught.value.hint
    enough = holoray.open_shares(places[1:])
    assert (holoray.open(places[0], enough).load()["w"] == 1).all()
    whole = MemoryStore("whole")
    whole.blobs = {n: holoray.open(enough).store.read(n, 1 << 30) for n in enough.names()}
    assert (holoray.open(places[0], places[1], whole).load()["w"] == 1).all()


def test_priorities_decide_who_is_asked() -> None:
    first, second = FaultySource(made("first"), Faults()), FaultySource(made("second"), Faults())
    holoray.open(SourceSpec(second, 1), SourceSpec(first, 0)).load()
    assert first.reads > 0
    assert second.reads == 0


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_file_of_sources(tmp_path: Path) -> None:
    file = tmp_path / "sources.toml"
    file.write_text(
        '[[source]]\nuri = "https://h/m?token=${TOKEN}"\npriority = 2\n[[source]]\nuri = "near"\n', encoding="utf-8"
    )
    assert read_sources(file, {"TOKEN": "a&b c"}) == [
        SourceSpec("https://h/m?token=a%26b%20c", 2),
        SourceSpec(tmp_path / "near", 0),
    ]
    with pytest.raises(UsageError, match="needs the environment variable TOKEN") as caught:
        read_sources(file, {"OTHER": ""})
    assert "export TOKEN" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[source]", "is no TOML"),
        ("", "lists no sources"),
        ("source = 3", "lists no sources"),
        ("source = [3]", "source 1 is no table"),
        ("[[sources]]\nuri = 'a'", "unknown key 'sources'"),
        ("[[source]]\npriority = 1", "source 1 has no uri"),
        ("[[source]]\nuri = 3", "source 1 has no uri"),
        ("[[source]]\nuri = 'a'\n[[source]]\nuri = 'b'\nurl = 'c'", "source 2 has an unknown key 'url'"),
        ("[[source]]\nuri = 'a'\npriority = -1", "priority must be"),
        ("[[source]]\nuri = 'a'\npriority = true", "priority must be"),
        ("[[source]]\nuri = 'a'\npriority = 'high'", "priority must be"),
    ],
)
def test_a_malformed_file_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.toml").write_text(text, encoding="utf-8")
    with pytest.raises(FormatError, match=message) as caught:
        read_sources(tmp_path / "s.toml")
    assert caught.value.hint


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot read"):
        read_sources(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(HolorayError, match="is no TOML"):
        read_sources(tmp_path / "binary.toml")
