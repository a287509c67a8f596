"""Very many tensors: the work grows as their number does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
from manifest_mutations import Row, read_rows, reseal, write_rows
from small_store import Blobs, blobs, store_of

import holoray
from holoray.integrity import Digests
from holoray.stores import MANIFEST

FEW, MANY = 500, 2_000


def crowd(count: int) -> Blobs:
    """A store of `count` scalars: one row of the small store's manifest over and over, under other names."""
    header, rows = read_rows(blobs()[MANIFEST])
    row = next(row for row in rows if row["name"] == "layer.scale")
    (fragment,) = row["fragments"]
    payload = bytes(4)
    digests = Digests.of(payload)
    same = {"xxh3_64": digests.xxh3_64, "sha256": digests.sha256, "file": 0}

    def member(i: int) -> Row:
        return row | {"name": f"t{i}", "fragments": [fragment | same | {"offset": 4 * i, "order": i}]}

    header["files"] = [{"number": 0, "bytes": 4 * count, "framing_sha256": "0" * 64}]
    manifest = write_rows(header, [member(i) for i in range(count)])
    return reseal({MANIFEST: manifest, "fragments-00000.arrow": bytes(4 * count)})


def calls(work: Callable[[], object]) -> int:
    """How many calls (of Python and C functions) some work takes in this thread: what a clock says without noise."""
    count = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.fault("huge-count")
@pytest.mark.parametrize("verb", ["open", "plan", "inspect"])
def test_work_is_linear_in_the_number_of_tensors(verb: str) -> None:
    def work(count: int) -> Callable[[], object]:
        store = store_of(crowd(count))
        sealed = holoray.open(store)
        return {
            "open": lambda: holoray.open(store),
            "plan": lambda: sealed.loader(),
            "inspect": lambda: holoray.open(store).quality_curve(),
        }[verb]

    few, many = calls(work(FEW)), calls(work(MANY))
    assert few > FEW
    assert many < 1.2 * few * MANY / FEW


HUNDRED_THOUSAND = """
import json, re, sys, time  # ru_maxrss would begin with what the parent has
import holoray
holoray.open(sys.argv[2]).load()
start = time.perf_counter()
sealed = holoray.open(sys.argv[1])
opened = time.perf_counter() - start
weights = sealed.load()
print(json.dumps({"open_s": opened, "load_s": time.perf_counter() - start - opened, "tensors": len(weights),
                  "peak_mib": int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10}))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.fault("huge-count")
def test_a_hundred_thousand_tensors(tmp_path: Path) -> None:
    for name, count in (("many", 100_000), ("one", 1)):
        (tmp_path / name).mkdir()
        for blob, data in crowd(count).items():
            (tmp_path / name / blob).write_bytes(data)
    command = [sys.executable, "-c", HUNDRED_THOUSAND, str(tmp_path / "many"), str(tmp_path / "one")]
    environment = os.environ | {"PYTHONPATH": str(Path(holoray.__file__).parents[1])}
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment).stdout)
    print(found)
    assert found["tensors"] == 100_000
    assert found["peak_mib"] < 2048
