"""Encode: policies, determinism, resuming, and what is refused."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holoray
from holoray.checkpoint import save_checkpoint
from holoray.errors import FormatError, SourceError, UsageError
from holoray.pipelines import store_writer
from holoray.stores import LocalStore, MemoryStore
from holoray.tensor import Array, as_bytes

Model = dict[str, Array]


def assert_same(got: Model, expected: Model) -> None:
    assert list(got) == list(expected)
    for name, array in expected.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
        np.testing.assert_array_equal(as_bytes(got[name]), as_bytes(np.ascontiguousarray(array)), err_msg=name)


@pytest.mark.parametrize("compression", ["zstd", "lz4", "none"])
@pytest.mark.parametrize("codec", ["planes", "raw"])
def test_exact_codecs_give_the_checkpoint_back(model: Model, codec: str, compression: str) -> None:
    store = MemoryStore()
    report = holoray.encode(model, store, codec=codec, compression=compression)
    sealed = holoray.open(store)
    assert_same(sealed.load(), model)
    assert report.root == sealed.root
    assert report.tensors == len(model)
    assert report.bytes_in == sum(a.nbytes for a in model.values())
    assert report.bytes_stored == sum(len(blob) for blob in store.blobs.values())
    assert report.fragments == sealed.manifest.fragment_count
    assert sealed.verify() == []


def test_what_is_mandatory(model: Model) -> None:
    store = MemoryStore()
    holoray.encode(model, store, codec="spectral")
    mandatory = {t.name for t in holoray.open(store).manifest.tensors if t.mandatory}
    assert mandatory == {"layers.0.attention.bias", "layers.1.broken.weight", "layers.1.empty", "position_ids"}
    holoray.encode(model, store, codec="planes", overwrite=True)
    manifest = holoray.open(store).manifest
    assert manifest.tensors[manifest.by_name["layers.1.broken.weight"]].codec == "planes"
    assert [f.order for t in manifest.tensors if t.mandatory for f in t.fragments] == [0, 1, 2]


def test_patterns_choose_and_the_first_match_wins(model: Model) -> None:
    store = MemoryStore()
    holoray.encode(model, store, codec="raw", pattern=["embed.*=planes", "*.weight=spectral", "embed.*=raw"])
    codecs = {t.name: t.codec for t in holoray.open(store).manifest.tensors}
    assert codecs["embed.weight"] == "planes"
    assert codecs["layers.0.mlp.weight"] == "spectral"
    assert codecs["layers.0.attention.bias"] == "raw"
    assert codecs["layers.1.broken.weight"] == "raw"


def test_casts(model: Model) -> None:
    import ml_dtypes

    store = MemoryStore()
    holoray.encode(model, store, dtype="bf16")
    got = holoray.open(store).load()
    for name, array in model.items():
        cast = array if array.dtype.kind == "i" else array.astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(as_bytes(got[name]), as_bytes(cast))
    with pytest.raises(FormatError, match="beyond the range"):
        holoray.encode({"x": np.full((70, 70), 1e6, np.float32)}, MemoryStore(), dtype="f16")


@pytest.mark.parametrize(
    "options",
    [
        {"codec": "planes"},
        {"codec": "raw"},
        {"codec": "spectral", "essential": 0.1},
        {"codec": "projection", "coefficients": "float16"},
        {"codec": "lowrank", "essential": 0.1},
        {"codec": "lowrank", "rank": 20, "coefficients": "float16"},
        {"codec": "auto"},
    ],
    ids=str,
)
def test_the_store_does_not_depend_on_the_number_of_threads(model: Model, options: dict[str, Any]) -> None:
    one, *others = (MemoryStore() for _ in range(3))
    holoray.encode(model, one, threads=1, **options)
    for threads, store in zip((2, 5), others, strict=True):
        holoray.encode(model, store, threads=threads, **options)
        assert one.blobs == store.blobs
    seeded = MemoryStore()
    holoray.encode(model, seeded, seed=1, **options)
    assert (seeded.blobs["ROOT"] == one.blobs["ROOT"]) is False


@pytest.mark.parametrize(
    "options",
    [
        {"codec": "zip"},
        {"compression": "brotli"},
        {"dtype": "int8"},
        {"pattern": ["no codec"]},
        {"pattern": ["*=zip"]},
        {"fragments": 0},
        {"fragments": 5000},
        {"seed": -1},
        {"tile": -1},
        {"essential": -0.1},
        {"essential": 1.0},
        {"essential": float("nan")},
        {"essential": "much"},
        {"rank": -1},
        {"rank": 1.5},
        {"energy": 1.1},
        {"energy": float("inf")},
        {"coefficients": "float64"},
        {"pattern": ["*=automatic"]},
    ],
    ids=str,
)
def test_options_without_meaning(options: dict[str, object], model: Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        holoray.encode(model, tmp_path / "s", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "s").exists()


def test_a_sealed_store_is_not_overwritten_by_accident(model: Model, tmp_path: Path) -> None:
    holoray.encode(model, tmp_path)
    root = (tmp_path / "ROOT").read_text()
    with pytest.raises(UsageError, match="already"):
        holoray.encode(model, tmp_path, codec="raw")
    assert (tmp_path / "ROOT").read_text() == root
    holoray.encode(model, tmp_path, codec="raw", overwrite=True)
    assert (tmp_path / "ROOT").read_text() != root
    assert_same(holoray.open(tmp_path).load(), model)


@pytest.mark.fault("disk-full")
def test_a_failed_overwrite_leaves_the_old_store(model: Model, tmp_path: Path) -> None:
    root = holoray.encode(model, tmp_path).root
    with pytest.raises(FormatError):
        holoray.encode(
            {"ok": model["embed.weight"], "x": np.full((300, 400), 1e30)}, tmp_path, overwrite=True, dtype="f16"
        )
    sealed = holoray.open(tmp_path, expect=root)
    assert_same(sealed.load(), model)
    assert sealed.verify() == []
    fresh = holoray.encode(model, tmp_path, codec="raw", overwrite=True)
    other = MemoryStore()
    assert holoray.encode(model, other, codec="raw").root == fresh.root  # numbering does not depend on history
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(other.blobs)


def test_other_files_in_the_directory_are_left_alone(model: Model, tmp_path: Path) -> None:
    foreign = ["notes.txt", "fragments-notes.txt", "film.partial", "encode-me.arrow"]
    for name in foreign:
        (tmp_path / name).write_text(name)
    holoray.encode(model, tmp_path)
    holoray.encode(model, tmp_path, overwrite=True)
    assert [(tmp_path / name).read_text() for name in foreign] == foreign
    assert holoray.open(tmp_path).verify() == []


def test_arrays_in_memory_fill_several_segments(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "SEGMENT_BYTES", 1)
    store = MemoryStore()
    holoray.encode(model, store)
    assert_same(holoray.open(store).load(), model)


def test_many_files_need_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(store_writer, "SEGMENT_BYTES", 1)
    rng = np.random.default_rng(0)
    model = {str(i): rng.standard_normal((70, 70)).astype(np.float32) for i in range(60)}
    holoray.encode(model, tmp_path)
    assert len(list(tmp_path.glob("fragments-*"))) > 300
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        sealed = holoray.open(tmp_path)
        assert_same(sealed.load(), model)
        assert sealed.verify() == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_numpy_integers_are_integers(model: Model) -> None:
    one, two = MemoryStore(), MemoryStore()
    holoray.encode(model, one, codec="spectral", fragments=np.int64(5), seed=np.uint8(3))  # type: ignore[arg-type]
    holoray.encode(model, two, codec="spectral", fragments=5, seed=3)
    assert one.blobs == two.blobs
    for bad in ({"fragments": "8"}, {"seed": 1.5}, {"tile": None}):
        with pytest.raises(UsageError, match="whole number"):
            holoray.encode(model, MemoryStore(), **bad)


@pytest.mark.fault("not-finite")
def test_float64_values_whose_squares_overflow(tmp_path: Path) -> None:
    model = {"x": np.full((600, 500), 1.1e151), "y": np.full((600, 500), 1e300)}
    holoray.encode(model, tmp_path)
    assert_same(holoray.open(tmp_path).load(), model)


def test_a_missing_input_leaves_no_store(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        holoray.encode(tmp_path / "no.safetensors", tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_tensor_digests_are_those_of_the_bytes(model: Model) -> None:
    store = MemoryStore()
    holoray.encode(model, store)
    for entry in holoray.open(store).manifest.tensors:
        assert entry.sha256 == hashlib.sha256(as_bytes(model[entry.name]).tobytes()).digest()


def test_metadata_of_the_checkpoint_survives(tmp_path: Path) -> None:
    from holoray.formats.safetensors import SafetensorsFile
    from holoray.pipelines.api import load_file

    save_checkpoint(tmp_path / "in.safetensors", {"a": np.ones(3, np.float32)}, {"format": "pt"})
    holoray.encode(tmp_path / "in.safetensors", tmp_path / "s")
    load_file(holoray.open(tmp_path / "s"), tmp_path / "out.safetensors")
    assert SafetensorsFile(tmp_path / "out.safetensors").metadata == {"format": "pt"}


class _StopError(Exception):
    pass


def _interrupted(path: Path, store: Path, after: int) -> None:
    """An encode that ends by an exception after `after` tensors, with a segment for each."""
    count = 0

    def stop(name: str, nbytes: int) -> None:
        nonlocal count
        count += 1
        if count == after:
            raise _StopError

    with pytest.raises(_StopError):
        holoray.encode(path, store, on_tensor=stop)


@pytest.mark.fault("killed-encode")
@pytest.mark.parametrize("after", [1, 3, 6])
def test_an_interrupted_encode_resumes(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    monkeypatch.setattr(store_writer, "SEGMENT_BYTES", 1)
    checkpoint = tmp_path / "in.safetensors"
    save_checkpoint(checkpoint, model)
    _interrupted(checkpoint, tmp_path / "s", after)
    with pytest.raises(SourceError, match="interrupted"):
        holoray.open(tmp_path / "s")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "s").glob("fragments-*.arrow")}
    assert before
    report = holoray.encode(checkpoint, tmp_path / "s")
    kept = {n: t for n, t in before.items() if (tmp_path / "s" / n).stat().st_mtime_ns == t}
    assert kept == before
    assert_same(holoray.open(tmp_path / "s").load(), {n: model[n] for n in _order(checkpoint)})
    assert holoray.open(tmp_path / "s").verify() == []
    assert not list((tmp_path / "s").glob("encode-*"))
    assert report.tensors == len(model)


def _order(checkpoint: Path) -> list[str]:
    from holoray.checkpoint import open_checkpoint

    return [spec.name for spec in open_checkpoint(checkpoint).specs]


@pytest.mark.fault("killed-encode")
def test_journals_of_another_encode_are_not_taken(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_writer, "SEGMENT_BYTES", 1)
    checkpoint = tmp_path / "in.safetensors"
    save_checkpoint(checkpoint, model)
    _interrupted(checkpoint, tmp_path / "s", 4)
    changed = {n: a.copy() for n, a in model.items()}
    changed["embed.weight"][0, 0] = 7
    save_checkpoint(checkpoint, changed)
    holoray.encode(checkpoint, tmp_path / "s")
    got = holoray.open(tmp_path / "s").load()
    assert float(got["embed.weight"][0, 0]) == 7.0
    monkeypatch.setattr(store_writer, "SEGMENT_BYTES", 2 << 30)
    clean = MemoryStore()
    holoray.encode(checkpoint, clean)
    assert_same(got, holoray.open(clean).load())


@pytest.mark.fault("killed-encode")
def test_a_journal_whose_files_are_not_whole_is_not_taken(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Journals are written after their files; a disk that was repaired since may still have cut one."""
    monkeypatch.setattr(store_writer, "SEGMENT_BYTES", 1)
    checkpoint = tmp_path / "in.safetensors"
    save_checkpoint(checkpoint, model)
    _interrupted(checkpoint, tmp_path / "s", 4)
    victim = max((tmp_path / "s").glob("fragments-*.arrow"))
    os.truncate(victim, victim.stat().st_size - 1)
    holoray.encode(checkpoint, tmp_path / "s")
    assert holoray.open(tmp_path / "s").verify() == []


def test_files_of_a_store_open_with_arrow(model: Model, tmp_path: Path) -> None:
    import pyarrow as pa

    holoray.encode(model, tmp_path)
    entries = {(t.name, f.index): f for t in holoray.open(tmp_path).manifest.tensors for f in t.fragments}
    for number in sorted({f.file for f in entries.values()}):
        path = tmp_path / f"fragments-{number:05d}.arrow"
        with pa.OSFile(os.fspath(path)) as file:
            for row in pa.ipc.open_file(file).read_all().to_pylist():
                entry = entries.pop((row["tensor"], row["index"]))
                assert entry.file == number
                assert hashlib.sha256(row["payload"]).digest() == entry.sha256
                data = path.read_bytes()[entry.offset : entry.offset + entry.stored_bytes]
                assert data == row["payload"]
    assert entries == {}


@pytest.mark.fault("two-writers")
def test_one_writer_at_a_time(model: Model, tmp_path: Path) -> None:
    with LocalStore(tmp_path).exclusive(), pytest.raises(UsageError, match="written"):
        holoray.encode(model, tmp_path)
