"""Timing, and rows of a table."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("holoray", "numpy", "scipy", "numba", "pyarrow", "zstandard", "xxhash", "safetensors", "ray", "zipnn")


@dataclass(frozen=True)
class Row:
    """One measurement: a rate in GB/s of tensor bytes, and its ratio to a rate of the same run."""

    name: str
    rate: float
    ratio: float | None = None
    to: str = ""
    aim: str = ""


def best(run: Callable[[], object], repeat: int, before: Callable[[], object] | None = None) -> float:
    """The shortest of `repeat` runs, in seconds: what the machine can do when nobody disturbs it."""
    times = []
    for _ in range(repeat):
        if before is not None:
            before()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def machine() -> str:
    """What this ran on."""
    cores = len(os.sched_getaffinity(0))
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown CPU")
    with open("/proc/meminfo", encoding="utf-8") as file:
        memory = int(file.readline().split()[1]) / 2**20
    packages = ", ".join(f"{name} {found}" for name in _PACKAGES if (found := _version(name)))
    return (
        f"{model}, {cores} cores, {memory:.0f} GiB, Linux {platform.release()}, "
        f"Python {platform.python_version()}; {packages}"
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def markdown(title: str, rows: Sequence[Row]) -> str:
    """A table of measurements."""
    lines = [f"### {title}", "", "| measurement | GB/s | ratio | of | aim |", "|---|---|---|---|---|"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        lines.append(f"| {row.name} | {row.rate:.2f} | {ratio} | {row.to} | {row.aim} |")
    return "\n".join(lines) + "\n"
