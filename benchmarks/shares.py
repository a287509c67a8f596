"""Stores in 8 shares beside the same store in one piece, from the page cache: ratios of processor time.

Wall time would mostly say how much the disk takes for the syncs of eight times as many files.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import holoray
from benchmarks.load import gaussian_model
from benchmarks.measure import Row, beside, best
from holoray.stores import LocalStore, Shares, open_shares

MODEL_BYTES = 128 << 20
SHARES = Shares.usable(8, 4, 7)


beside_one_piece = partial(beside, to="one piece", clock=time.process_time)


def measure(directory: Path, repeat: int) -> Iterator[Row]:
    """Rows whose ratios are to the plain store; rates are bytes of tensors."""
    model = gaussian_model(MODEL_BYTES)
    nbytes = sum(a.nbytes for a in model.values())
    plain, spread = directory / "plain", directory / "spread"
    encode = partial(holoray.encode, model, plain, overwrite=True)
    encode_shares = partial(holoray.encode, model, spread, shares=SHARES, overwrite=True)
    yield beside_one_piece("encode in 8 shares", nbytes, encode_shares, encode, max(repeat // 2, 1))
    sealed = holoray.open(plain)
    places = [spread / f"share-{index}" for index in range(SHARES.total)]
    for missing in (0, 1):
        shares = holoray.open(open_shares(places[missing:]))
        yield beside_one_piece(f"load, {missing} of 8 missing", nbytes, shares.load, sealed.load, repeat)
    usable = holoray.open(open_shares(places[4:]))
    quality = best_quality(usable)
    load = partial(usable.load, quality=quality)
    yield beside_one_piece("load what 4 of 8 give", nbytes, load, partial(sealed.load, quality=quality), repeat)

    def repair() -> None:
        shutil.rmtree(places[3])
        holoray.repair([LocalStore(spread)])

    yield Row("repair of 1 of 8 shares (all are checked, twice)", nbytes / best(repair, repeat) / 1e9)


def best_quality(store: holoray.SealedStore) -> float:
    """The best quality that the shares which are left allow."""
    return max(point.quality for point in store.curve().points) - 1e-6
