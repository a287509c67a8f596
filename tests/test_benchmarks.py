"""The benchmarks' own arithmetic and servers, and one small run of the loads beside rivals."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Value
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import urllib3
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from benchmarks.break_even import break_even
from benchmarks.throttled import TokenBucket, throttled

ROOT = Path(__file__).resolve().parents[1]
RATES = (50e6, 200e6, 1e9, math.inf)

_seconds = st.lists(st.floats(0.01, 10), min_size=4, max_size=4)


@settings(deadline=None, max_examples=60)
@given(ours=_seconds, theirs=_seconds, fewer=st.integers(10**6, 10**8))
def test_break_even_is_where_the_lead_first_changes_hands(ours: list[float], theirs: list[float], fewer: int) -> None:
    found = break_even(dict(zip(RATES, ours, strict=True)), dict(zip(RATES, theirs, strict=True)), fewer)

    def lead(rate: Any) -> Any:
        """By numpy's interpolation, over seconds a byte."""
        x = np.array([1 / r for r in reversed(RATES)])
        y = np.array(theirs[::-1]) - np.array(ours[::-1])
        return np.interp(1 / rate, x, y) + np.maximum(0.0, 1 / rate - x[-1]) * fewer

    grid = np.geomspace(1e5, 1e12, 4001)
    behind = grid[lead(grid) < 0]
    if found == 0:
        assert behind[0] == grid[0]
    elif math.isinf(found):
        assert not behind.size
    elif behind.size:  # a lead lost beyond the grid is not on it
        assert found <= behind[0] * 1.0001
        assert lead(found) == pytest.approx(0, abs=1e-6)


def test_what_the_throttled_server_serves(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(300_000)
    (tmp_path / "models" / "one").mkdir(parents=True)
    (tmp_path / "models" / "one" / "a b.bin").write_bytes(data)
    with throttled(tmp_path) as server, urllib3.PoolManager() as pool:
        url = server.http("models/one/a%20b.bin")
        assert pool.request("GET", url).data == data
        part = pool.request("GET", url, headers={"Range": "bytes=5-9"})
        assert (part.status, part.data, part.headers["Content-Range"]) == (206, data[5:10], "bytes 5-9/300000")
        assert pool.request("GET", url, headers={"Range": "bytes=299990-999999"}).data == data[-10:]
        assert pool.request("GET", url, headers={"Range": "bytes=300000-"}).status == 416
        assert pool.request("HEAD", url).headers["Content-Length"] == "300000"
        assert pool.request("GET", server.http("models/none")).status == 404
        assert pool.request("GET", server.http("models/%2e%2e/%2e%2e/etc/passwd")).status == 403
        filesystem, path = fs.FileSystem.from_uri(server.s3("models/one"))
        (found,) = filesystem.get_file_info(fs.FileSelector(path))
        assert (found.base_name, found.size) == ("a b.bin", 300_000)
        assert filesystem.open_input_file(found.path).read() == data


def test_all_connections_share_one_rate() -> None:
    """They may be slower than it, on a busy machine, and never faster."""
    rate, step, takes = 40e6, 50_000, 40
    bucket = TokenBucket(Value("d", rate))
    begin = threading.Barrier(4)

    def take(_: int) -> float:
        begin.wait()
        with bucket.transfer():
            for _ in range(takes):
                bucket.take(step)
        return time.perf_counter()

    with ThreadPoolExecutor(4) as pool:
        start = time.perf_counter()
        ends = list(pool.map(take, range(4)))
        assert max(ends) - start >= 4 * takes * step / rate
        time.sleep(0.1)  # what was not used is not saved up
        start = time.perf_counter()
        ends = list(pool.map(take, range(4)))
        assert max(ends) - start >= 4 * takes * step / rate


def test_a_small_run(tmp_path: Path) -> None:
    """Without the rivals' packages: those rows say so, and everybody's weights are the model's (it checks them)."""
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.run", "--only", "rivals", "--repeat", "1", "--megabytes", "2"]
    command += ["--no-minilm", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["rows"]["rivals"]
    loads = {(row["loader"], row["source"]): row for row in found["loads"]}
    sources = {source for _, source in loads}
    assert sources == {"page cache", "loopback, no limit", "1,000 MB/s", "200 MB/s", "50 MB/s"}
    for loader in ("safetensors, numpy: map and copy", "holoray raw", "holoray planes"):
        for source in sources:
            row = loads[loader, source]
            assert 0 < row["first_s"] <= row["total_s"]
            if row["rate"] is not None:
                assert row["total_s"] >= row["bytes_read"] / row["rate"]
    for source in sources - {"page cache"}:
        assert loads["fastsafetensors", source]["note"] in ("not installed", "cannot: reads local files only")
    two_layers = loads["holoray planes to two layers", "50 MB/s"]
    assert two_layers["bytes_read"] < loads["holoray planes", "50 MB/s"]["bytes_read"] / 3
    assert 0.9 < two_layers["quality"] < 0.999
    assert found["break_evens"]
    assert "### Break-even bandwidth" in done.stdout
