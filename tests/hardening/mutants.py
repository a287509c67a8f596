"""Seeded random mutants of a small store, and what becomes of them.

    python tests/hardening/mutants.py SEED [SEED...]    replays mutants, one process for all
    python tests/hardening/mutants.py --range START END [--report FILE]

Even seeds keep the true `ROOT` and damage any file: what loads must be bit-identical to the original. Odd seeds are
sealed again with a fresh `ROOT`, so that the readers behind it are reached: what loads must be well-formed.
A mutant runs under an alarm and a limit of address space; `--report` names the seed under way, for the one who waits.
Most run without threads, whose starts would take two thirds of the time; which do, is a matter of the seed as well.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from manifest_mutations import mutate_manifest, reseal
from small_store import Blobs, blobs, fragment_files, pristine, store_of

import holoray
from holoray.errors import HolorayError
from holoray.manifest import Manifest
from holoray.stores import MANIFEST, ROOT, Store
from holoray.tensor import Array

ALARM_S = 20.0
ADDRESS_SPACE_BYTES = 2 << 30
"""Address space a mutant may use beyond what the process has when it begins."""
VERIFY_SHARE, FILE_SHARE = 0.15, 0.1
THREADED = 16
"""Of so many pairs of mutants one (a true root and a fresh one) runs with threads, as every load does."""

BOUNDARIES = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    (1 << 63) - 1,
    1 << 63,
)


def mutate_bytes(random_: random.Random, data: bytes, other: bytes) -> bytes:
    """One random change of some bytes; `other` is what a splice takes from."""
    kinds: tuple[Callable[[random.Random, bytes, bytes], bytes], ...] = (
        _flip, _flip, _set, _number, _number, _truncate, _delete, _insert, _splice, _repeat
    )  # fmt: skip
    return random_.choice(kinds)(random_, data, other)


def _place(random_: random.Random, data: bytes) -> int:
    """A place in the data, more often near the ends: that is where headers are."""
    if random_.random() < 0.3:
        return random_.randrange(min(len(data), 96) + 1)
    return random_.randrange(len(data) + 1)


def _flip(random_: random.Random, data: bytes, other: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random_.choice((1, 1, 2, 8)) if changed else 0):
        changed[random_.randrange(len(changed))] ^= 1 << random_.randrange(8)
    return bytes(changed)


def _set(random_: random.Random, data: bytes, other: bytes) -> bytes:
    at, length = _place(random_, data), random_.choice((1, 1, 4, 64))
    return (
        data[:at]
        + bytes([random_.choice((0, 1, 0x7F, 0x80, 0xFF, random_.randrange(256)))]) * length
        + data[at + length :]
    )


def _number(random_: random.Random, data: bytes, other: bytes) -> bytes:
    width = random_.choice((1, 2, 4, 8))
    at = _place(random_, data) // width * width
    value = random_.choice((*BOUNDARIES, len(data), -1, random_.getrandbits(64))) + random_.choice((-1, 0, 0, 1))
    return data[:at] + (value % (1 << 8 * width)).to_bytes(width, "little") + data[at + width :]


def _truncate(random_: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: _place(random_, data)]


def _delete(random_: random.Random, data: bytes, other: bytes) -> bytes:
    at = _place(random_, data)
    return data[:at] + data[at + random_.choice((1, 2, 4, 8, 64, 512)) :]


def _insert(random_: random.Random, data: bytes, other: bytes) -> bytes:
    at = _place(random_, data)
    return data[:at] + random_.randbytes(random_.choice((1, 2, 4, 8, 64, 512))) + data[at:]


def _splice(random_: random.Random, data: bytes, other: bytes) -> bytes:
    start, length = _place(random_, other), random_.choice((4, 16, 64, 512, 4096))
    at = _place(random_, data)
    piece = other[start : start + length]
    return data[:at] + piece + data[at + (len(piece) if random_.random() < 0.7 else 0) :]


def _repeat(random_: random.Random, data: bytes, other: bytes) -> bytes:
    at, length = _place(random_, data), random_.choice((1, 8, 64))
    return data[:at] + data[at : at + length] * random_.choice((2, 3, 100)) + data[at + length :]


def mutant(seed: int) -> Blobs:
    """The files of mutant `seed`."""
    random_ = random.Random(seed)
    files = blobs()
    if seed % 2 == 0:
        return _damage_files(random_, files)
    if random_.random() < 0.15:  # bytes of the manifest itself, sealed: whatever Arrow makes of them
        for _ in range(random_.choice((1, 1, 2))):
            files[MANIFEST] = mutate_bytes(random_, files[MANIFEST], files[random_.choice(fragment_files())])
        return reseal(files)
    return mutate_manifest(random_, files, mutate_bytes)


def _damage_files(random_: random.Random, files: Blobs) -> Blobs:
    names = [ROOT, MANIFEST, *fragment_files() * 3]
    for _ in range(random_.choice((1, 1, 1, 2, 3))):
        name, other = random_.choice(names), random_.choice(names)
        how = random_.random()
        if how < 0.03:
            files.pop(name, None)
        elif how < 0.08:
            files[name], files[other] = files.get(other, b""), files.get(name, b"")
        elif name in files:
            files[name] = mutate_bytes(random_, files[name], files.get(other, b""))
    return files


class _Here(Executor):
    """Does everything at once, in the caller's thread."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


@contextmanager
def _threads(seed: int) -> Iterator[None]:
    if seed // 2 % THREADED == 0:
        yield
        return
    with (
        mock.patch("holoray.pipelines.fragment_pipeline.ThreadPoolExecutor", _Here),
        mock.patch("holoray.pipelines.verify.ThreadPoolExecutor", _Here),
    ):
        yield


def outcome(seed: int, files: Blobs) -> str:
    """Open, load, now and then verify a mutant; raises for whatever must not happen."""
    with _threads(seed):
        return _outcome(seed, files)


def _outcome(seed: int, files: Blobs) -> str:
    random_ = random.Random(-1 - seed)
    store = store_of(files)
    try:
        sealed = holoray.open(store, expect=None if random_.random() < 0.8 else _root_of(files))
        if random_.random() < VERIFY_SHARE:
            sealed.verify()
            sealed.quality_curve()
        if random_.random() < FILE_SHARE:
            _load_to_file(store)
        loaded = sealed.load()
        _check_partial(random_, sealed)
    except HolorayError as error:
        return type(error).__name__
    if seed % 2 == 0:
        _check_unchanged(loaded)
        return "unchanged"
    check_well_formed(sealed.manifest, loaded)
    return "well-formed"


def _root_of(files: Blobs) -> str:
    return files.get(ROOT, b"").decode("latin-1").strip() or "none"


def _load_to_file(store: Store) -> None:
    from holoray.pipelines.api import load_file

    with tempfile.TemporaryDirectory() as directory:
        sealed = holoray.open(store)
        if sealed.manifest.bytes_in < 64 << 20:
            load_file(sealed, Path(directory) / "out.safetensors")


def _check_partial(random_: random.Random, sealed: holoray.SealedStore) -> None:
    """Partial loads of the same store: a refusal is fine."""
    if random_.random() < 0.2:
        sealed.load(**random_.choice(({"quality": 0.9}, {"bytes": 30_000}, {"fragments": (0, 2)})))


def _check_unchanged(loaded: dict[str, Array]) -> None:
    from small_store import bits

    if bits(loaded) != pristine():
        raise AssertionError("another tensor behind a true root")


def check_well_formed(manifest: Manifest, loaded: dict[str, Array]) -> None:
    """The tensors of the manifest that was read, with its dtypes and shapes."""
    expected = {t.name: (t.spec.numpy_dtype, t.spec.shape) for t in manifest.tensors}
    if {name: (array.dtype, array.shape) for name, array in loaded.items()} != expected:
        raise AssertionError("the result is not what the manifest describes")


def run(seeds: range | list[int], report: Path | None = None) -> Counter[str]:
    """Try mutants in this process: a crash, the alarm or an exception ends it, and `report` says at which seed."""
    pristine()  # kernels are compiled before limits and alarms begin
    _limit_address_space()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    tally: Counter[str] = Counter()
    seen = os.open(report, os.O_RDWR | os.O_CREAT) if report else None
    for seed in seeds:
        if seen is not None:
            os.pwrite(seen, b"%20d" % seed, 0)
        signal.setitimer(signal.ITIMER_REAL, ALARM_S)
        try:
            tally[outcome(seed, mutant(seed))] += 1
        except BaseException:
            print(f"mutant {seed} ends in no HolorayError:", file=sys.stderr)
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    return tally


def _limit_address_space() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE_BYTES, resource.RLIM_INFINITY))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", type=int, nargs="*")
    parser.add_argument("--range", type=int, nargs=2, default=(0, 0), metavar=("START", "END"))
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # NumPy's remarks about NaN in weights that are nonsense
    tally = run([*arguments.seeds, *range(*arguments.range)], arguments.report)
    for name, count in tally.most_common():
        print(count, name)


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.exit(1)
