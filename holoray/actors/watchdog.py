"""A small process that outlives another one, to remove what that one could not: it may be killed at any moment.

    python -S -m holoray.actors.watchdog job JOB NODE SECONDS   when the job has had no worker on the node for so long
    python -S -m holoray.actors.watchdog driver JOB NODE        when the job's driver, which runs on the node, is gone
    python -S -m holoray.actors.watchdog directory PATH         when nobody holds PATH/driver.lock any more

There is one for each job and node, one for each private Ray; each ends with what it watches. It knows that a process
is gone by its lock, so it needs no process ids, and no parent: it is nobody's child, or Ray would end it, too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from holoray.actors.locks import DRIVER, Names, any_held, hold_lock, is_held, remove_node

POLL_S: Final = 0.5
LINGER_S: Final = 5.0
"""How long a node without a worker keeps its files: a killed worker is back within that time, and needs them."""
_CALM_S: Final = 3.0
"""For so long nothing may come back of what was removed: processes that are being killed still make files."""


def watch_job(names: Names, linger_s: float = LINGER_S) -> None:
    """Have the job's files on this node removed when it has had no worker here for some seconds."""
    if not is_held(names.lock("watchdog")):
        _start("job", names.job, names.node, str(linger_s))


def watch_driver(names: Names) -> None:
    """Have the job's files on this node removed when this process, the job's driver, is gone."""
    _start("driver", names.job, names.node)


def watch_directory(directory: str) -> int:
    """Have a directory removed when this process is gone; returns a descriptor, closing which ends the watch."""
    lock = hold_lock(_directory_lock(directory))
    _start("directory", directory)
    return lock


def _start(*arguments: str) -> None:
    package = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-S", "-m", "holoray.actors.watchdog", *arguments],
        env=os.environ | {"PYTHONPATH": str(package)},
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    process.wait()  # it forks at once


def _directory_lock(directory: str) -> Path:
    return Path(directory, DRIVER + ".lock")


def _await(condition: Callable[[], bool], for_s: float = 0.0, *, over: Callable[[], bool] = lambda: False) -> None:
    """Return once the condition has held for so long, or when it is all over."""
    since: float | None = None
    while not over():
        if not condition():
            since = None
        elif since is None:
            since = time.monotonic()
        if since is not None and time.monotonic() - since >= for_s:
            return
        time.sleep(POLL_S)


def _remove_directory(directory: str) -> bool:
    """Remove what is there; returns whether there was nothing."""
    clean = not os.path.exists(directory)
    shutil.rmtree(directory, ignore_errors=True)
    return clean


def _clear(names: Names) -> bool:
    return not names.files or (remove_node(names) and not names.files)


def main(what: str, *arguments: str) -> None:
    """Watch until there is nothing to watch any more."""
    if what == "directory":
        (directory,) = arguments
        _await(lambda: not is_held(_directory_lock(directory)))
        _await(lambda: _remove_directory(directory), _CALM_S)
        return
    names = Names(*arguments[:2])
    if is_held(names.lock("watchdog")) or not names.files:  # the job has another, or is over already
        return
    hold_lock(names.lock("watchdog"))
    if what == "driver":
        _await(lambda: not is_held(names.lock(DRIVER)))
    else:
        _await(lambda: not any_held(names.workers), float(arguments[2]), over=lambda: not names.files)
    _await(lambda: _clear(names), _CALM_S)


if __name__ == "__main__":
    if os.fork() == 0:
        main(*sys.argv[1:])
