"""Bombs and absurd claims: refused with a typed error, at once, and within 64 MiB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import bombs
import numpy as np
import pytest
from manifest_mutations import Row

import holoray
from holoray.compression import decompress
from holoray.errors import FormatError

MAX_GROWTH_MIB = 64
MAX_SECONDS = 5.0
AT_ONCE = {"open": "error", "curve": "error", "verify": "error", "load": "error", "file": "error"}
AT_LOAD = AT_ONCE | {"open": "ok", "curve": "ok", "verify": "ok"}
FINE = dict.fromkeys(AT_ONCE, "ok")

# What looks right until a payload is opened is refused there; all else by whoever opens the store.
EXPECTED = dict.fromkeys((*bombs.BOMBS, *bombs.SPARSE), AT_ONCE) | {
    "zstd_states_too_much": AT_LOAD,
    "zstd_does_not_state_its_size": AT_LOAD,
    "zstd_frame_behind_an_honest_one": AT_LOAD,
    "zstd_window_of_two_gibibytes": FINE,
    "lz4_holds_too_much": AT_LOAD,
    "zstd_bomb_in_a_section_of_planes": AT_LOAD,
    "frame_that_lies_about_a_gibibyte": AT_LOAD,
    "rank_of_eight_thousand": AT_LOAD,
    "stored_bytes_of_an_exbibyte": AT_LOAD,
}


def _python(*arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(Path(holoray.__file__).parents[1])}
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """All bombs, built by one process and set off in another, whose memory is measured."""
    directory = str(tmp_path_factory.mktemp("bombs"))
    _python(bombs.__file__, "--build", directory)
    result: dict[str, Row] = json.loads(_python(bombs.__file__, "--measure", directory))
    return result


@pytest.mark.fault("bomb")
@pytest.mark.parametrize("name", EXPECTED)
def test_bomb(measured: dict[str, Row], name: str) -> None:
    found = measured[name]
    outcomes = {verb: "ok" if outcome == "ok" else "error" for verb, outcome in found["outcomes"].items()}
    assert outcomes == EXPECTED[name], found
    assert found["grown_mib"] < MAX_GROWTH_MIB, found
    assert found["seconds"] < MAX_SECONDS, found


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An honest store of one tensor of 192 MiB."""
    store = tmp_path_factory.mktemp("large") / "store"
    holoray.encode({"w": np.zeros(192 << 20, np.uint8)}, store)
    return store


def test_the_scale_shows_what_was_touched(large: Path) -> None:
    """An honest large tensor makes memory grow by more than the limit: the measurement measures."""
    script = f"import pathlib, bombs; print(bombs.measure(pathlib.Path({str(large)!r}))['grown_mib'])"
    code = f"import sys; sys.path.insert(0, {str(Path(bombs.__file__).parent)!r}); {script}"
    assert float(_python("-c", code)) > MAX_GROWTH_MIB


@pytest.mark.fault("no-memory")
def test_memory_that_is_not_there_is_a_capacity_error(large: Path) -> None:
    """An honest tensor larger than the address space: no bare MemoryError."""
    code = (
        "import resource, sys, holoray\n"
        "sealed = holoray.open(sys.argv[1])\n"
        "from pathlib import Path\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (160 << 20), resource.RLIM_INFINITY))\n"
        "try: sealed.load()\n"
        "except holoray.CapacityError as error: print('capacity', error.tensor)\n"
    )
    assert _python("-c", code, str(large)) == "capacity w\n"


@pytest.mark.fault("bomb")
@pytest.mark.parametrize("compression", ["zstd", "lz4", "none"])
def test_decompress_never_gives_another_size(compression: str) -> None:
    for data in (b"", b"\0", bytes(100), b"\x28\xb5\x2f\xfd" + bytes(20), b"\x04\x22\x4d\x18" + bytes(20)):
        for size in (2, 7, 99, 1 << 40):
            with pytest.raises(FormatError):
                decompress(compression, data, size)
