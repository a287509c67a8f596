"""Loads onto a device: the same bytes as on the host, with streams, staging and memory that forgive nothing."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from late_device import LateDevice
from typer.testing import CliRunner

import holoray
from holoray.cli import main
from holoray.codecs import get_codec
from holoray.codecs.raw import RUN_BYTES
from holoray.errors import CapacityError, UsageError
from holoray.kernels import registry
from holoray.kernels.device_accumulators import turn_nbytes
from holoray.kernels.registry import make_device_accumulator
from holoray.kernels.scratch import Scratch
from holoray.pipelines import fragment_pipeline
from holoray.pipelines.api import load_file
from holoray.pipelines.loader import Loader
from holoray.pipelines.plan import Target
from holoray.pipelines.sealed_store import SealedStore
from holoray.pipelines.tensor_codec import TensorDecoder, encode_tensor
from holoray.pipelines.weights_memory import RESERVE_BYTES, DeviceWeights, SpillingMemory, resident_nbytes
from holoray.stores import MemoryStore
from holoray.tensor import Array, as_bytes

Model = dict[str, Array]
TARGETS = (Target(fragments=(0,)), Target(quality=0.99), Target())


@pytest.fixture(scope="module", params=["planes", "raw", "raw, not compressed"])
def sealed(request: pytest.FixtureRequest, model: Model) -> SealedStore:
    codec, _, plain = request.param.partition(", ")
    return sealed_model(model, codec=codec, compression="none" if plain else "zstd")


@pytest.fixture(scope="module")
def planes(model: Model) -> SealedStore:
    return sealed_model(model, codec="planes")


def sealed_model(model: Model, **options: Any) -> SealedStore:
    store = MemoryStore()
    holoray.encode(model, store, **options)
    return holoray.open(store)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that even a small model has work for several streams."""
    monkeypatch.setattr(fragment_pipeline, "MIN_BATCH_BYTES", 32 << 10)


def loader(sealed: SealedStore, device: LateDevice, device_bytes: int | None = None) -> Loader:
    return sealed.loader(device=device, device_bytes=device_bytes or device.limit_bytes)


def weights(loaded: dict[str, Any], sealed: SealedStore) -> dict[str, bytes]:
    assert [t.name for t in sealed.manifest.tensors] == list(loaded)
    assert all(loaded[t.name].shape == t.spec.shape for t in sealed.manifest.tensors)
    return {name: as_bytes(array).tobytes() for name, array in loaded.items()}


class MeetingDevice(LateDevice):
    """The first two threads that take a stream go on together."""

    def __init__(self, **options: int) -> None:
        super().__init__(**options)
        self._meeting, self._arrivals = threading.Barrier(2), itertools.count()

    @contextmanager
    def stream(self) -> Iterator[None]:
        with super().stream():
            if next(self._arrivals) < self._meeting.parties:
                self._meeting.wait(timeout=60)
            yield


def test_every_step_of_a_load_gives_the_bytes_of_the_host(sealed: SealedStore) -> None:
    device = MeetingDevice(staging_bytes=4 << 20)
    there, here = loader(sealed, device), sealed.loader()
    handed_out = there.state_dict()
    assert not any(any(content) for content in weights(handed_out, sealed).values())
    for target in TARGETS:
        assert there.load(target).ratio == here.load(target).ratio
        assert weights(there.state_dict(), sealed) == weights(here.state_dict(), sealed)
    assert all(handed_out[name] is array for name, array in there.state_dict().items())
    assert sum(stream.most_queued > 0 for stream in device.streams) > 1  # the two that met
    assert device.staging.stats.borrowed_bytes == 0
    stages = {"fetch", "verify", "decompress", "accumulate", "upload", "finalize"}
    assert stages <= device.names.keys()


def test_a_fragment_that_is_reported_is_there() -> None:
    """Whoever is told of it may read it from any stream."""
    runs = np.random.default_rng(3).integers(1, 255, 5 * RUN_BYTES // 2).astype(np.uint8)
    there = loader(sealed_model({"w": runs}), LateDevice())
    seen = []

    def note(name: str, index: int, quality: float) -> None:
        run = slice(index * RUN_BYTES, (index + 1) * RUN_BYTES)
        seen.append(np.array_equal(there.state_dict()[name][run], runs[run]))

    there.load(None, note)
    assert seen == [True] * 3


def test_bfloat16_is_uint16_there(planes: SealedStore) -> None:
    assert planes.load(device=LateDevice(), device_bytes=1 << 30)["embed.weight"].dtype == np.uint16


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_file_is_the_same(sealed: SealedStore, target: Target, tmp_path: Path) -> None:
    report = load_file(sealed, tmp_path / "there", target, device=LateDevice(), device_bytes=1 << 30)
    load_file(sealed, tmp_path / "here", target)
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()
    assert report.spilled == 0


def test_memory_is_the_weights_and_what_decoding_takes_for_a_moment(planes: SealedStore) -> None:
    """Peak <= 1.1 x final weights + a turn of each thread: counted to the byte, also for refinement in place."""
    turn = max(turn_nbytes(t.spec, c) for t, c in zip(planes.manifest.tensors, planes.manifest.codecs, strict=True))
    device = LateDevice()
    there = loader(planes, device)
    for target in TARGETS:
        there.load(target)
    final = resident_nbytes(planes.manifest)
    threads = fragment_pipeline.FragmentPipeline(planes.store, planes.manifest, device=device).threads
    assert final < device.peak_bytes <= 1.1 * final + threads * turn
    assert device.used_bytes == sum(array.nbytes for array in there.state_dict().values())


def test_a_budget_with_room_for_one_turn_is_kept(planes: SealedStore, model: Model) -> None:
    turn = max(turn_nbytes(t.spec, c) for t, c in zip(planes.manifest.tensors, planes.manifest.codecs, strict=True))
    least = resident_nbytes(planes.manifest) + turn
    device = LateDevice()
    there = loader(planes, device, least)
    for target in TARGETS:
        there.load(target)
    assert device.peak_bytes <= least
    assert weights(there.state_dict(), planes) == weights(dict(model), planes)
    with pytest.raises(CapacityError, match="decoding takes") as caught:
        loader(planes, LateDevice(), least - 1).load()
    assert "device_bytes" in caught.value.hint


def test_as_many_threads_decode_as_there_is_room_for(planes: SealedStore) -> None:
    pairs = zip(planes.manifest.tensors, planes.manifest.codecs, strict=True)
    turn, final = max(turn_nbytes(t.spec, c) for t, c in pairs), resident_nbytes(planes.manifest)
    for room, width in ((turn, 1), (2 * turn - 1, 1), (3 * turn, 3), (99 * turn, 8)):
        assert DeviceWeights(LateDevice(), final + room).prepare(planes.manifest, 8) == width
        assert SpillingMemory(LateDevice(), 2 * room).prepare(planes.manifest, 8) == width
    free = LateDevice(limit_bytes=2 * RESERVE_BYTES)
    assert DeviceWeights(free).limit_bytes == RESERVE_BYTES


def lacking(attempts: int) -> Callable[[int], bool]:
    """No room for the first `attempts` allocations of a kind that only decoding makes: larger than a record."""
    seen = itertools.count()
    return lambda nbytes: nbytes > 4096 and next(seen) < attempts


@pytest.mark.fault("no-device-memory")
@pytest.mark.parametrize("attempts", [1, 2])
def test_a_device_that_lacks_memory_for_a_while_is_asked_again(planes: SealedStore, attempts: int) -> None:
    device = LateDevice()
    there = loader(planes, device)
    there.load(TARGETS[0])
    device.lack = lacking(attempts)
    there.load()
    assert weights(there.state_dict(), planes) == weights(planes.load(), planes)


@pytest.mark.fault("no-device-memory")
def test_a_device_with_less_memory_than_promised_gets_by(planes: SealedStore, model: Model) -> None:
    """Room for one turn where the budget allows all threads theirs: what several lack at once, one has alone."""
    turn = max(turn_nbytes(t.spec, c) for t, c in zip(planes.manifest.tensors, planes.manifest.codecs, strict=True))
    there = loader(planes, MeetingDevice(limit_bytes=resident_nbytes(planes.manifest) + turn), 1 << 30)
    there.load()
    assert weights(there.state_dict(), planes) == weights(dict(model), planes)


@pytest.mark.fault("no-device-memory")
def test_without_memory_weights_are_whole_as_far_as_they_came(planes: SealedStore, model: Model) -> None:
    """Refinement that runs out of memory: every slot holds the fragments that were reported, and no part of others."""
    device, added = LateDevice(), set[tuple[str, int]]()
    there = loader(planes, device)

    def note(name: str, index: int, quality: float) -> None:
        added.add((name, index))
        if len(added) > 12:
            device.lack = lambda nbytes: True

    there.load(TARGETS[0], note)
    handed_out = there.state_dict()
    with pytest.raises(CapacityError, match="no room") as caught:
        there.load(None, note)
    assert caught.value.tensor in model
    assert weights(handed_out, planes) == weights(rebuilt(planes, added), planes)
    assert there.fragments_read == len(added)
    device.lack = lambda nbytes: False
    there.load()
    assert weights(handed_out, planes) == weights(dict(model), planes)


def rebuilt(sealed: SealedStore, added: set[tuple[str, int]]) -> Model:
    """What those fragments make, by the decoder of single tensors."""
    arrays = {}
    for entry in sealed.manifest.tensors:
        decoder = TensorDecoder(entry)
        for known in entry.fragments:
            if (entry.name, known.index) in added:
                decoder.add(sealed_fragment(sealed, entry.name, known.index))
        arrays[entry.name] = (
            decoder.reconstruct() if decoder.can_reconstruct else np.zeros_like(decoder._accumulator.out)
        )
    return arrays


def sealed_fragment(sealed: SealedStore, name: str, index: int) -> holoray.Fragment:
    known = sealed.entry(name).fragments[index]
    payload = bytearray(known.stored_bytes)
    sealed.store.read_into(f"fragments-{known.file:05d}.arrow", known.offset, memoryview(payload))
    return holoray.Fragment(name, index, bytes(payload))


class Tensor:
    """One tensor of `planes` on a device, to which layers are added."""

    def __init__(self) -> None:
        self.array = np.random.default_rng(4).standard_normal(5000).astype(np.float32)
        self.entry, self._fragments = encode_tensor(self.array, codec="planes")
        self.device, self._scratch = LateDevice(), Scratch()
        self.out = self.device.zeros(self.entry.spec.shape, np.float32)
        codec = get_codec(self.entry.codec, self.entry.config)
        self._accumulator = make_device_accumulator(self.entry.spec, codec, self.out, self.device)

    def add(self, *indices: int) -> None:
        for index in indices:
            known, payload = self.entry.fragments[index], memoryview(self._fragments[index].payload)
            opened = self._accumulator.decompress([known], [payload], self._scratch)
            self._accumulator.accumulate(0, opened, self._scratch)

    @property
    def weights(self) -> Array:
        return self.device.download(self.out)


@pytest.mark.fault("no-device-memory")
def test_layers_that_wait_for_others_wait_on_without_memory() -> None:
    """No room to add them when what they waited for came: nothing is forgotten."""
    tensor = Tensor()
    tensor.add(*range(1, len(tensor.entry.fragments)))
    tensor.device.lack = lambda nbytes: True
    with pytest.raises(CapacityError):
        tensor.add(0)
    tensor.device.lack = lambda nbytes: False
    tensor.add(0)
    assert np.array_equal(tensor.weights, tensor.array)


@pytest.mark.fault("no-device-memory")
def test_a_run_is_put_back_when_its_verdict_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are queued already, and what they did must not stay."""

    def lack(array: Array) -> Array:
        raise CapacityError("no page-locked memory")

    tensor = Tensor()
    tensor.add(0)
    before = tensor.weights
    with monkeypatch.context() as patch:
        patch.setattr(tensor.device, "download", lack)
        with pytest.raises(CapacityError):
            tensor.add(1)
    assert np.array_equal(tensor.weights, before)
    tensor.add(*range(1, len(tensor.entry.fragments)))
    assert np.array_equal(tensor.weights, tensor.array)


@pytest.mark.fault("no-device-memory")
@pytest.mark.parametrize("device_bytes", [1, 2 << 20, 4 << 20])
def test_tensors_without_room_go_to_the_host(planes: SealedStore, device_bytes: int, tmp_path: Path) -> None:
    device = LateDevice()
    report = load_file(planes, tmp_path / "there", device=device, device_bytes=device_bytes)
    load_file(planes, tmp_path / "here")
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()
    assert report.spilled > 0
    assert device.peak_bytes <= device_bytes
    assert device.used_bytes == 0


@pytest.mark.fault("no-device-memory")
def test_tensors_that_fit_one_by_one_are_not_there_together(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All are opened with the one batch; `raw` takes no turn, so each alone would fit."""
    monkeypatch.setattr(fragment_pipeline, "MIN_BATCH_BYTES", fragment_pipeline.MAX_BATCH_BYTES)
    sealed, device = sealed_model(model, codec="raw"), LateDevice()
    largest = max(t.spec.nbytes for t in sealed.manifest.tensors)
    report = load_file(sealed, tmp_path / "there", device=device, device_bytes=largest)
    load_file(sealed, tmp_path / "here")
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()
    assert 0 < report.spilled < len(model)
    assert device.peak_bytes <= largest


def test_what_a_device_cannot_do_is_told_before_anything_is_read(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sealed = sealed_model({"a": np.arange(99_999), "w": model["layers.0.mlp.weight"]})
    monkeypatch.delitem(registry.DEVICE_ACCUMULATORS, "planes")
    reads: list[object] = []
    read_spans = sealed.store.read_spans

    def note(spans: Any, check: Any) -> Any:
        reads.append(spans)
        return read_spans(spans, check)

    monkeypatch.setattr(sealed.store, "read_spans", note)
    for attempt in (
        lambda: sealed.load(device=LateDevice(), device_bytes=1 << 30),
        lambda: load_file(sealed, tmp_path / "x", device=LateDevice(), device_bytes=1 << 30),
    ):
        with pytest.raises(UsageError, match="not accumulated on a device") as caught:
            attempt()
        assert caught.value.tensor == "w"
    assert reads == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device_bytes", [1 << 20, 1 << 30])
def test_the_command_line_says_what_went_to_the_host(
    device_bytes: int, model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("holoray.cli.load.open_device", lambda name: LateDevice())
    holoray.encode(model, tmp_path / "store")
    arguments = ["load", str(tmp_path / "store"), str(tmp_path / "there"), "--device", "cuda:1"]
    arguments += ["--device-bytes", str(device_bytes)]
    result = json.loads(CliRunner().invoke(main.app, [*arguments, "--json"]).stdout)
    assert result["device"] == "cuda:1"
    assert (result["spilled"] > 0) is (device_bytes == 1 << 20)
    told = CliRunner().invoke(main.app, arguments)
    assert told.exit_code == 0
    assert ("did not fit on cuda:1" in told.stderr) is (result["spilled"] > 0)
    load_file(holoray.open(tmp_path / "store"), tmp_path / "here")
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()


@pytest.mark.parametrize("name", ["tpu", "cuda:", "cuda:-1", "cuda:x", "CUDA", ""])
def test_unknown_devices(name: str, planes: SealedStore) -> None:
    with pytest.raises(UsageError, match="not known"):
        planes.load(device=name)


@pytest.mark.parametrize("nbytes", [0, -1])
def test_no_bytes_of_a_device(nbytes: int, planes: SealedStore) -> None:
    with pytest.raises(UsageError, match="bytes of a device"):
        planes.load(device=LateDevice(), device_bytes=nbytes)


def test_a_bound_of_no_device_is_refused_rather_than_ignored(planes: SealedStore, tmp_path: Path) -> None:
    for attempt in (
        lambda: planes.load(device_bytes=1 << 30),
        lambda: planes.loader(device_bytes=1 << 30),
        lambda: load_file(planes, tmp_path / "out", device_bytes=1 << 30),
    ):
        with pytest.raises(UsageError, match="without a device"):
            attempt()
    assert list(tmp_path.iterdir()) == []
