"""Loads beside rivals: from the page cache, and from a source on loopback that is throttled."""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.break_even import break_even
from benchmarks.contenders import CONTENDERS, Contender, Watch, point_s3_at, prepare
from benchmarks.throttled import UNLIMITED, Throttled, throttled
from holoray.tensor import Array, as_bytes

BUCKET: Final = "models"
REFERENCE: Final = "safetensors, numpy: map and copy"
OURS: Final = "holoray planes"
RATES: Final = (UNLIMITED, 1e9, 200e6, 50e6)
MAX_RUNS: Final = {UNLIMITED: 5, 1e9: 5, 200e6: 2, 50e6: 1}  # a slow link is an even one
CONFIRM_AT: Final = (0.5, 2.0)
_FASTEST_CONFIRMED: Final = 2.5e9  # beyond, the server itself is the limit


@dataclass(frozen=True)
class Load:
    """One loader at one source: medians in seconds (`best_s`: the shortest), `note` where it cannot."""

    model: str
    source: str
    loader: str
    rate: float | None = None
    bytes_read: int = 0
    quality: float = 1.0
    first_s: float | None = None
    total_s: float | None = None
    best_s: float | None = None
    runs: int = 0
    partial: bool = False
    note: str = ""


@dataclass(frozen=True)
class BreakEven:
    """Where `planes` complete and a rival are equally fast, computed; and how much faster planes were around it."""

    model: str
    rival: str
    rate: float
    measured: tuple[tuple[float, float], ...]
    """(bytes a second, their seconds / ours)"""


@dataclass(frozen=True)
class Results:
    """Everything that was measured; `json` is what `--json` writes."""

    loads: tuple[Load, ...]
    break_evens: tuple[BreakEven, ...]

    def json(self) -> dict[str, Any]:
        return {
            "loads": [_finite(asdict(row)) for row in self.loads],
            "break_evens": [_finite(asdict(row)) for row in self.break_evens],
        }


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """Without infinities, which JSON does not know: no limit is null."""
    return {key: None if value == math.inf else value for key, value in row.items()}


def measure(models: Mapping[str, Callable[[], dict[str, Array]]], repeat: int) -> Results:
    """Every contender with every model at every source; the first model also gives the break-even bandwidths."""
    loads: list[Load] = []
    break_evens: list[BreakEven] = []
    with tempfile.TemporaryDirectory(prefix="holoray-bench-") as name, throttled(Path(name)) as server:
        directory = Path(name) / BUCKET
        point_s3_at(server.host)
        for title, make in models.items():
            print(f"{title}: in every format, and once through every loader", file=sys.stderr, flush=True)
            model = make()
            prepare(directory / title, model)
            bench = _Bench(title, directory / title, server, repeat)
            bench.check(model)
            del model
            mine = [load for rate in (None, *RATES) for load in bench.measure(rate)]
            loads += mine
            if not break_evens:
                break_evens += bench.break_evens(mine)
    return Results(tuple(loads), tuple(break_evens))


class _Bench:
    """One model, at one server."""

    def __init__(self, model: str, directory: Path, server: Throttled, repeat: int) -> None:
        self._model = model
        self._directory = directory
        self._server = server
        self._repeat = repeat

    def check(self, model: Mapping[str, Array]) -> None:
        """Run everything once: imports and compilers are done, and who loads something else is found out."""
        self._server.limit(UNLIMITED)
        for contender in CONTENDERS:
            for rate in (None, UNLIMITED):
                if contender.installed and (where := self._where(contender, rate)):
                    loaded = contender.load(where, Watch())
                    if not contender.partial:
                        _compare(contender.name, loaded, model)

    def measure(self, rate: float | None) -> Iterator[Load]:
        """Rows of one source, the contenders in turns; `rate` is None for files in the page cache."""
        runs = self._repeat if rate is None else min(self._repeat, MAX_RUNS[rate])
        print(f"{self._model}: {source_name(rate)}, {runs} times", file=sys.stderr, flush=True)
        able = {c: where for c in CONTENDERS if c.installed and (where := self._where(c, rate))}
        watches = self._in_turns(able, rate, runs)
        for contender in CONTENDERS:
            row = Load(self._model, source_name(rate), contender.name, rate, partial=contender.partial)
            if not contender.installed:
                yield replace(row, note="not installed")
            elif contender in able:
                yield _row(row, watches[contender], self._bytes(contender))
            elif rate is not None:
                yield replace(row, note="cannot: reads local files only")

    def break_evens(self, loads: Sequence[Load]) -> Iterator[BreakEven]:
        """Computed from the shortest times that `measure` found, then measured on either side.

        The shortest, since what is computed is a property of the loaders, not of what else the machine did.
        """
        times: dict[str, dict[float, float]] = defaultdict(dict)
        nbytes: dict[str, int] = {}
        for load in loads:
            if load.rate is not None and load.best_s is not None and not load.partial:
                times[load.loader][load.rate] = load.best_s
                nbytes[load.loader] = load.bytes_read
        by_name = {c.name: c for c in CONTENDERS}
        for rival in [name for name in times if not name.startswith("holoray")]:
            rate = break_even(times[OURS], times[rival], nbytes[rival] - nbytes[OURS])
            around = [rate * x for x in CONFIRM_AT if 0 < rate * x <= _FASTEST_CONFIRMED]
            print(f"{self._model}: around the break-even with {rival}", file=sys.stderr, flush=True)
            found = [(at, self._compared(by_name[OURS], by_name[rival], at)) for at in around]
            yield BreakEven(self._model, rival, rate, tuple(found))

    def _compared(self, ours: Contender, theirs: Contender, rate: float) -> float:
        able = {c: self._where(c, rate) for c in (ours, theirs)}
        watches = self._in_turns(able, rate, min(self._repeat, MAX_RUNS[1e9]))
        return _median(watches[theirs]) / _median(watches[ours])

    def _in_turns(self, able: Mapping[Contender, str], rate: float | None, runs: int) -> dict[Contender, list[Watch]]:
        self._server.limit(rate or UNLIMITED)
        watches: dict[Contender, list[Watch]] = {contender: [] for contender in able}
        for _ in range(runs):
            for contender, where in able.items():
                watches[contender].append(contender.run(where))
        return watches

    def _where(self, contender: Contender, rate: float | None) -> str:
        """Where this contender finds the model; empty if it cannot read from such a source."""
        path = f"{BUCKET}/{self._directory.name}/{contender.file}"
        if rate is None:
            return "" if "S3" in contender.name else str(self._directory / contender.file)
        if contender.remote == "s3":
            # Arrow takes the endpoint from the URI, Run:ai's streamer from the environment.
            return self._server.s3(path) if contender.package == "holoray" else f"s3://{path}"
        return self._server.http(path) if contender.remote == "http" else ""

    def _bytes(self, contender: Contender) -> int:
        path = self._directory / contender.file
        return path.stat().st_size if path.is_file() else 0


def source_name(rate: float | None) -> str:
    """Of a rate in bytes a second; None is the page cache."""
    if rate is None:
        return "page cache"
    return "loopback, no limit" if math.isinf(rate) else f"{rate / 1e6:,.0f} MB/s"


def _row(row: Load, watches: Sequence[Watch], file_bytes: int) -> Load:
    firsts = [watch.first_s for watch in watches if watch.first_s is not None]
    return replace(
        row,
        bytes_read=watches[0].bytes_read or file_bytes,
        quality=watches[0].quality,
        first_s=statistics.median(firsts) if firsts and not row.partial else None,
        total_s=_median(watches),
        best_s=min(watch.total_s for watch in watches),
        runs=len(watches),
    )


def _median(watches: Sequence[Watch]) -> float:
    return statistics.median(watch.total_s for watch in watches)


def _compare(name: str, loaded: Any, model: Mapping[str, Array]) -> None:
    if set(loaded) != set(model):
        raise RuntimeError(f"{name} loaded other tensors")
    for key, array in model.items():
        found = loaded[key]
        if not isinstance(found, np.ndarray):  # torch has bf16, its numpy() has not
            import torch

            found = found.detach().contiguous().view(torch.uint8).numpy()
        if not np.array_equal(as_bytes(found).reshape(-1), as_bytes(array).reshape(-1)):
            raise RuntimeError(f"{name} loaded a wrong {key}")
