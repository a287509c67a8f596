"""Loads from several sources: exact while one is honest, else at a stated and true quality; real threads, real time."""

from __future__ import annotations

import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from serving import served

import holoray
from holoray import FaultPolicy, Faults, FaultySource, SourcePool
from holoray.errors import IntegrityError, QualityError, SourceError, UsageError
from holoray.fragment import FragmentEntry
from holoray.pipelines.api import load_file
from holoray.pipelines.plan import Target
from holoray.pipelines.sealed_store import SealedStore
from holoray.stores import LocalStore, MemoryStore, Store, WrappedStore, fragment_file
from holoray.tensor import Array

Model = dict[str, Array]

QUICK = FaultPolicy(breaker_s=0.05, backoff_s=0.01, min_request_bytes=64 << 10, max_request_bytes=256 << 10)


@pytest.fixture(scope="module", params=["planes", "raw"])
def copy(request: pytest.FixtureRequest, model: Model) -> MemoryStore:
    store = MemoryStore()
    holoray.encode(model, store, codec=request.param)
    return store


def source(copy: MemoryStore, name: str, **faults: float) -> FaultySource:
    store = MemoryStore(name)
    store.blobs = dict(copy.blobs)
    return FaultySource(store, Faults(**faults))  # type: ignore[arg-type]


def assert_exact(weights: Model, model: Model) -> None:
    assert all(weights[name].tobytes() == array.tobytes() for name, array in model.items())


def pool_of(sealed: SealedStore) -> SourcePool:
    assert isinstance(sealed.store, SourcePool)
    return sealed.store


# -- what sources may do -----------------------------------------------------------------------------------


@pytest.mark.fault("lying-source", "dying-source")
@pytest.mark.parametrize(
    "faults",
    [
        {"lies": 1.0},
        {"lies": 0.3},
        {"breaks": 0.5},
        {"truncates": 0.5},
        {"refuses": 1.0},
        {"dies_after": 2},
        {"ups": 2, "downs": 2},
        {"latency_s": 0.01},
    ],
    ids=str,
)
def test_a_load_is_exact_whatever_all_other_sources_do(
    copy: MemoryStore, model: Model, faults: dict[str, float]
) -> None:
    bad = [source(copy, f"bad{i}", **(faults | {"seed": i})) for i in range(3)]
    sealed = holoray.open(*bad, source(copy, "good"), fault_policy=QUICK)
    assert_exact(sealed.load(), model)
    (good,) = [stats for stats in sealed.stats() if stats.source == "good"]
    assert good.state == "healthy"
    assert good.mismatches == good.quarantined == good.errors == 0


@pytest.mark.fault("lying-source")
def test_liars_are_suspect_or_quarantined_and_asked_no_more(copy: MemoryStore, model: Model) -> None:
    liars = [source(copy, f"liar{i}", seed=i, lies=1.0) for i in range(3)]
    policy = replace(QUICK, max_request_bytes=64 << 10)
    sealed = holoray.open(*liars, source(copy, "good"), fault_policy=policy)
    for _ in range(3):
        assert_exact(sealed.load(), model)
    asked = [liar.reads for liar in liars]
    quarantined = {s.source for s in sealed.stats() if s.state == "quarantined"}
    assert_exact(sealed.load(), model)
    stats = {s.source: s for s in sealed.stats()}
    for liar, before in zip(liars, asked, strict=True):
        if liar.uri in quarantined:
            assert liar.reads == before
        assert stats[liar.uri].mismatches <= policy.quarantine_after + policy.in_flight
        if stats[liar.uri].mismatches:
            assert stats[liar.uri].state in ("suspect", "quarantined")
    assert any(s.mismatches for s in stats.values())


def test_each_byte_is_fetched_once_from_good_sources(copy: MemoryStore, model: Model) -> None:
    sealed = holoray.open(*(source(copy, f"s{i}") for i in range(4)), fault_policy=replace(QUICK, hedge_share=0.0))
    assert_exact(sealed.load(), model)
    payloads = sum(t.stored_bytes for t in sealed.manifest.tensors)
    assert sum(s.received_bytes for s in sealed.stats()) == payloads
    assert sum(s.retries + s.errors + s.hedges for s in sealed.stats()) == 0


def test_neighbours_are_read_together(model: Model) -> None:
    copy = MemoryStore()
    holoray.encode(model, copy, codec="planes")
    alone, sources = source(copy, "alone"), [source(copy, f"s{i}") for i in range(2)]
    holoray.open(alone).load()
    sealed = holoray.open(*sources)
    sealed.load()
    assert alone.reads < sealed.manifest.fragment_count
    assert sum(s.reads for s in sources) <= alone.reads + 4  # the first requests to each are small


@pytest.mark.fault("dying-source")
def test_a_broken_connection_goes_on_where_it_broke(copy: MemoryStore, model: Model) -> None:
    """A single source that always breaks before the end would never give a whole fragment otherwise."""
    sealed = holoray.open(
        source(copy, "only", seed=1, breaks=0.7), fault_policy=replace(QUICK, max_retries=60, retry_burst=1000)
    )
    assert_exact(sealed.load(), model)
    (stats,) = sealed.stats()
    assert stats.errors > 0
    assert stats.received_bytes == sum(t.stored_bytes for t in sealed.manifest.tensors)


@pytest.mark.fault("slow-source")
def test_a_stalled_source_is_outrun(copy: MemoryStore, model: Model) -> None:
    stalled, released = source(copy, "stalled"), threading.Event()
    sealed = holoray.open(stalled, source(copy, "good"), fault_policy=replace(QUICK, hedge_burst_bytes=4 << 20))
    read = stalled.inner.read_into

    def stall(name: str, offset: int, out: memoryview) -> int:
        released.wait(60)
        return read(name, offset, out)

    with mock.patch.object(stalled.inner, "read_into", stall):
        try:
            assert_exact(sealed.load(), model)
            assert not released.is_set()
            assert sum(s.hedges + s.errors for s in sealed.stats()) > 0
        finally:
            released.set()


@pytest.mark.fault("slow-source")
def test_a_stalled_source_does_not_keep_a_store_from_opening(
    copy: MemoryStore, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holoray.pipelines.open_sources._GRACE_S", 0.01)
    stalled, released = source(copy, "stalled"), threading.Event()

    def stall(*_: object) -> int:
        return released.wait(60) - 1

    with mock.patch.object(stalled.inner, "read_into", stall):
        try:
            sealed = holoray.open(stalled, source(copy, "good"), fault_policy=QUICK)
            assert [s.source for s in sealed.stats()] == ["stalled", "good"]
        finally:
            released.set()


class Silent(MemoryStore):
    """Answers what is asked of a file once it may."""

    def __init__(self, copy: MemoryStore, uri: str, name: str) -> None:
        super().__init__(uri)
        self.blobs, self.name = dict(copy.blobs), name
        self.asked, self.released, self.answered = threading.Event(), threading.Event(), threading.Event()

    def read_into(self, name: str, offset: int, out: memoryview) -> int:
        if name != self.name:
            return super().read_into(name, offset, out)
        self.asked.set()
        self.released.wait(100)
        out[:] = b"x" * out.nbytes
        self.answered.set()
        return out.nbytes


@pytest.mark.fault("slow-source")
def test_a_manifest_is_read_from_whoever_gives_it(
    copy: MemoryStore, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holoray.pipelines.source_pool._GRACE_S", 0.01)
    silent, more = Silent(copy, "silent", "manifest.arrow"), Silent(copy, "more", "manifest.arrow")
    try:
        sealed = holoray.open(silent, source(copy, "good"), fault_policy=QUICK)
        assert silent.asked.is_set()
        assert_exact(sealed.load(), model)
        quick = replace(QUICK, deadline_s=0.05, slowest_bytes_per_s=1e12)
        with pytest.raises(SourceError, match=r"silent .*no answer within .*more .*no answer within"):
            holoray.open(silent, more, fault_policy=quick)
    finally:
        silent.released.set()
        more.released.set()


def test_who_comes_late_changes_nothing(copy: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holoray.pipelines.source_pool._GRACE_S", 0.01)
    late = Silent(copy, "late", fragment_file(1))
    pool = pool_of(holoray.open(late, source(copy, "good"), fault_policy=QUICK))
    out = bytearray(1000)
    assert pool.read_into(fragment_file(1), 8, memoryview(out)) == 1000
    late.released.set()
    assert late.answered.wait(100)
    assert out == copy.blobs[fragment_file(1)][8:1008]


# -- when nobody can help ----------------------------------------------------------------------------------------


@pytest.mark.fault("no-source")
def test_all_sources_gone_names_each_and_keeps_what_is_there(model: Model) -> None:
    copy = MemoryStore()
    holoray.encode(model, copy, codec="planes")
    sources = [source(copy, f"s{i}") for i in range(2)]
    sealed = holoray.open(*sources, fault_policy=replace(QUICK, patience_s=0.3, max_backoff_s=0.05, hedge_share=0.0))
    loader = sealed.loader()
    reached = loader.load(Target(quality=0.9))
    kept = {name: array.copy() for name, array in loader.state_dict().items() if name == "layers.0.mlp.weight"}
    for one in sources:
        one.faults = Faults(dies_after=0)
    with pytest.raises(SourceError, match=r"no healthy source .*s0 \(open\): s0 is dead.*s1 \(open\): s1 is dead"):
        loader.load()
    assert loader.quality.ratio == reached.ratio
    assert all(loader.state_dict()[name].tobytes() == array.tobytes() for name, array in kept.items())
    sources[1].revive()
    loader.load()
    assert_exact(loader.state_dict(), model)


def _corrupted(copy: MemoryStore, sealed: SealedStore, tensor: str, index: int) -> MemoryStore:
    entry = sealed.entry(tensor).fragments[index]
    store, name = MemoryStore("bad"), fragment_file(entry.file)
    blob = bytearray(copy.blobs[name])
    blob[entry.offset] ^= 1
    store.blobs = copy.blobs | {name: bytes(blob)}
    return store


def _quality_without(sealed: SealedStore, lost: Callable[[FragmentEntry], bool]) -> float:
    """What is left without some fragments, and without what requires them, from the gains of the manifest."""
    error = total = 0.0
    for tensor in sealed.manifest.tensors:
        gone: set[int] = set()
        for entry in tensor.fragments:  # a prerequisite comes before what requires it
            if lost(entry) or entry.requires in gone:
                gone.add(entry.index)
                error += entry.gain
            total += entry.gain
    return 1 - error / total


@pytest.mark.fault("missing")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("cut", ["truncated", "missing"])
def test_a_file_that_is_short_everywhere(cut: str, count: int, model: Model, tmp_path: Path) -> None:
    """As if what is behind its end were corrupt, and at once; but not while somebody is silent who may have it."""
    holoray.encode(model, tmp_path / "0")
    whole = holoray.open(tmp_path / "0")
    number = whole.manifest.files[-1].number
    file, end = tmp_path / "0" / fragment_file(number), 0
    if cut == "missing":
        file.unlink()
    else:
        end = file.stat().st_size // 2
        os.truncate(file, end)
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    places = [tmp_path / str(i) for i in range(count)]
    skipping = FaultPolicy(skip_corrupted=True)  # patience and breakers of everybody
    loader = holoray.open(*places, fault_policy=skipping).loader()
    expected = _quality_without(whole, lambda e: e.file == number and e.offset + e.stored_bytes > end)
    assert 0 < expected < 1
    assert loader.load().ratio == pytest.approx(expected, abs=1e-12)
    reached = load_file(holoray.open(*places, fault_policy=skipping), tmp_path / "out.safetensors")
    assert reached.skipped == whole.manifest.fragment_count - loader.fragments_read > 0
    with pytest.raises(SourceError, match="no healthy source"):
        holoray.open(*places, fault_policy=FaultPolicy()).load()
    silent = source(_memory_copy(tmp_path / "1"), "silent", dies_after=0)
    impatient = replace(QUICK, skip_corrupted=True, patience_s=0.2)
    with pytest.raises(SourceError, match="silent is dead"):
        holoray.open(*places, silent, fault_policy=impatient).load()


def _memory_copy(path: Path) -> MemoryStore:
    store = MemoryStore()
    store.blobs = {file.name: file.read_bytes() for file in path.iterdir()}
    return store


@pytest.mark.fault("lost-share")
def test_shares_that_are_lost_are_skipped(model: Model) -> None:
    """Files of which too few shares are left are lost, unless another source has them or may have them."""
    shares = holoray.Shares.usable(4, 2, 3)
    places = [MemoryStore(f"memory:{i}") for i in range(4)]
    holoray.encode(model, holoray.ShareTarget(places, shares), threads=1)
    few, others = holoray.open_shares(places[:2]), holoray.open_shares(places[1:3])
    skipping = replace(QUICK, skip_corrupted=True)
    sealed = holoray.open(few, others, fault_policy=skipping)
    lost = set(sealed.manifest.lost)
    assert lost == set(holoray.open(few).manifest.lost)
    assert lost
    expected = _quality_without(sealed, lambda e: e.file in lost)
    assert sealed.loader().load().ratio == pytest.approx(expected, abs=1e-12)
    for policy in (QUICK, replace(skipping, min_quality=expected + 1e-9)):
        with pytest.raises(QualityError, match=f"quality {expected:.5f}"):
            holoray.open(few, fault_policy=policy).load()
    assert_exact(holoray.open(few, holoray.open_shares(places), fault_policy=QUICK).load(), model)


@pytest.mark.fault("lying-source", "missing")
@pytest.mark.parametrize("count", [1, 3])
def test_corrupt_everywhere(count: int, model: Model, tmp_path: Path) -> None:
    """An error that names it; or, if it is to be skipped, the quality that all others make."""
    copy = MemoryStore()
    holoray.encode(model, copy, codec="planes")
    whole = holoray.open(copy)
    tensor, index = "embed.weight", 3
    bad = [_corrupted(copy, whole, tensor, index) for _ in range(count)]
    with pytest.raises(IntegrityError) as caught:
        holoray.open(*bad, fault_policy=QUICK).load()
    assert (caught.value.tensor, caught.value.fragment) == (tensor, index)

    sealed = holoray.open(*bad, fault_policy=replace(QUICK, skip_corrupted=True))
    loader = sealed.loader()
    quality = loader.load()
    entries = sealed.entry(tensor).fragments
    gone, changed = {index}, True
    while changed:
        more = {e.index for e in entries if e.requires in gone} - gone
        gone, changed = gone | more, bool(more)
    lost = sum(entries[i].gain for i in gone)
    assert len(gone) > 1
    assert quality.ratio == pytest.approx(1 - lost / quality.energy, abs=1e-12)
    assert not quality.complete
    truth, found = model[tensor].astype(np.float64), loader.state_dict()[tensor].astype(np.float64)
    assert np.sum((truth - found) ** 2) == pytest.approx(lost, rel=1e-6)
    others = {name: array for name, array in model.items() if name != tensor}
    assert_exact(loader.state_dict(), others)
    assert all(s.state != "quarantined" for s in sealed.stats())  # nobody is known to have lied

    report = load_file(sealed, tmp_path / "out.safetensors")
    assert report.skipped == len(gone)
    assert report.quality == quality.ratio

    strict = holoray.open(*bad, fault_policy=replace(QUICK, skip_corrupted=True, min_quality=quality.ratio + 1e-9))
    with pytest.raises(QualityError, match="ended at quality"):
        strict.load()
    with pytest.raises(QualityError):
        load_file(strict, tmp_path / "not.safetensors")
    assert not (tmp_path / "not.safetensors").exists()
    enough = holoray.open(*bad, fault_policy=replace(QUICK, skip_corrupted=True, min_quality=quality.ratio - 1e-9))
    enough.load()


@pytest.mark.fault("lying-source")
def test_a_mandatory_tensor_cannot_be_skipped(model: Model, tmp_path: Path) -> None:
    """Integers have no energy: without them the quality would be 1 all the same."""
    copy = MemoryStore()
    holoray.encode(model, copy)
    bad = _corrupted(copy, holoray.open(copy), "position_ids", 0)
    sealed = holoray.open(bad, fault_policy=replace(QUICK, skip_corrupted=True))
    for load in (sealed.load, lambda: load_file(sealed, tmp_path / "out.safetensors")):
        with pytest.raises(QualityError, match="no quality can be had") as caught:
            load()
        assert caught.value.tensor == "position_ids"
    assert not (tmp_path / "out.safetensors").exists()


def test_a_corrupt_landing_leaves_zeros(model: Model) -> None:
    copy = MemoryStore()
    holoray.encode(model, copy, codec="raw", compression="none")
    bad = _corrupted(copy, holoray.open(copy), "embed.weight", 0)
    for stores in ((bad,), (bad, bad)):
        found = holoray.open(*stores, fault_policy=replace(QUICK, skip_corrupted=True)).load()["embed.weight"]
        flat = found.reshape(-1).view(np.uint8)
        assert not flat[: 1 << 20].any()
        assert flat[1 << 20 :].tobytes() == model["embed.weight"].reshape(-1).view(np.uint8)[1 << 20 :].tobytes()


# -- the pool as a store ----------------------------------------------------------------------------------------


def test_a_pool_travels_by_pickle(copy: MemoryStore, model: Model, tmp_path: Path) -> None:
    roots = [holoray.encode(model, tmp_path / name).root for name in ("a", "b")]
    sealed = holoray.open(tmp_path / "a", tmp_path / "b", fault_policy=QUICK)
    pool = pickle.loads(pickle.dumps(sealed.store))  # noqa: S301
    assert pool.root == roots[0] == roots[1]
    assert pool.policy == QUICK
    assert_exact(SealedStore(pool).load(), model)
    assert [s.source for s in pool.stats()] == [str(tmp_path / "a"), str(tmp_path / "b")]


def test_a_single_local_store_is_read_as_ever(tmp_path: Path, model: Model) -> None:
    holoray.encode(model, tmp_path / "a")
    sealed = holoray.open(tmp_path / "a")
    assert isinstance(sealed.store, LocalStore)
    assert not sealed.strict
    assert sealed.stats() == []
    before = threading.active_count()
    one = holoray.open(tmp_path / "a", fault_policy=QUICK)
    seen = []
    one.load(on_fragment=lambda *_: seen.append([t.name for t in threading.enumerate()]))
    assert not any("holoray-source" in names for names in seen)  # no thread besides those of the pipeline
    assert threading.active_count() == before
    assert not one.strict


def test_a_wrapper_passes_everything_on(copy: MemoryStore, model: Model) -> None:
    """Also what a store of several copies or shares does itself; unless the wrapper has reads of its own."""
    questions = {name for name in vars(Store) if not name.startswith("_")} - {"uri", "remote", "in_process"}
    assert questions <= set(vars(WrappedStore))
    liar, good = source(copy, "liar", lies=1.0), source(copy, "good")
    pool = pool_of(holoray.open(liar, good, fault_policy=QUICK))
    assert_exact(SealedStore(WrappedStore(pool)).load(), model)
    with pytest.raises(IntegrityError):
        SealedStore(FaultySource(WrappedStore(pool), Faults(lies=1.0))).load()
    places = [MemoryStore(f"memory:{i}") for i in range(4)]
    holoray.encode(model, holoray.ShareTarget(places, holoray.Shares.usable(4, 2, 3)), threads=1)
    few = holoray.open_shares(places[:2])
    wrapped = SealedStore(WrappedStore(few))
    assert wrapped.manifest.lost == SealedStore(few).manifest.lost
    assert wrapped.store.notes() == few.notes()


def test_nothing_is_written_through_a_pool(copy: MemoryStore) -> None:
    pool = pool_of(holoray.open(source(copy, "a"), source(copy, "b")))
    writes: list[Callable[[], object]] = [
        lambda: pool.create("a"),
        lambda: pool.delete("a"),
        pool.exclusive,
        pool.replacement,
    ]
    for write in writes:
        with pytest.raises(UsageError, match="only be read"):
            write()
    assert pool.exists("ROOT")
    assert "manifest.arrow" in list(pool.names())
    assert pool.size("ROOT") == 72
    with pytest.raises(SourceError, match=r"no healthy source for nothing\.arrow"):
        pool.size("nothing.arrow")


def test_lost_threads_end(copy: MemoryStore, model: Model) -> None:
    """Whoever was outrun ends by itself, and gives its memory back."""
    sealed = holoray.open(source(copy, "slow", bytes_per_s=2e5), source(copy, "good"), fault_policy=QUICK)
    assert_exact(sealed.load(), model)
    deadline = time.monotonic() + 60
    while any(t.name == "holoray-source" for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert all(s.held_bytes == s.in_flight == 0 for s in pool_of(sealed)._book.sources)
    assert pool_of(sealed)._memory.used_bytes == 0


# -- over HTTP ------------------------------------------------------------------------------------------------


def test_over_http_servers_that_break_and_refuse(tmp_path: Path, model: Model) -> None:
    holoray.encode(model, tmp_path / "store")
    with served(tmp_path) as good, served(tmp_path) as short, served(tmp_path) as refusing:
        sealed = holoray.open(*(f"{s.url}/store" for s in (short, refusing, good)), fault_policy=QUICK)
        short.mode, refusing.mode = "short", 503
        assert_exact(sealed.load(), model)
        assert_exact(sealed.load(), model)
        stats = {s.source: s for s in sealed.stats()}
        assert stats[f"{refusing.url}/store"].errors > 0
        assert "503" in str(stats[f"{refusing.url}/store"].last_error)
        assert good.requests["GET"] > 0
