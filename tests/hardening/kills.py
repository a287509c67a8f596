"""Encodes that are killed, each in a forked process, and what they leave.

    python tests/hardening/kills.py DIRECTORY [--every N] [--random COUNT] [--seed SEED]

At every N-th step that changes the disk by SIGKILL, and COUNT times at a random moment by SIGKILL or SIGINT; into an
empty directory, over a store, and where another encode was killed before. What is left must be the old store, or the
new one, or none that looks like one; and encoding again must come to the new one, with nothing else beside it.
Prints the number of each outcome; an exception tells the trial.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from write_faults import REMOVING, WRITING, Steps, nothing, stepping

import holoray
from holoray.checkpoint import save_checkpoint
from holoray.errors import SourceError, UsageError
from holoray.pipelines import store_writer
from holoray.stores.base import REPLACEMENT, is_journal
from holoray.tensor import Array

LONGEST_S = 60.0


def model(seed: int) -> dict[str, Array]:
    random_ = np.random.default_rng(seed)
    return {name: random_.standard_normal((70, 70)).astype(np.float32) for name in ("a", "b", "c")}


@dataclass(frozen=True)
class Grounds:
    """Two checkpoints, where to encode them, and the roots that they have."""

    directory: Path
    old_root: str
    new_root: str
    files: frozenset[str]

    @classmethod
    def prepare(cls, directory: Path) -> Grounds:
        store_writer.SEGMENT_BYTES = 1  # a journal after each tensor
        for name, seed in (("old", 1), ("new", 2)):
            save_checkpoint(directory / f"{name}.safetensors", model(seed))
        old, new = (encode(directory, name, directory / f"{name}.store") for name in ("old", "new"))
        return cls(directory, old, new, frozenset(os.listdir(directory / "new.store")))


def encode(directory: Path, name: str, store: Path, *, overwrite: bool = False) -> str:
    """The root of a store of that checkpoint."""
    return holoray.encode(directory / f"{name}.safetensors", store, codec="raw", threads=1, overwrite=overwrite).root


def killed(work: Callable[[], object], kill: Callable[[int], None]) -> int:
    """Run `work` in a forked process, `kill` it from here; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except KeyboardInterrupt:
            os._exit(130)
        except BaseException:
            os._exit(1)
        os._exit(0)
    kill(child)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(step: int) -> Steps:
    return Steps(step, lambda: os.kill(os.getpid(), signal.SIGKILL))


def judge(grounds: Grounds, store: Path) -> str:
    """What is there: `old`, `new` or `none`; raises where it is anything else, or where encoding again goes wrong."""
    try:
        sealed = holoray.open(store)
    except SourceError:
        found = "none"
    else:
        found = {grounds.old_root: "old", grounds.new_root: "new"}[sealed.root]
        if sealed.verify():
            raise AssertionError(f"a damaged store: {sealed.verify()}")
    with suppress(UsageError):  # it is there, or what was under way when the kill came has been brought to its end
        encode(grounds.directory, "new", store, overwrite=found == "old")
    again = holoray.open(store)
    if again.root != grounds.new_root or again.verify():
        raise AssertionError(f"encoding again came to {again.root}: {again.verify()}")
    left = set(os.listdir(store)) - {".lock"}
    if found == "new":  # killed when all was done but the tidying up
        left = {name for name in left if not is_journal(name) and name != REPLACEMENT}
    if left != grounds.files:
        raise AssertionError(f"left behind: {left ^ grounds.files}")
    return found


def trial(grounds: Grounds, name: str, before: str, steps: Steps, kill: Callable[[int], None]) -> str:
    """One encode over what is `before`, killed; returns what was found then."""
    store = grounds.directory / name
    if before == "store":
        encode(grounds.directory, "old", store)
    elif before == "killed":
        killed(lambda: _stepping(grounds, store, kill_at(30), overwrite=False), lambda child: None)
    status = killed(lambda: _stepping(grounds, store, steps, overwrite=before == "store"), kill)
    if status == 1:
        raise AssertionError("the encode failed by itself")
    return f"{before}-{judge(grounds, store)}"


def _stepping(grounds: Grounds, store: Path, steps: Steps, *, overwrite: bool) -> None:
    with stepping(steps, WRITING + REMOVING):
        encode(grounds.directory, "new", store, overwrite=overwrite)


def at_steps(grounds: Grounds, every: int) -> Counter[str]:
    """SIGKILL at every n-th step of each kind of encode."""
    found: Counter[str] = Counter()
    for before in ("nothing", "store", "killed"):
        store = grounds.directory / f"rehearsal-{before}"
        if before == "store":
            encode(grounds.directory, "old", store)
        with stepping(Steps(-1, nothing), WRITING + REMOVING) as steps:
            encode(grounds.directory, "new", store, overwrite=before == "store")
        for step in range(0, steps.count, every):
            try:
                found[trial(grounds, f"{before}-{step}", before, kill_at(step), lambda child: None)] += 1
            except Exception as error:
                raise AssertionError(f"an encode over {before}, killed at step {step}") from error
    return found


def at_random(grounds: Grounds, count: int, seed: int) -> Counter[str]:
    """SIGKILL or SIGINT at random moments within the time that an encode takes, and a little more."""
    start = time.perf_counter()
    killed(lambda: encode(grounds.directory, "new", grounds.directory / "timed"), lambda child: None)
    took_s = min(time.perf_counter() - start, LONGEST_S)
    found: Counter[str] = Counter()
    for number in range(seed, seed + count):
        random_ = random.Random(number)
        before = random_.choice(("nothing", "store", "killed"))
        delay_s, how = random_.uniform(0, 1.2 * took_s), random_.choice((signal.SIGKILL, signal.SIGINT))

        def kill(child: int, delay_s: float = delay_s, how: signal.Signals = how) -> None:
            time.sleep(delay_s)
            os.kill(child, how)

        try:
            found[trial(grounds, f"random-{number}", before, Steps(-1, nothing), kill)] += 1
        except Exception as error:
            raise AssertionError(f"an encode over {before}, seed {number}: {how.name} after {delay_s:.4f} s") from error
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--random", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    grounds = Grounds.prepare(arguments.directory)
    found = at_steps(grounds, arguments.every) + at_random(grounds, arguments.random, arguments.seed)
    for name, number in sorted(found.items()):
        print(number, name)


if __name__ == "__main__":
    main()
