"""Prometheus itself, for tests: promtool, and a server on loopback with given blocks or a given configuration."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import yaml

_STARTS_S: Final = 20.0
T = TypeVar("T")
Labels = frozenset[tuple[str, str]]
Result = dict[Labels, float]


def labels(**values: str) -> Labels:
    return frozenset(values.items())


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)


@dataclass(frozen=True, slots=True)
class Server:
    url: str

    def query(self, expr: str, at: float | None = None) -> Result:
        """An instant query: the value of each series by its labels (`__name__` left out)."""
        form = {"query": expr} | ({} if at is None else {"time": repr(at)})
        data = self._get("query", form)
        if data["resultType"] == "scalar":
            return {frozenset(): float(data["result"][1])}
        return {
            frozenset((k, v) for k, v in one["metric"].items() if k != "__name__"): float(one["value"][1])
            for one in data["result"]
        }

    def label_values(self, label: str, selector: str, at: float) -> list[str]:
        """What a variable of a board offers: the values of a label in a selector."""
        form = {"match[]": selector, "start": repr(at - 3600), "end": repr(at)}
        found: list[str] = self._get(f"label/{label}/values?" + urllib.parse.urlencode(form))
        return found

    def _get(self, path: str, form: Mapping[str, str] | None = None) -> Any:
        body = None if form is None else urllib.parse.urlencode(form).encode()
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}", data=body, timeout=20) as answer:
            return json.load(answer)["data"]


@contextmanager
def running_server(directory: Path, config: Mapping[str, Any] | None = None) -> Iterator[Server]:
    """A server over the blocks in `directory`/data, with a configuration in `directory`; ends with the block."""
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config or {}), encoding="utf-8")
    command = [
        "prometheus",
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        "--storage.tsdb.retention.time=100y",
        "--web.listen-address=127.0.0.1:0",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        log: list[str] = []
        reader = threading.Thread(target=lambda: log.extend(process.stderr or ()))
        reader.start()
        try:
            address = until(lambda: _address(log, process), _STARTS_S)
            assert address != "ended", "".join(log)
            until(lambda: "Server is ready" in "".join(log), _STARTS_S)
            yield Server(f"http://{address}")
        finally:
            process.kill()
            reader.join()


def _address(log: list[str], process: subprocess.Popen[str]) -> str:
    """Where the server listens, as it says itself: no port has to be guessed."""
    found = re.search(r'Listening on".* address=(127\.0\.0\.1:[1-9]\d*)', "".join(log))
    if found:
        return found[1]
    return "ended" if process.poll() is not None else ""


def until(condition: Callable[[], T], timeout_s: float) -> T:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found
