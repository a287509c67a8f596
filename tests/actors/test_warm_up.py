"""Warm-ups on a real local Ray: what they give, what they refuse, and what they leave behind."""

from __future__ import annotations

import resource
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import ml_dtypes
import numpy as np
import pytest
import ray
from serving import served
from warming import QUALITIES, SLOW_S, SlowStore, assert_exact, damaged, is_alive, kill_coordinator, lost_with, until

import holoray
from holoray.actors import remote
from holoray.actors.coordinator import Generation
from holoray.actors.warm_model import WarmModel, warm_up
from holoray.cli.output import Output
from holoray.cli.warmup import run_warmup
from holoray.errors import (
    CapacityError,
    DeadlineError,
    HolorayError,
    IntegrityError,
    QualityError,
    SourceError,
    UsageError,
    WorkerLostError,
)
from holoray.formats.safetensors import SafetensorsFile
from holoray.pipelines.api import load_file
from holoray.pipelines.fault_policy import FaultPolicy
from holoray.pipelines.sealed_store import SealedStore
from holoray.tensor import Array

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    session = remote.connect(None, 4)
    yield
    session.close()


# -- on a private Ray of its own -------------------------------------------------------------------------


@pytest.mark.fault("orphans")
def test_a_private_ray_leaves_nothing(
    store: Path, sealed: SealedStore, checkpoint: dict[str, Array], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[Generation, dict[str, Array]]] = []
    with warm_up(
        store,
        workers=2,
        qualities=QUALITIES,
        metrics_port=0,
        on_generation=lambda m, g: seen.append((g, m.state_dict())),
    ) as model:
        model.wait(timeout_s=120)
        assert_exact(model, sealed, checkpoint)
        model.save(tmp_path / "out.safetensors")
        assert model.metrics_url is not None
        with urlopen(model.metrics_url) as answer:
            metrics = answer.read().decode()
        session = model._session
    assert not ray.is_initialized()
    assert not Path(session.private_dir).exists()
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""

    assert [g.generation for g, _ in seen] == list(range(1, len(QUALITIES) + 1))
    for (generation, found), target in zip(seen, QUALITIES, strict=True):
        assert generation.quality >= target - 1e-9
        expected = sealed.load(quality=target)
        assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)
        assert true_quality(found, checkpoint) == pytest.approx(generation.quality, abs=1e-4)
    assert [g["generation"] for g in model.generations] == [1, 2, 3]
    assert model.generations[-1]["bytes_read"] == sum(t.stored_bytes for t in sealed.manifest.tensors) + len(
        sealed.manifest.encoded
    )

    written = SafetensorsFile(tmp_path / "out.safetensors")
    assert all(written.read(name).tobytes() == model.state_dict()[name].tobytes() for name in checkpoint)
    fragments = sealed.manifest.fragment_count
    assert f'holoray_fragments_total{{outcome="applied"}} {float(fragments)}' in metrics
    assert "holoray_generation 3.0" in metrics


def true_quality(found: dict[str, Array], checkpoint: dict[str, Array]) -> float:
    floating = [name for name, array in checkpoint.items() if array.dtype.kind in "fV"]
    wide = {name: checkpoint[name].astype(np.float64) for name in floating}
    error = sum(np.sum((found[name].astype(np.float64) - wide[name]) ** 2) for name in floating)
    return float(1.0 - error / sum(np.sum(wide[name] ** 2) for name in floating))


def test_two_warm_ups_share_a_private_ray(store: Path) -> None:
    first = warm_up(store, workers=1)
    first.wait(timeout_s=120)
    with warm_up(SlowStore(store, SLOW_S), workers=2) as second:
        until(lambda: len(second.crew()) == 2)
        assert second._session.private_dir == first._session.private_dir
        crew = first.crew()
        first.close()
        assert not any(is_alive(w["pid"]) for w in crew)
        second.wait(timeout_s=120)
    assert not ray.is_initialized()
    assert not Path(second._session.private_dir).exists()


@pytest.mark.fault("no-workers")
@pytest.mark.slow  # inside Ray, a shutdown under other threads' calls can end the process: seen once, on a busy machine
def test_ray_may_be_shut_down_under_a_warm_up(store: Path) -> None:
    with warm_up(SlowStore(store, 5 * SLOW_S), workers=1) as model:
        until(model.crew)
        ray.shutdown()
        with pytest.raises(WorkerLostError, match="shut down"):
            model.wait(timeout_s=120)
        assert model.crew() == []
        assert model.metrics_url is None
    assert not ray.is_initialized()
    assert not Path(model._session.private_dir).exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999", "nowhere.invalid:6379", "nonsense"])
def test_no_cluster_at_the_address(address: str, store: Path) -> None:
    began = time.monotonic()
    with pytest.raises(SourceError, match=address) as caught:
        warm_up(store, address=address)
    assert caught.value.hint
    assert time.monotonic() - began < 20
    assert not ray.is_initialized()


# -- on a Ray that the caller has ----------------------------------------------------------------------


@pytest.mark.usefixtures("local_ray")
def test_what_is_handed_out_stays_valid(store: Path) -> None:
    with warm_up(store, workers=1, qualities=(0.9, 1.0)) as model:
        model.wait(timeout_s=120)
        found = model.state_dict()
        before = {name: array.tobytes() for name, array in found.items()}
    assert all(array.tobytes() == before[name] for name, array in found.items())
    model.close()  # again


@pytest.mark.usefixtures("local_ray")
def test_a_target_below_everything_ends_there(store: Path, sealed: SealedStore) -> None:
    with warm_up(store, workers=2, qualities=(0.9,)) as model:
        assert model.wait(0.9, timeout_s=120).quality >= 0.9
        with pytest.raises(QualityError):
            model.wait(1.0, timeout_s=60)
        expected = sealed.load(quality=0.9)
        assert all(model.state_dict()[name].tobytes() == array.tobytes() for name, array in expected.items())


@pytest.mark.fault("flipped")
@pytest.mark.usefixtures("local_ray")
def test_a_bad_fragment_ends_with_its_own_error(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "bad")
    largest = max((tmp_path / "bad").glob("fragments-*"), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with warm_up(tmp_path / "bad", workers=2) as model:
        with pytest.raises(IntegrityError) as caught:
            model.wait(timeout_s=120)
        assert caught.value.tensor is not None
        with pytest.raises(IntegrityError):
            model.state_dict()


@pytest.mark.fault("no-shared-memory")
@pytest.mark.usefixtures("local_ray")
def test_no_room_in_shared_memory(store: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with warm_up(SlowStore(store, SLOW_S), workers=1) as model:
        (worker,) = until(model.crew)
        resource.prlimit(worker["pid"], resource.RLIMIT_FSIZE, (1 << 16, before[1]))
        with pytest.raises(CapacityError, match="bytes are free"):
            model.wait(timeout_s=120)


@pytest.mark.usefixtures("local_ray")
def test_what_is_refused_before_anything_starts(store: Path, tmp_path: Path) -> None:
    for arguments, error in (
        ({"uri": tmp_path / "nothing"}, SourceError),
        ({"uri": store, "expect": "sha256:" + "0" * 64}, IntegrityError),
        ({"uri": store, "qualities": ()}, UsageError),
        ({"uri": store, "qualities": (1.5,)}, UsageError),
        ({"uri": store, "workers": 0}, UsageError),
        ({"uri": store, "metrics_port": -1}, UsageError),
        ({"uri": store, "metrics_port": 65536}, UsageError),
        ({"uri": holoray.MemoryStore()}, UsageError),
        ({"uri": "memory://store"}, UsageError),
        ({"uri": "floppy://store"}, UsageError),
    ):
        with pytest.raises(error):
            warm_up(**arguments)


@pytest.mark.usefixtures("local_ray")
def test_workers_fetch_over_http(store: Path, sealed: SealedStore, checkpoint: dict[str, Array]) -> None:
    with served(store) as server, warm_up(server.url, workers=2, qualities=QUALITIES) as model:
        model.wait(timeout_s=120)
        assert_exact(model, sealed, checkpoint)


@pytest.mark.usefixtures("local_ray")
def test_workers_fetch_from_a_server(
    store: Path, sealed: SealedStore, checkpoint: dict[str, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token is in the environment of the driver, and nowhere else."""
    monkeypatch.setenv("HOLORAY_TOKEN", "t0ken")
    with holoray.serve(store, token="t0ken") as server, warm_up(server.uri, workers=2, qualities=QUALITIES) as model:
        model.wait(timeout_s=60)
        assert_exact(model, sealed, checkpoint)
        assert server.metrics.value("holoray_served_calls_total", outcome="refused") == 0


@pytest.mark.usefixtures("local_ray")
def test_workers_do_without_a_lost_share(checkpoint: dict[str, Array], tmp_path: Path) -> None:
    part = {name: checkpoint[name] for name in ("large", "float16", "scalar")}
    holoray.encode(part, tmp_path / "s", shares=holoray.Shares.usable(4, 2, 3))
    sealed = holoray.open(tmp_path / "s")
    shutil.rmtree(tmp_path / "s" / "share-1")
    with warm_up(tmp_path / "s", workers=2, qualities=QUALITIES) as model:
        model.wait(timeout_s=60)
        assert_exact(model, sealed, part)
    shutil.rmtree(tmp_path / "s" / "share-2")
    with pytest.raises(QualityError, match="2 of the 3 shares"):
        warm_up(tmp_path / "s", workers=2, qualities=QUALITIES)
    with warm_up(tmp_path / "s", workers=2, qualities=(0.9,)) as model:
        model.wait(0.9, timeout_s=120)
        expected = holoray.open(tmp_path / "s").load(quality=0.9)
        assert {name: a.tobytes() for name, a in model.state_dict().items()} == {
            name: a.tobytes() for name, a in expected.items()
        }


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("last", [False, True])
def test_a_failing_callback_is_not_lost(last: bool, store: Path) -> None:
    def fail(model: WarmModel, generation: Generation) -> None:
        if generation.final == last:
            time.sleep(0.2)
            raise ZeroDivisionError

    with warm_up(store, workers=1, qualities=(0.9, 1.0), on_generation=fail) as model:
        with pytest.raises(HolorayError, match="ZeroDivisionError") as caught:
            model.wait(timeout_s=120)
        assert __file__ in caught.value.hint
        assert model.generation == 1 + last


@pytest.mark.usefixtures("local_ray")
def test_errors_of_the_callback_keep_their_type_and_system_exit_is_one(store: Path) -> None:
    for error, kind in ((CapacityError("full"), CapacityError), (SystemExit(3), HolorayError)):

        def fail(model: WarmModel, generation: Generation, error: BaseException = error) -> None:
            raise error

        with warm_up(store, workers=1, on_generation=fail) as model, pytest.raises(kind):
            model.wait(timeout_s=120)


@pytest.mark.usefixtures("local_ray")
def test_waiting_covers_the_callback_but_not_from_inside(store: Path) -> None:
    seen: list[int] = []

    def slow(model: WarmModel, generation: Generation) -> None:
        assert model.wait(generation.quality * 0.99).generation
        if not generation.final:
            with pytest.raises(UsageError):
                model.wait(1.0)
        time.sleep(0.3)
        seen.append(generation.generation)

    with warm_up(store, workers=1, qualities=(0.9, 1.0), on_generation=slow) as model:
        model.wait(0.9, timeout_s=120)
        assert seen
        model.wait(timeout_s=120)
        assert seen == [1, 2]


@pytest.mark.usefixtures("local_ray")
def test_waiting_too_long(store: Path) -> None:
    with warm_up(SlowStore(store, 5 * SLOW_S), workers=1) as model:
        with pytest.raises(DeadlineError, match=r"0\.05 s") as caught:
            model.wait(timeout_s=0.05)
        assert isinstance(caught.value, TimeoutError)
        assert caught.value.hint


@pytest.mark.usefixtures("local_ray")
def test_a_taken_metrics_port_is_told_by_its_own_error(store: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with warm_up(store, workers=1, metrics_port=port) as model:
            with pytest.raises(UsageError, match=str(port)) as caught:
                model.wait(timeout_s=120)
            assert caught.value.hint
            assert model.metrics_url is None


@pytest.mark.usefixtures("local_ray")
def test_a_closed_model_answers(store: Path) -> None:
    with warm_up(store, workers=1, metrics_port=0) as model:
        model.wait(timeout_s=120)
    assert model.crew() == []
    assert model.metrics_url is None


# -- with fragments that are corrupt in every source -------------------------------------------------------

SKIP = FaultPolicy(skip_corrupted=True)
BAD = (("planes", 3), ("planes", 7), ("plain", 1), ("spectral", 2), ("lowrank", 0))
"""Of `planes`, which has three runs: layer 1 of the first, so that a slot is cut, and layer 2 of the second."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(5)
    checkpoint: dict[str, Array] = {
        "planes": (rng.standard_normal((1200, 1000)) * 0.02).astype(ml_dtypes.bfloat16),
        "plain": rng.standard_normal((1 << 10, 1 << 9)).astype(np.float32),
        "spectral": rng.standard_normal((300, 200)).astype(np.float32),
        "lowrank": rng.standard_normal((90, 200)).astype(np.float32),
        "ids": np.arange(100, dtype=np.int64),
    }
    path = tmp_path_factory.mktemp("skip") / "store"
    patterns = ["spectral=spectral", "lowrank=lowrank", "plain=raw"]
    holoray.encode(checkpoint, path, pattern=patterns, essential=0.3, compression="none")
    return path


@pytest.mark.fault("lying-source", "coordinator-killed")
@pytest.mark.usefixtures("local_ray")
def test_every_generation_is_what_a_load_that_skips_gives(whole: Path, tmp_path: Path) -> None:
    """Bit for bit, with the quality of what is there; though a coordinator dies that knew what is lost."""
    bad = damaged(whole, tmp_path / "bad", BAD)
    seen: list[tuple[Generation, dict[str, bytes]]] = []

    def look(model: WarmModel, generation: Generation) -> None:
        seen.append((generation, {name: array.tobytes() for name, array in model.state_dict().items()}))
        if generation.generation == 1:
            kill_coordinator(model)

    with warm_up(bad, workers=2, qualities=(0.9, 1.0), fault_policy=SKIP, on_generation=look) as model:
        last = model.wait(timeout_s=120)
        model._take(replace(last, generation=9), object())  # from a coordinator that was given up meanwhile
        assert model.generation == last.generation
    for (generation, found), target in zip(seen, (0.9, 1.0), strict=True):
        loader = holoray.open(bad, fault_policy=SKIP).loader()
        quality = loader.load(holoray.Target(quality=target))
        for name, array in loader.state_dict().items():
            assert found[name] == array.tobytes(), (generation.generation, name)
        assert generation.quality == pytest.approx(quality.ratio, abs=1e-12)
        assert not generation.complete
    assert last.lost == lost_with(holoray.open(whole), BAD)
    assert model.generations[-1]["lost"] == len(last.lost) > len(BAD)


@pytest.mark.fault("lying-source")
@pytest.mark.usefixtures("local_ray")
def test_a_warm_up_that_skips_ends_where_it_would_lack_too_much(whole: Path, tmp_path: Path) -> None:
    bad = damaged(whole, tmp_path / "bad", BAD)
    loader = holoray.open(bad, fault_policy=SKIP).loader()
    policy = replace(SKIP, min_quality=loader.load().ratio + 1e-9)
    with warm_up(bad, workers=1, fault_policy=policy) as model, pytest.raises(QualityError, match="can only end at"):
        model.wait(timeout_s=120)
    with pytest.raises(QualityError, match="can only end at"):
        warm_up(whole, qualities=(0.9,), fault_policy=replace(SKIP, min_quality=0.99999))


@pytest.mark.slow  # as the one before, but for what is printed
@pytest.mark.usefixtures("local_ray")
def test_the_command_says_what_it_skipped(whole: Path, tmp_path: Path) -> None:
    bad = damaged(whole, tmp_path / "bad", BAD)
    nothing: dict[str, Any] = dict.fromkeys(("workers", "address", "metrics_port", "patience_s", "expect"))
    out = Output(json=True, quiet=False)
    values = run_warmup(out, (bad,), qualities=(1.0,), out_dir=tmp_path, fault_policy=SKIP, **nothing)
    gone = lost_with(holoray.open(whole), BAD)
    assert values["skipped"] == len(gone)
    assert values["fragments"] == holoray.open(whole).manifest.fragment_count - len(gone)
    load_file(holoray.open(bad, fault_policy=SKIP), tmp_path / "loaded.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "loaded.safetensors").read_bytes()
