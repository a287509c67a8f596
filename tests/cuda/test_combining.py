"""Members of a group, each a process with a device: what they have in the end is what one device would have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from combining_rank import CODECS, tensor
from on_cpu import COMPILER, NO_COMPILER

from holoray.kernels import xp

HERE = Path(__file__).parent


def run_ranks(kind: str, size: int, folder: Path, **environment: str) -> list[int]:
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    program = [sys.executable, str(HERE / "combining_rank.py"), kind]
    variables = os.environ | environment | {"PYTHONPATH": path}
    ranks = [subprocess.Popen([*program, str(rank), str(size), str(folder)], env=variables) for rank in range(size)]
    return [rank.wait(200) for rank in ranks]


def check(size: int, folder: Path) -> None:
    expected = tensor().view(np.uint16)
    for rank in range(size):
        for codec in CODECS:
            assert np.array_equal(np.load(folder / f"{codec}-{rank}.npy"), expected), (codec, rank)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)
@pytest.mark.timeout(240)
def test_ranks_on_the_cpu(tmp_path: Path) -> None:
    assert run_ranks("host", 2, tmp_path) == [0, 0]
    check(2, tmp_path)


@pytest.mark.gpu
@pytest.mark.timeout(240)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_of_nccl(size: int, tmp_path: Path) -> None:
    """Also more ranks than there are GPUs, where NCCL takes several on one."""
    shares = xp.device_count() < size
    codes = run_ranks("nccl", size, tmp_path, **({"NCCL_MULTI_RANK_GPU_ENABLE": "1"} if shares else {}))
    said = "; ".join(path.read_text() for path in sorted(tmp_path.glob("error-*")))
    if shares and any(codes):
        pytest.skip(f"NCCL does not take {size} ranks on {xp.device_count()} GPUs: {said}")
    assert not any(codes), said
    check(size, tmp_path)
