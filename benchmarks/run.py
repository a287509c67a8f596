"""`make bench`: every measurement, as a table with the machine it ran on.

python -m benchmarks.run [--repeat 5]
    [--only planes|transforms|lowrank|load|serve|fragments|sources|shares|quality|rivals]
                         [--write docs/benchmarks.md] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import load, planes, quality, rivals, rivals_report, serving, shares, sources, transforms
from benchmarks.measure import Row, machine, markdown
from holoray.tensor import Array

_HEAD = """# Benchmarks

Measured in the environment of `make bench-rivals`, by `.venv-rivals/bin/python -m benchmarks.run --repeat 7 --write
docs/benchmarks.md --plot docs/benchmarks-loads.png`. Rates are GB/s (1e9) of tensor bytes, the best of several runs,
data in memory or page cache. Ratios are of medians, measured in turns: they carry over to other machines.
"""


def main() -> None:
    """Run the suites and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--repeat", type=int, default=5)
    suites_known = (
        "planes",
        "transforms",
        "lowrank",
        "load",
        "serve",
        "fragments",
        "sources",
        "shares",
        "quality",
        "rivals",
    )
    parser.add_argument("--only", choices=suites_known)
    parser.add_argument("--write", type=Path, help="also write the tables to this file")
    parser.add_argument("--json", type=Path, help="also write every row to this file")
    parser.add_argument(
        "--plot", type=Path, help="also draw the loads from throttled sources (needs matplotlib); beside --write's file"
    )
    parser.add_argument("--megabytes", type=int, default=load.MODEL_BYTES >> 20, help="size of the rivals' model, MiB")
    parser.add_argument("--no-minilm", action="store_true", help="leave the rivals' second, real model out")
    arguments = parser.parse_args()
    if arguments.plot is not None and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: `make bench-rivals` has it, or pip install matplotlib")
    rows: dict[str, Any] = {}
    parts = [f"{machine()}. {datetime.date.today().isoformat()}, {len(os.sched_getaffinity(0))} threads.\n"]
    print(parts[0])
    with tempfile.TemporaryDirectory(prefix="holoray-bench-") as directory:
        suites: dict[str, tuple[str, Callable[[], Iterable[Row]]]] = {
            "planes": ("`planes` in memory", lambda: planes.measure(arguments.repeat)),
            "transforms": ("Transforms, one thread, CPU time", lambda: transforms.measure(arguments.repeat)),
            "lowrank": ("`lowrank`", lambda: transforms.measure_lowrank(min(arguments.repeat, 3))),
            "load": ("Whole stores of 256 MiB bf16", lambda: load.measure(Path(directory), arguments.repeat)),
            "serve": ("From servers on loopback", lambda: serving.measure(Path(directory), arguments.repeat)),
            "fragments": ("Fragment counts", lambda: load.fragment_counts(arguments.repeat)),
            "sources": (
                "Several sources over HTTP, a raw store of 200 MiB",
                lambda: sources.measure(Path(directory), min(arguments.repeat, 3)),
            ),
            "shares": ("Any k of 8 shares, CPU time", lambda: shares.measure(Path(directory), arguments.repeat)),
        }
        for name, (title, suite) in suites.items():
            if arguments.only in (None, name):
                found = list(suite())
                rows[title] = [asdict(row) for row in found]
                parts.append(markdown(title, found))
                print(parts[-1], flush=True)
    if arguments.only in (None, "quality"):  # columns of its own
        parts.append(quality.report())
        print(parts[-1], flush=True)
    if arguments.only in (None, "rivals"):  # columns of its own
        models = _models(arguments.megabytes, with_minilm=not arguments.no_minilm)
        loads = rivals.measure(models, arguments.repeat)
        rows["rivals"] = loads.json()
        parts.append(rivals_report.markdown(loads))
        print(parts[-1], flush=True)
        if arguments.plot is not None:
            rivals_report.plot(loads, arguments.plot)
            parts.append(f"![Seconds to load, by the bandwidth of the source]({arguments.plot.name})\n")
    if arguments.json is not None:
        text = json.dumps({"machine": parts[0].strip(), "rows": rows}, indent=1, allow_nan=False)
        arguments.json.write_text(text, encoding="utf-8")
    if arguments.write is not None:
        arguments.write.write_text("\n".join([_HEAD, *parts]), encoding="utf-8")


def _models(megabytes: int, with_minilm: bool) -> dict[str, Callable[[], dict[str, Array]]]:
    """The models of the rivals' loads: the first is large enough for fast sources, the second is real."""
    models = {f"gaussian-{megabytes}MiB": lambda: load.gaussian_model(megabytes << 20)}
    return models | ({"MiniLM-L6": planes.minilm} if with_minilm else {})


if __name__ == "__main__":
    main()
