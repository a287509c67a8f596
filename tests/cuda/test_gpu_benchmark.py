"""`make gpu-bench` runs where there is no GPU too, on little: what it measures is checked, its figures mean nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from late_device import LateDevice
from nvcomp_stand_in import install
from on_cpu import COMPILER, NO_COMPILER, kernels_on_cpu

from benchmarks import gpu


@pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)
def test_every_row_of_the_benchmark_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "REPEATS", 1)
    device = kernels_on_cpu()
    rows = [
        *gpu.finalizers(device, 4096),
        *gpu.quantised(device, 4096),
        *gpu.transforms(device, 4096),
        *gpu.planes(device, 500),
        *gpu.zstd(install(monkeypatch), (1, 3), 1000),
    ]
    assert len(rows) == 23
    for row in rows:
        assert ("GB/s" in row.line(gpu.copy_speed(device, 4096))) == isinstance(row, gpu.Row)


def test_the_row_of_a_whole_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "REPEATS", 1)
    device = LateDevice()
    row = gpu.whole_load(device, 1 << 16, lambda: device.used_bytes, tmp_path, 1e3)
    assert row.weights_bytes == 2 << 16
    assert row.peak_bytes == row.weights_bytes  # nothing of the flight stays
    speed, memory = row.lines()
    assert "GB/s of weights" in speed
    assert "of page-locked copies (alone" in speed  # the slowest of all, as was said above
    assert "1.000 x its weights" in memory
