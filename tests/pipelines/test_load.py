"""Load: targets, continuing, what is reported, and what a damaged store does."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import holoray
from holoray.errors import CapacityError, IntegrityError, QualityError, SourceError, UsageError
from holoray.pipelines.api import load_file
from holoray.pipelines.plan import Target
from holoray.pipelines.sealed_store import SealedStore
from holoray.stores import MemoryStore
from holoray.tensor import Array

Model = dict[str, Array]


@pytest.fixture(scope="module", params=["planes", "spectral", "raw"])
def sealed(request: pytest.FixtureRequest, model: Model) -> SealedStore:
    store = MemoryStore()
    holoray.encode(model, store, codec=request.param)
    return holoray.open(store)


def true_quality(got: Model, model: Model) -> float:
    error = energy = 0.0
    for name, array in model.items():
        if array.dtype.kind == "i":
            continue
        truth = array.astype(np.float64)
        finite = np.isfinite(truth)
        error += float(np.sum((got[name].astype(np.float64)[finite] - truth[finite]) ** 2))
        energy += float(np.sum(truth[finite] ** 2))
    return 1 - error / energy


@pytest.mark.parametrize("quality", [0.2, 0.7, 0.95, 0.999])
def test_a_quality_is_reached_and_true(sealed: SealedStore, model: Model, quality: float) -> None:
    loader = sealed.loader()
    reached = loader.load(Target(quality=quality))
    assert reached.ratio >= quality
    assert reached.ratio == pytest.approx(true_quality(loader.state_dict(), model), abs=1e-4)
    assert loader.bytes_read < sealed.manifest.bytes_stored


def test_every_point_of_the_curve_is_what_a_load_of_those_bytes_gives(sealed: SealedStore, model: Model) -> None:
    curve = sealed.quality_curve()
    assert curve[0][0] == len(sealed.manifest.encoded)
    assert curve[-1][1] == pytest.approx(1.0, abs=1e-12)
    best = -math.inf
    for nbytes, quality in curve[:: max(1, len(curve) // 7)]:
        try:
            loader = sealed.loader()
            loader.load(Target(bytes=nbytes))
        except CapacityError:
            continue
        best = max(best, quality)
        assert loader.bytes_read <= nbytes
        assert loader.quality.ratio >= quality - 1e-12
        assert true_quality(loader.state_dict(), model) == pytest.approx(loader.quality.ratio, abs=1e-4)
    assert best > 0.5


def test_too_few_bytes_for_what_is_mandatory(sealed: SealedStore) -> None:
    with pytest.raises(CapacityError, match="mandatory"):
        sealed.load(bytes=len(sealed.manifest.encoded))


def test_given_fragments(sealed: SealedStore, model: Model) -> None:
    loader = sealed.loader()
    loader.load(Target(fragments=(0, 2, 5)))
    assert loader.quality.ratio == pytest.approx(true_quality(loader.state_dict(), model), abs=1e-4)
    only_first = sealed.loader()
    only_first.load(Target(fragments=(0,)))
    # Layers 2 and 5 lack layer 1; the largest raw tensor has two runs; any share of coefficients helps.
    more = loader.bytes_read > only_first.bytes_read
    assert more is any(t.codec == "spectral" for t in sealed.manifest.tensors)


def test_loads_go_on_from_where_they_stopped(sealed: SealedStore, model: Model) -> None:
    loader = sealed.loader()
    seen: list[tuple[str, int]] = []
    for target in (Target(fragments=(0,)), Target(quality=0.9), Target(quality=0.5), Target()):
        loader.load(target, lambda name, index, quality: seen.append((name, index)))
    assert len(seen) == len(set(seen)) == sealed.manifest.fragment_count
    whole = sealed.load()
    for name, array in loader.state_dict().items():
        assert array.tobytes() == whole[name].tobytes()
    payloads = sum(t.stored_bytes for t in sealed.manifest.tensors)
    assert loader.bytes_read == payloads + len(sealed.manifest.encoded)


def test_the_callback_sees_every_fragment_and_a_rising_total(sealed: SealedStore) -> None:
    seen: list[tuple[str, int, float]] = []
    sealed.load(on_fragment=lambda *row: seen.append(row))
    assert len({(name, index) for name, index, _ in seen}) == len(seen) == sealed.manifest.fragment_count
    assert seen[-1][2] == pytest.approx(1.0, abs=1e-12)


def test_a_file_holds_what_memory_would(sealed: SealedStore, tmp_path: Path) -> None:
    from holoray.checkpoint import open_checkpoint

    for target in (Target(quality=0.5), Target()):
        report = load_file(sealed, tmp_path / "x.safetensors", target)
        loader = sealed.loader()
        loader.load(target)
        assert report.bytes_read == loader.bytes_read
        assert report.quality == loader.quality.ratio
        checkpoint = open_checkpoint(tmp_path / "x.safetensors")
        for name, array in loader.state_dict().items():
            assert checkpoint.read(name).tobytes() == array.tobytes(), name


@pytest.mark.fault("missing")
def test_unreachable_qualities(model: Model) -> None:
    store = MemoryStore()
    holoray.encode({"w": model["layers.0.mlp.weight"]}, store, codec="spectral")
    sealed = holoray.open(store)
    with pytest.raises(QualityError, match="not reachable"):
        sealed.load(quality=1 - 1e-16)
    assert sealed.load(quality=1.0)
    for bad in (0.0, 1.5, math.nan):
        with pytest.raises(UsageError):
            sealed.load(quality=bad)


def _damaged(model: Model, file: str, change: object) -> SealedStore:
    store = MemoryStore()
    holoray.encode(model, store)
    assert callable(change)
    store.blobs[file] = change(store.blobs[file])
    return holoray.open(store)


@pytest.mark.fault("flipped")
def test_a_damaged_fragment_is_named(model: Model) -> None:
    intact = MemoryStore()
    holoray.encode(model, intact)
    entry = holoray.open(intact).manifest.tensors[0].fragments[3]
    file = f"fragments-{entry.file:05d}.arrow"

    def flip(blob: bytes) -> bytes:
        return blob[: entry.offset] + bytes([blob[entry.offset] ^ 1]) + blob[entry.offset + 1 :]

    sealed = _damaged(model, file, flip)
    with pytest.raises(IntegrityError, match=f"3 of tensor 'embed.weight' in {file}") as caught:
        sealed.load()
    assert (caught.value.tensor, caught.value.fragment) == ("embed.weight", 3)
    assert "verify" in caught.value.hint
    assert [(b.file, b.tensor, b.fragment) for b in sealed.verify()] == [(file, "embed.weight", 3)]
    loader = sealed.loader()
    loader.load(Target(fragments=(0,)))  # what does not need the damaged fragment still loads
    assert loader.quality.ratio > 0.8


@pytest.mark.fault("missing", "truncated")
def test_missing_and_short_files(model: Model) -> None:
    store = MemoryStore()
    holoray.encode(model, store)
    name = sorted(n for n in store.blobs if n.startswith("fragments"))[2]
    whole = store.blobs.pop(name)
    sealed = holoray.open(store)
    with pytest.raises(SourceError):
        sealed.load()
    assert {b.why.split(":")[0] for b in sealed.verify()} == {"missing", "its file is missing"}
    store.blobs[name] = whole[:-100]
    with pytest.raises(holoray.FormatError):
        sealed.load()
    assert sealed.verify()
    store.blobs[name] = whole + b"x"
    assert [b.why for b in sealed.verify()] == [f"has {len(whole) + 1} bytes instead of {len(whole)}"]


@pytest.mark.fault("replayed", "downgraded")
def test_the_root_is_checked(model: Model) -> None:
    store = MemoryStore()
    root = holoray.encode(model, store).root
    assert holoray.open(store, expect=root).load()
    with pytest.raises(IntegrityError, match="not the expected one"):
        holoray.open(store, expect="sha256:" + "0" * 64)
    with pytest.raises(UsageError):
        holoray.open(store, expect="md5:abc")
    manifest = store.blobs["manifest.arrow"]
    store.blobs["manifest.arrow"] = manifest[:-1] + bytes([manifest[-1] ^ 1])
    with pytest.raises(IntegrityError, match="does not match"):
        holoray.open(store)


@pytest.mark.fault("bomb")
def test_a_grown_file_is_not_read_into_memory(model: Model, tmp_path: Path) -> None:
    import resource

    holoray.encode(model, tmp_path)
    name = "fragments-00001.arrow"
    size = (tmp_path / name).stat().st_size
    with open(tmp_path / name, "r+b") as file:
        file.truncate(4 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert [(b.file, b.why) for b in holoray.open(tmp_path).verify()] == [
        (name, f"has {4 << 30} bytes instead of {size}")
    ]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_the_working_directory_may_change(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    holoray.encode(model, "s")
    sealed = holoray.open("s")
    monkeypatch.chdir("/")
    assert set(sealed.load()) == set(model)


@pytest.mark.parametrize("target", ["", ".", "directory", "a\0b", "missing/x"])
def test_targets_that_cannot_be_written(
    target: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory").mkdir()
    store = MemoryStore()
    holoray.encode(model, store)
    with pytest.raises(SourceError):
        load_file(holoray.open(store), target)
    assert [p.name for p in tmp_path.iterdir()] == ["directory"]


def test_fragments_that_nobody_has(sealed: SealedStore) -> None:
    with pytest.raises(UsageError, match="alone"):
        sealed.load(fragments=(99,))


def test_places_that_are_no_store(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no holoray store"):
        holoray.open(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no scheme that is known"):
        holoray.open("floppy://a/x")
    assert not (tmp_path / "nowhere").exists()


RUN = 1 << 20
LANDED: Model = {"w": np.random.default_rng(2).integers(0, 255, 3 * RUN).astype(np.uint8)}


def _landed(change: Callable[[bytearray, int], None]) -> SealedStore:
    """A store whose payloads are read to where they stay, with something changed in the second of three."""
    store = MemoryStore()
    holoray.encode(LANDED, store, compression="none")
    sealed = holoray.open(store)
    entry = sealed.manifest.tensors[0].fragments[1]
    name = f"fragments-{entry.file:05d}.arrow"
    data = bytearray(store.blobs[name])
    change(data, entry.offset)
    store.blobs[name] = bytes(data)
    return sealed


def _flip(data: bytearray, offset: int) -> None:
    data[offset + 100] ^= 1


@pytest.mark.fault("flipped")
def test_a_bad_fragment_that_is_read_in_place_is_named() -> None:
    with pytest.raises(IntegrityError) as caught:
        _landed(_flip).load()
    assert (caught.value.tensor, caught.value.fragment) == ("w", 1)


@pytest.mark.fault("flipped")
def test_what_was_read_in_place_and_was_bad_is_not_kept() -> None:
    """Zeros where nothing true is known, and a later load brings the rest."""
    sealed = _landed(_flip)
    loader = sealed.loader()
    with pytest.raises(IntegrityError):
        loader.load()
    assert not loader.state_dict()["w"][RUN : 2 * RUN].any()
    assert isinstance(sealed.store, MemoryStore)
    name = f"fragments-{sealed.manifest.tensors[0].fragments[1].file:05d}.arrow"
    data = bytearray(sealed.store.blobs[name])
    _flip(data, sealed.manifest.tensors[0].fragments[1].offset)
    sealed.store.blobs[name] = bytes(data)
    loader.load()
    np.testing.assert_array_equal(loader.state_dict()["w"], LANDED["w"])


@pytest.mark.fault("truncated", "changing-file")
@pytest.mark.parametrize("codec", ["raw", "spectral"])
def test_a_short_payload_is_told_as_one(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that became shorter after its size was looked at; what lies in the buffer behind is of somebody else."""
    monkeypatch.setattr("holoray.pipelines.loader.check_sizes", lambda *_: None)
    store = MemoryStore()
    holoray.encode({"w": np.random.default_rng(0).standard_normal((90, 90)).astype(np.float32)}, store, codec=codec)
    sealed = holoray.open(store)
    last = max(sealed.manifest.tensors[0].fragments, key=lambda f: (f.file, f.offset))
    name = f"fragments-{last.file:05d}.arrow"
    for kept in (0, 1, last.stored_bytes - 1):
        whole = store.blobs[name]
        store.blobs[name] = whole[: last.offset + kept]
        with pytest.raises(IntegrityError, match=f"truncated: {kept} of {last.stored_bytes} bytes"):
            sealed.load()
        store.blobs[name] = whole
