"""Golden stores: what this version writes, for every later version to read.

    python tests/golden/make.py [NAME...]      adds the next number under tests/golden/NAME (all names by default)

What is there is never written over. While a format is not released, delete its directory first: for the planes that is
`rm -r tests/golden/planes && .venv/bin/python tests/golden/make.py planes`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import numpy as np

import holoray
from holoray.tensor import DTYPES, Array

DIRECTORY: Final = Path(__file__).parent
STORES: Final[dict[str, dict[str, Any]]] = {
    "raw": {"codec": "raw"},
    "planes": {"codec": "planes"},
    "spectral": {"codec": "spectral", "fragments": 4, "seed": 1},
    "spectral-essential-half": {"codec": "spectral", "tile": 32, "essential": 0.2, "coefficients": "float16"},
    "projection": {"codec": "projection", "fragments": 4, "seed": 2},
    "projection-essential-half": {"codec": "projection", "essential": 0.05, "coefficients": "float16"},
    "lowrank": {"codec": "lowrank", "fragments": 3},
    "lowrank-essential-half": {"codec": "lowrank", "fragments": 3, "essential": 0.3, "coefficients": "float16"},
}
_HASH: Final = 2654435761  # Knuth's multiplier


def weights(name: str) -> dict[str, Array]:
    """The checkpoint of a store: from integers alone, so that every machine has the same bits."""
    if name.startswith("lowrank"):
        return {"few.terms": _few_terms(96, 48, 6), "bias": noise("F32", 40)}
    if name in ("spectral", "projection"):
        return {"odd": noise("F32", 67, 63), "bias": noise("F32", 40)}
    if name.endswith("half"):
        return {"brain": noise("BF16", 64, 65), "half": noise("F16", 5, 30, 28), "bias": noise("F32", 40)}
    return {
        "single": noise("F32", 67, 63),
        "brain": noise("BF16", 64, 65),
        "half": noise("F16", 5, 30, 28),
        "bias": noise("F32", 40),
        "count": np.arange(12, dtype=np.int64).reshape(3, 4),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.asarray(0.125, np.float32),
    }


def noise(dtype: str, *shape: int) -> Array:
    """Sums of two hashes of the position, in (-1, 1)."""
    place = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64)
    hashes = [(place * np.uint64(_HASH * k) >> np.uint64(7)) % np.uint64(1 << 20) for k in (1, 3)]
    array: Array = (np.sum(hashes, axis=0).astype(np.float64) / (1 << 20) - 1).astype(DTYPES[dtype])
    return array.reshape(shape)


def _few_terms(rows: int, columns: int, count: int) -> Array:
    """A sum of `count` outer products, each half of the one before."""
    total = np.zeros((rows, columns))
    for k in range(count):
        column, row = noise("F16", rows * (k + 1))[-rows:], noise("F16", columns * (k + 2))[-columns:]
        total += np.multiply.outer(column.astype(np.float64), row.astype(np.float64)) / 2**k
    return total.astype(np.float32)


def make(name: str) -> Path:
    """Encode the next version of a golden store."""
    number = 1 + max((int(path.name) for path in (DIRECTORY / name).glob("[0-9]*")), default=0)
    path = DIRECTORY / name / f"{number:02d}"
    holoray.encode(weights(name), path, **STORES[name])
    return path


if __name__ == "__main__":
    for chosen in sys.argv[1:] or STORES:
        print(make(chosen))
