"""`make bench`: every measurement, as a table with the machine it ran on.

python -m benchmarks.run [--repeat 5] [--only planes|spectral|load|fragments|quality] [--write docs/benchmarks.md]
"""

from __future__ import annotations

import argparse
import datetime
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import load, planes, quality, spectral
from benchmarks.measure import Row, machine, markdown

_HEAD = """# Benchmarks

Measured by `make bench ARGS='--write docs/benchmarks.md'`; rates are GB/s (1e9) of tensor bytes, the best of several
runs, data in memory or page cache. Ratios are of medians, measured in turns: they carry over to other machines.
"""


def main() -> None:
    """Run the suites and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", choices=("planes", "spectral", "load", "fragments", "quality"))
    parser.add_argument("--write", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    parts = [f"{machine()}. {datetime.date.today().isoformat()}, {len(os.sched_getaffinity(0))} threads.\n"]
    print(parts[0])
    with tempfile.TemporaryDirectory(prefix="holoray-bench-") as directory:
        suites: dict[str, tuple[str, Callable[[], Iterable[Row]]]] = {
            "planes": ("`planes` in memory", lambda: planes.measure(arguments.repeat)),
            "spectral": ("`spectral`, one thread", lambda: spectral.measure(arguments.repeat)),
            "load": ("Whole stores of 256 MiB bf16", lambda: load.measure(Path(directory), arguments.repeat)),
            "fragments": ("Fragment counts", lambda: load.fragment_counts(arguments.repeat)),
        }
        for name, (title, suite) in suites.items():
            if arguments.only in (None, name):
                parts.append(markdown(title, list(suite())))
                print(parts[-1], flush=True)
    if arguments.only in (None, "quality"):  # columns of its own
        parts.append(quality.report())
        print(parts[-1], flush=True)
    if arguments.write is not None:
        arguments.write.write_text("\n".join([_HEAD, *parts]), encoding="utf-8")


if __name__ == "__main__":
    main()
