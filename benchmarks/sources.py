"""Loads over HTTP from several sources on loopback, some of which lie or are slow, and what integrity costs there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

import holoray
from benchmarks.load import gaussian_model, load_unverified
from benchmarks.measure import Row, beside
from benchmarks.throttled import Throttled, throttled
from holoray.pipelines.sealed_store import SealedStore
from holoray.stores import fragment_file
from holoray.tensor import Array

STORE_BYTES: Final = 200 << 20
_SOURCES: Final = 4
_RATE: Final = 25e6  # bytes a second of each: slow enough that even a busy machine is not what limits the load
_SLOWER: Final = 100
_FAST: Final = 200e6


def measure(directory: Path, repeat: int, nbytes: int = STORE_BYTES) -> Iterator[Row]:
    """Rows for three liars of four, one slow source of four, and sha256 at 200 MB/s."""
    model = gaussian_model(nbytes)
    honest, lying = directory / "honest" / "store", directory / "lying" / "store"
    holoray.encode(model, honest, codec="raw", overwrite=True)
    _forge(honest, lying)
    with ExitStack() as stack:
        servers = [stack.enter_context(throttled(honest.parent)) for _ in range(_SOURCES)]
        liars = [stack.enter_context(throttled(lying.parent)) for _ in range(_SOURCES - 1)]
        yield from _with_liars(servers[-1], liars, model, nbytes, repeat)
        yield from _with_a_slow_one(servers, nbytes, repeat)
        yield from _integrity(servers[0], nbytes, repeat)


def _forge(honest: Path, lying: Path) -> None:
    """A copy of a store with one bit of every fragment flipped."""
    shutil.copytree(honest, lying, dirs_exist_ok=True)
    for tensor in holoray.open(honest).manifest.tensors:
        for entry in tensor.fragments:
            with open(lying / fragment_file(entry.file), "r+b") as file:
                file.seek(entry.offset)
                first = file.read(1)[0]
                file.seek(entry.offset)
                file.write(bytes([first ^ 1]))


def _opened(servers: Sequence[Throttled]) -> SealedStore:
    return holoray.open(*(server.http("store") for server in servers), fault_policy=holoray.FaultPolicy())


def _load(servers: Sequence[Throttled]) -> SealedStore:
    """A pool that knows nothing yet, and a load from it."""
    sealed = _opened(servers)
    sealed.load()
    return sealed


def _with_liars(
    good: Throttled, liars: Sequence[Throttled], model: dict[str, Array], nbytes: int, repeat: int
) -> Iterator[Row]:
    for server in (good, *liars):
        server.limit(4 * _RATE)
    every = [*liars, good]
    weights = _opened(every).load()
    exact = all(weights[name].tobytes() == array.tobytes() for name, array in model.items())
    name = f"3 of 4 sources lie: {'exact' if exact else 'NOT EXACT'}"
    yield beside(name, nbytes, partial(_load, every), partial(_load, [good]), repeat, to="the honest one alone")


def _with_a_slow_one(servers: Sequence[Throttled], nbytes: int, repeat: int) -> Iterator[Row]:
    *healthy, slow = servers
    for server in healthy:
        server.limit(_RATE)
    slow.limit(_RATE / _SLOWER)
    shares: list[float] = []

    def load() -> None:
        stats = _load([slow, *healthy]).stats()
        shares.append(sum(s.hedged_bytes for s in stats) / nbytes)

    name = f"1 of 4 sources {_SLOWER} times slower"
    row = beside(name, nbytes, load, partial(_load, healthy), repeat, to="the three others", aim=">= .8")
    yield row
    yield Row(f"the same: at most {max(shares):.2%} of the bytes hedged", row.rate, aim="<= 5 %")


def _integrity(server: Throttled, nbytes: int, repeat: int) -> Iterator[Row]:
    server.limit(_FAST)
    sealed = holoray.open(server.http("store"))
    unverified = partial(load_unverified, sealed)
    name = f"one source of {_FAST / 1e6:.0f} MB/s, sha256 and xxh3_64"
    yield beside(name, nbytes, sealed.load, unverified, repeat, to="unverified", aim=">= .91")
