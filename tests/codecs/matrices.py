"""Matrices with known structure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from holoray.tensor import Array


def gaussian(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def smooth(side: int) -> Array:
    """A hill."""
    u = np.linspace(0, 1, side)
    hill: Array = np.exp(-9 * np.add.outer((u - 0.4) ** 2, (u - 0.6) ** 2)).astype(np.float32)
    return hill


def spikes(shape: tuple[int, ...], places: Sequence[int] | npt.NDArray[Any]) -> Array:
    """Some weights of 100 among tiny ones."""
    array = 0.01 * gaussian(shape, 1).reshape(-1)
    array[places] = 100.0
    return array.reshape(shape)


def with_singular_values(rows: int, columns: int, values: npt.NDArray[Any], seed: int = 0) -> Array:
    """Random orthonormal factors around the given singular values (as many as the smaller side)."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((rows, values.size)))[0]
    right = np.linalg.qr(rng.standard_normal((columns, values.size)))[0]
    matrix: Array = ((left * values) @ right.T).astype(np.float32)
    return matrix
