"""What tests of real warm-ups share: a store that takes its time, so that harm can be done meanwhile, and checks."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import ray
from ray import cloudpickle

import holoray
from holoray.actors.warm_model import WarmModel
from holoray.pipelines.curve import Key
from holoray.pipelines.sealed_store import SealedStore
from holoray.stores import LocalStore, fragment_file
from holoray.tensor import Array

SLOW_S: Final = 0.06
QUALITIES: Final = (0.9, 0.999, 1.0)

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not have the tests on their path


class SlowStore(LocalStore):
    """Sleeps before each read of a fragment file."""

    def __init__(self, path: str | os.PathLike[str], delay_s: float) -> None:
        super().__init__(path)
        self.delay_s = delay_s

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "delay_s": self.delay_s}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def read_into(self, name: str, offset: int, out: memoryview) -> int:
        if name.startswith("fragments-"):
            time.sleep(self.delay_s)
        return super().read_into(name, offset, out)


class MeteredStore(SlowStore):
    """Writes down in a file what every process asks of it, before it is read."""

    def __init__(self, path: str | os.PathLike[str], delay_s: float, log: Path) -> None:
        super().__init__(path, delay_s)
        self.log = log

    def __getstate__(self) -> dict[str, object]:
        return super().__getstate__() | {"log": self.log}

    def read_into(self, name: str, offset: int, out: memoryview) -> int:
        with self.log.open("a") as file:  # one short write at the end of a file is atomic
            file.write(f"{name} {offset} {len(out)}\n")
        return super().read_into(name, offset, out)

    def bytes_asked(self, of: str = "") -> int:
        """Bytes of everything (whose name begins like this) that was read by anybody so far."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return sum(int(line.split()[2]) for line in lines if line.startswith(of))


def assert_exact(model: WarmModel, sealed: SealedStore, checkpoint: dict[str, Array]) -> None:
    """The last generation is a fault-free load bit for bit, and the checkpoint itself where the codec is exact."""
    found, expected = model.state_dict(), sealed.load()
    assert found.keys() == checkpoint.keys()
    for name, array in expected.items():
        assert found[name].dtype == checkpoint[name].dtype
        assert found[name].shape == checkpoint[name].shape
        assert not found[name].flags.writeable
        assert found[name].tobytes() == array.tobytes(), name
        assert name in ("spectral", "lowrank") or found[name].tobytes() == checkpoint[name].tobytes()
    assert model.quality == pytest.approx(1.0, abs=1e-9)
    assert model.generations[-1]["complete"]


def damaged(whole: Path, path: Path, keys: tuple[tuple[str, int], ...]) -> Path:
    """A copy of the store in which these fragments, by name of the tensor and index, have a wrong byte."""
    shutil.copytree(whole, path)
    sealed = holoray.open(whole)
    for name, index in keys:
        entry = sealed.entry(name).fragments[index]
        with (path / fragment_file(entry.file)).open("r+b") as file:
            file.seek(entry.offset + entry.stored_bytes // 2)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))
    return path


def lost_with(sealed: SealedStore, keys: tuple[tuple[str, int], ...]) -> set[Key]:
    """What is bad, and what requires it."""
    gone = {(sealed.manifest.by_name[name], index) for name, index in keys}
    while (
        more := {
            (t, f.index) for t, e in enumerate(sealed.manifest.tensors) for f in e.fragments if (t, f.requires) in gone
        }
        - gone
    ):
        gone |= more
    return gone


def until(condition: Callable[[], Any], timeout_s: float = 120.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return found


def kill_coordinator(model: WarmModel) -> None:
    """SIGKILL for the process of the coordinator of now."""
    pid = ray.get(model._crew.coordinator.__ray_call__.remote(lambda _: os.getpid()), timeout=60)
    os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1]
