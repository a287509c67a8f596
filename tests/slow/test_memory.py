"""Memory while a checkpoint of 4 GB is encoded and loaded: bounded, whatever the checkpoint's size."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import holoray
from holoray.formats.safetensors import SafetensorsFile, SafetensorsWriter
from holoray.tensor import TensorSpec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

LIMIT_BYTES = 1_500_000_000
NEEDED_DISK_BYTES = 12 << 30
SAMPLE_S = 0.02

SHAPES = [*[(8192, 16384)] * 8, *[(8192, 8192)] * 8, *[(4096, 4096)] * 26, *[(8192,)] * 40]
"""About 4 GB of bf16, tensors of up to 256 MiB."""
BYTES = sum(2 * int(np.prod(shape)) for shape in SHAPES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A safetensors file of weights that look like a model's, written tensor by tensor."""
    directory = tmp_path_factory.mktemp("large")
    free = shutil.disk_usage(directory).free
    if free < NEEDED_DISK_BYTES:
        pytest.skip(f"{free >> 20} MiB of disk are free, {NEEDED_DISK_BYTES >> 20} MiB are needed")
    path = directory / "model.safetensors"
    specs = [TensorSpec(f"layers.{i:02d}.weight", "BF16", shape) for i, shape in enumerate(SHAPES)]
    random = np.random.default_rng(0)
    pool = (0.02 * random.standard_normal(1 << 22, np.float32)).astype(ml_dtypes.bfloat16)
    with SafetensorsWriter(path, specs) as writer:
        for spec in specs:
            copies = -(-spec.size // pool.size)
            writer.write(spec.name, np.tile(random.permutation(pool), copies)[: spec.size].reshape(spec.shape))
    yield path
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def store(checkpoint: Path) -> Path:
    """The store that `test_encoding` made; made here if that did not run."""
    path = checkpoint.with_name("store")
    if not path.exists():
        _peak_bytes(ENCODE, str(checkpoint), str(path))
    return path


ENCODE = "import sys, holoray; holoray.encode(sys.argv[1], sys.argv[2]); print('{}')"
LOAD = """
import hashlib, json, sys, holoray
weights = holoray.open(sys.argv[1]).load()
print(json.dumps({"bytes": sum(a.nbytes for a in weights.values())}))
"""
COMMAND_LINE = "from holoray.cli.main import main; main()"


def _peak_bytes(code: str, *arguments: str) -> tuple[int, dict[str, object]]:
    """Peak of anonymous and shared memory of a child process, sampled from outside, and the object it prints."""
    environment = os.environ | {"PYTHONPATH": str(Path(holoray.__file__).parents[1])}
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        peak = 0
        while child.poll() is None:
            peak = max(peak, _anonymous_bytes(child.pid))
            time.sleep(SAMPLE_S)
        assert child.stdout is not None
        printed = child.stdout.read()
    assert child.returncode == 0
    result: dict[str, object] = json.loads(printed)
    print(f"\npeak {peak / 1e6:.0f} MB: {arguments}")
    return peak, result


def _anonymous_bytes(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:  # it has just ended
        return 0
    lines = (line.split() for line in status.splitlines())
    return sum(int(line[1]) << 10 for line in lines if line[0] in ("RssAnon:", "RssShmem:"))


def test_encoding(checkpoint: Path) -> None:
    peak, _ = _peak_bytes(ENCODE, str(checkpoint), str(checkpoint.with_name("store")))
    assert peak < LIMIT_BYTES


def test_loading_to_a_file(checkpoint: Path, store: Path) -> None:
    """Through the command line; the result is not in memory, and equal to the checkpoint."""
    out = checkpoint.with_name("out.safetensors")
    peak, report = _peak_bytes(COMMAND_LINE, "load", str(store), str(out), "--json")
    assert report["quality"] == 1.0
    try:
        _check_equal(checkpoint, out)
    finally:
        out.unlink()
    assert peak < LIMIT_BYTES


def _check_equal(expected: Path, got: Path) -> None:
    first, second = SafetensorsFile(expected), SafetensorsFile(got)
    assert first.specs == second.specs
    for spec in first.specs:
        np.testing.assert_array_equal(first.read(spec.name).view(np.uint16), second.read(spec.name).view(np.uint16))


def test_loading_into_memory(store: Path) -> None:
    peak, report = _peak_bytes(LOAD, str(store))
    assert report["bytes"] == BYTES
    assert peak - BYTES < LIMIT_BYTES


def test_the_scale_shows_what_is_there() -> None:
    """A process that holds 300 MB is seen to hold them."""
    peak, _ = _peak_bytes("import time; held = b'x' * 300_000_000; time.sleep(.3); print('{}')")
    assert 300_000_000 <= peak < 400_000_000
