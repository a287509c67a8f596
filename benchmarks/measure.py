"""Timing, and rows of a table."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = (
    "holoray", "numpy", "scipy", "numba", "pyarrow", "zstandard", "xxhash", "safetensors", "ray", "zipnn",
    "torch", "runai-model-streamer", "tensorizer", "fastsafetensors",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One measurement: a rate in GB/s of tensor bytes, and its ratio to a rate of the same run."""

    name: str
    rate: float
    ratio: float | None = None
    to: str = ""
    aim: str = ""


def best(run: Callable[[], object], repeat: int) -> float:
    """The shortest of `repeat` runs, in seconds: what the machine can do when nobody disturbs it."""
    return min(seconds(run) for _ in range(repeat))


def beside(
    name: str,
    nbytes: int,
    run: Callable[[], object],
    reference: Callable[[], object],
    repeat: int,
    *,
    to: str,
    aim: str = "",
    before: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Row:
    """The rate of `run` (best of `repeat`), and the ratio of medians to `reference`.

    The two take turns, since a shared machine drifts; `before` runs, untimed, before each `run`. With
    `time.process_time` as `clock`, other processes matter less; it counts all threads.
    """
    times, references = [], []
    for _ in range(repeat):
        references.append(seconds(reference, clock))
        if before is not None:
            before()
        times.append(seconds(run, clock))
    ratio = statistics.median(references) / statistics.median(times)
    return Row(name, nbytes / min(times) / 1e9, ratio, to, aim)


def seconds(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Time of one call."""
    start = clock()
    run()
    return clock() - start


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
