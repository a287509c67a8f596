"""Loading from servers on loopback, in processes of their own, beside the local store."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import holoray
from benchmarks.load import gaussian_model
from benchmarks.measure import Row, beside, best
from benchmarks.throttled import throttled


def measure(directory: Path, repeat: int) -> Iterator[Row]:
    """Rows for `raw` and `planes`: the local store with sha256, as servers have it, then over HTTP and Flight."""
    model = gaussian_model()
    nbytes = sum(array.nbytes for array in model.values())
    for codec in ("raw", "planes"):
        root = holoray.encode(model, directory / codec, codec=codec, overwrite=True).root
        local = holoray.open(directory / codec, expect=root).load
        yield Row(f"load {codec}, local, sha256", nbytes / best(local, repeat) / 1e9)
        with throttled(directory) as http, flight_server(directory / codec) as flight:
            for name, uri, aim in (("HTTP", http.http(codec), ""), ("Flight", flight, ">= .5")):
                load = partial(_load, uri)
                yield beside(f"load {codec} over {name}", nbytes, load, local, repeat, to="local, sha256", aim=aim)


def _load(uri: str) -> None:
    """Opened anew each time: connecting and the manifest are part of a load."""
    holoray.open(uri).load()


@contextmanager
def flight_server(store: Path) -> Iterator[str]:
    """The URI of `holoray serve` in a process of its own."""
    command = [sys.executable, "-m", "holoray", "serve", str(store), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["uri"]
        finally:
            process.terminate()
