"""Loads whose zstd frames are opened on the device: the bytes, errors and bounds of a load that opens them on the host.

nvCOMP's place is taken by the stand-in; `pytest -m gpu` asks nvCOMP itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import nvcomp_stand_in
import pytest
import zstandard
from late_device import LateDevice
from typer.testing import CliRunner

import holoray
from holoray.cli import main
from holoray.errors import CapacityError, DeviceError, FormatError, UsageError
from holoray.fragment import FragmentEntry
from holoray.kernels import frames, raw, xp
from holoray.pipelines import fragment_pipeline, frame_groups
from holoray.pipelines.api import load_file
from holoray.pipelines.frame_groups import group_nbytes
from holoray.pipelines.plan import Target
from holoray.pipelines.sealed_store import SealedStore
from holoray.pipelines.weights_memory import resident_nbytes
from holoray.stores import MemoryStore
from holoray.tensor import DTYPES, Array, as_bytes

Spoil = Callable[[bytes], bytes]


class QueuedLateDevice(LateDevice):
    stream_address = 7


@pytest.fixture(scope="module")
def model() -> dict[str, Array]:
    """Frames of several runs, of small tensors, and runs between them that are none."""
    rng = np.random.default_rng(5)
    wide = rng.standard_normal(700_000).astype(DTYPES["BF16"]).astype(np.float32)  # the low halves are zeros
    mixed = np.concatenate([np.zeros(1 << 20, np.uint8), rng.integers(0, 255, 1 << 20, np.uint8), np.ones(9, np.uint8)])
    return {
        "wide": wide.reshape(700, 1000),
        "mixed": mixed,
        "noise": rng.standard_normal((300, 256)).astype(np.float32),
        "ids": np.arange(50_000, dtype=np.int64)[None],
        "empty": np.zeros((0, 4), np.float32),
    }


@pytest.fixture(scope="module")
def sealed(model: dict[str, Array]) -> SealedStore:
    store = MemoryStore()
    holoray.encode(model, store, codec="raw")
    return holoray.open(store)


@pytest.fixture(autouse=True)
def one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fragment_pipeline, "MIN_BATCH_BYTES", 8 << 20)


def all_fragments(sealed: SealedStore) -> Iterator[FragmentEntry]:
    return (f for tensor in sealed.manifest.tensors for f in tensor.fragments)


def there(sealed: SealedStore, device: LateDevice, **options: Any) -> holoray.Loader:
    return sealed.loader(device=device, device_bytes=device.limit_bytes, decompress="device", **options)


def same(got: dict[str, Any], expected: dict[str, Array]) -> bool:
    return all(as_bytes(got[name]).tobytes() == as_bytes(array).tobytes() for name, array in expected.items())


def count_host(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The compressions of what the host's accumulators open."""
    seen: list[str] = []
    honest = vars(raw)["decompress"]

    def note(name: str, data: Any, raw_bytes: int) -> Any:
        seen.append(name)
        return honest(name, data, raw_bytes)

    monkeypatch.setattr(raw, "decompress", note)
    return seen


def count_groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many frames are opened at a time."""
    seen: list[int] = []
    honest = vars(frame_groups)["open_frames"]

    def note(device: Any, some: Any, sizes: Any, **where: str) -> Any:
        seen.append(len(some))
        return honest(device, some, sizes, **where)

    monkeypatch.setattr(frame_groups, "open_frames", note)
    return seen


@pytest.mark.parametrize("batch_bytes", [32 << 10, 8 << 20])
def test_every_frame_is_opened_there_with_the_bytes_of_the_host(
    sealed: SealedStore, model: dict[str, Array], batch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by several streams."""
    nvcomp_stand_in.install(monkeypatch)
    monkeypatch.setattr(fragment_pipeline, "MIN_BATCH_BYTES", batch_bytes)
    on_host, at_a_time = count_host(monkeypatch), count_groups(monkeypatch)
    loader = there(sealed, QueuedLateDevice())
    seen: list[tuple[str, int]] = []
    loader.load(Target(), lambda name, index, quality: seen.append((name, index)))
    assert loader.quality.complete
    assert same(loader.state_dict(), model)
    fragments = [(t.name, f) for t in sealed.manifest.tensors for f in t.fragments]
    assert sorted(seen) == sorted((name, f.index) for name, f in fragments)
    assert sum(at_a_time) == sum(f.compression == "zstd" for _, f in fragments) >= 5
    assert (max(at_a_time) > 1) is (batch_bytes > 1 << 20)
    assert set(on_host) == {"none"}


def test_a_fragment_that_is_reported_is_there(
    sealed: SealedStore, model: dict[str, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is told of it may read it from any stream."""
    nvcomp_stand_in.install(monkeypatch)
    loader = there(sealed, QueuedLateDevice())
    seen = []

    def note(name: str, index: int, quality: float) -> None:
        run = slice(index << 20, (index + 1) << 20)
        seen.append(np.array_equal(as_bytes(loader.state_dict()[name])[run], as_bytes(model[name])[run]))

    loader.load(None, note)
    assert all(seen)


@pytest.mark.parametrize("device_bytes", [1 << 20, 1 << 30])
def test_a_file_is_the_same(
    sealed: SealedStore, device_bytes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With little memory tensors go to the host, and their frames with them."""
    nvcomp_stand_in.install(monkeypatch)
    device = QueuedLateDevice()
    report = load_file(sealed, tmp_path / "there", device=device, device_bytes=device_bytes, decompress="device")
    load_file(sealed, tmp_path / "here")
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()
    assert (report.spilled > 0) is (device_bytes == 1 << 20)
    assert device.peak_bytes <= device_bytes
    assert device.used_bytes == 0


@pytest.mark.fault("no-device-memory")
def test_groups_keep_to_the_memory_that_was_planned(
    sealed: SealedStore, model: dict[str, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcomp_stand_in.install(monkeypatch)
    monkeypatch.setattr(frame_groups, "GROUP_BYTES", 1 << 20)
    group = group_nbytes(all_fragments(sealed))
    assert group < sum(t.spec.nbytes for t in sealed.manifest.tensors) / 2
    least = resident_nbytes(sealed.manifest) + group
    device = QueuedLateDevice()
    loader = sealed.loader(device=device, device_bytes=least, decompress="device")
    loader.load()
    assert same(loader.state_dict(), model)
    assert device.peak_bytes <= least
    with pytest.raises(CapacityError, match="decoding takes"):
        sealed.loader(device=QueuedLateDevice(), device_bytes=least - 1, decompress="device").load()


@pytest.mark.fault("no-device-memory")
def test_a_group_without_memory_is_opened_again_and_what_was_told_is_there(
    model: dict[str, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group of three: after its first member there is no more memory; later, once not after the second."""
    nvcomp_stand_in.install(monkeypatch)
    model = {"wide": model["wide"]}
    store = MemoryStore()
    holoray.encode(model, store, codec="raw")
    sealed = holoray.open(store)
    device = QueuedLateDevice()
    loader = there(sealed, device)
    loader.state_dict()
    calls, copy, told = itertools.count(), device.copy, set[tuple[str, int]]()

    def lack(array: npt.NDArray[Any], to: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        if next(calls) >= 1:
            raise CapacityError("no room")
        return copy(array, to)

    monkeypatch.setattr(device, "copy", lack)
    with pytest.raises(CapacityError, match="no room"):
        loader.load(None, lambda name, index, quality: told.add((name, index)))
    assert loader.fragments_read == len(told) == 1
    for tensor in sealed.manifest.tensors:
        whole, got = as_bytes(model[tensor.name]), as_bytes(loader.state_dict()[tensor.name])
        for fragment in tensor.fragments:
            run = slice(fragment.slot << 20, (fragment.slot + 1) << 20)
            expected = whole[run] if (tensor.name, fragment.index) in told else np.zeros_like(whole[run])
            assert np.array_equal(got[run], expected)
    fails = itertools.count()

    def lack_once(array: npt.NDArray[Any], to: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        if next(fails) == 1:
            raise CapacityError("no room")
        return copy(array, to)

    monkeypatch.setattr(device, "copy", lack_once)
    rest: list[tuple[str, int]] = []
    loader.load(None, lambda name, index, quality: rest.append((name, index)))
    assert next(fails) > 2  # it was tried again
    assert same(loader.state_dict(), model)
    fragments = {(t.name, f.index) for t in sealed.manifest.tensors for f in t.fragments}
    assert sorted(rest) == sorted(fragments - told)  # each once


def forged(spoil: Spoil, monkeypatch: pytest.MonkeyPatch) -> SealedStore:
    """A store sealed with what `spoil` made of each frame: its digests are right."""
    with monkeypatch.context() as patch:
        honest = vars(raw)["compress"]

        def compress(*arguments: Any) -> tuple[str, Any]:
            name, payload = honest(*arguments)
            return (name, spoil(bytes(payload))) if name == "zstd" else (name, payload)

        patch.setattr(raw, "compress", compress)
        store = MemoryStore()
        holoray.encode({"a": np.arange(9_000, dtype=np.int64), "b": np.zeros(9_000)}, store, codec="raw")
    return holoray.open(store)


SPOILT: dict[str, Spoil] = {
    "a bomb": lambda frame: zstandard.compress(bytes(1 << 20)),
    "states less": lambda frame: zstandard.compress(zstandard.decompress(frame)[:-1]),
    "does not state its size": lambda frame: zstandard.ZstdCompressor(write_content_size=False).compress(
        zstandard.decompress(frame)
    ),
    "cut off": lambda frame: frame[:-1],
    "a frame behind": lambda frame: frame + frame,
    "no frame": lambda frame: b"nonsense" * 4,
    "garbage inside": lambda frame: frame[:9] + bytes(b ^ 0x5A for b in frame[9:]),
}


@pytest.mark.fault("bomb", "malformed")
@pytest.mark.parametrize("name", SPOILT)
def test_bad_frames_are_the_errors_of_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcomp_stand_in.install(monkeypatch)
    sealed = forged(SPOILT[name], monkeypatch)
    late = QueuedLateDevice()
    with pytest.raises(FormatError) as host:
        sealed.load()
    with pytest.raises(FormatError) as caught:
        sealed.load(device=late, device_bytes=1 << 30, decompress="device")
    assert (type(caught.value), caught.value.message) == (type(host.value), host.value.message)
    assert (caught.value.tensor, caught.value.fragment) == (host.value.tensor, host.value.fragment)
    assert late.peak_bytes <= resident_nbytes(sealed.manifest) + group_nbytes(all_fragments(sealed))


def test_frames_with_what_only_the_host_looks_at_stay_there(monkeypatch: pytest.MonkeyPatch) -> None:
    nvcomp_stand_in.install(monkeypatch)
    groups = count_groups(monkeypatch)

    def checked(frame: bytes) -> bytes:
        return zstandard.ZstdCompressor(write_checksum=True).compress(zstandard.decompress(frame))

    sealed = forged(checked, monkeypatch)
    got = sealed.load(device=QueuedLateDevice(), device_bytes=1 << 30, decompress="device")
    assert np.array_equal(got["a"], np.arange(9_000))
    wrong = forged(lambda frame: checked(frame)[:-4] + bytes(b ^ 1 for b in checked(frame)[-4:]), monkeypatch)
    with pytest.raises(FormatError, match="decompress"):
        wrong.load(device=QueuedLateDevice(), device_bytes=1 << 30, decompress="device")
    assert groups == []


def test_a_frame_that_only_nvcomp_refuses_is_its_failure(sealed: SealedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcomp_stand_in.install(monkeypatch, lambda content: content[:-1])
    with pytest.raises(DeviceError, match="that the host opens") as caught:
        there(sealed, QueuedLateDevice()).load()
    assert "host" in caught.value.hint


def test_the_switch(sealed: SealedStore, model: dict[str, Array], monkeypatch: pytest.MonkeyPatch) -> None:
    device = QueuedLateDevice()
    groups = count_groups(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(xp, "nvcomp", lambda: (_ for _ in ()).throw(DeviceError("nvCOMP cannot be imported")))
        with pytest.raises(DeviceError, match="nvCOMP"):
            sealed.load(device=device, device_bytes=1 << 30, decompress="device")
        for word in ("auto", "host"):
            assert same(sealed.load(device=device, device_bytes=1 << 30, decompress=word), model)
    nvcomp_stand_in.install(monkeypatch)
    assert same(sealed.load(device=device, device_bytes=1 << 30), model)
    assert same(sealed.load(decompress="auto"), model)
    assert groups == []
    assert same(sealed.load(device=device, device_bytes=1 << 30, decompress="auto"), model)
    assert groups != []
    for word in ("gpu", ""):
        with pytest.raises(UsageError, match="decompresses on"):
            frames.opens_on_device(word, device)
    with pytest.raises(UsageError, match="no device"):
        sealed.load(decompress="device")


def test_the_command_line_has_it(model: dict[str, Array], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcomp_stand_in.install(monkeypatch)
    groups = count_groups(monkeypatch)
    monkeypatch.setattr("holoray.cli.load.open_device", lambda name: QueuedLateDevice())
    holoray.encode(model, tmp_path / "store", codec="raw")
    arguments = ["load", str(tmp_path / "store"), str(tmp_path / "there"), "--device", "cuda"]
    result = CliRunner().invoke(main.app, [*arguments, "--device-bytes", str(1 << 29), "--decompress", "device"])
    assert result.exit_code == 0, result.stderr
    assert groups != []
    load_file(holoray.open(tmp_path / "store"), tmp_path / "here")
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()


@pytest.mark.gpu
def test_nvcomp_itself_gives_the_bytes_of_the_host(sealed: SealedStore, model: dict[str, Array]) -> None:
    try:
        xp.nvcomp()
    except DeviceError as error:
        pytest.skip(error.message)
    for name, array in sealed.load(device="cuda", decompress="device").items():
        assert array.get().tobytes() == as_bytes(model[name]).tobytes()
