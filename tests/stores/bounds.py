"""What a hostile server may cost: seconds and memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def bounded(seconds: float, nbytes: int = 64 << 20) -> Iterator[None]:
    """Fails if what happens inside takes longer, or the process ever has so much more resident memory.

    The seconds are a bound on hangs and far from what is expected: a busy machine must not make a test red.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from now on
    before = _status_bytes("VmRSS")
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds
    assert _status_bytes("VmHWM") - before < nbytes


def _status_bytes(field: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) << 10
