"""What others do with fewer bytes: integers per group of weights, and a BitStack-like residual coder."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import scipy.linalg

from holoray.tensor import Array

Floats = npt.NDArray[np.float32]
GROUP = 128
RANKS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Rounded:
    """A matrix rounded to symmetric integers of 8 or 4 bits: a float16 scale for 128 weights of a row (the last group
    of a row may be shorter), round to nearest.
    """

    bits: int
    shape: tuple[int, int]
    codes: npt.NDArray[np.uint8] = field(repr=False)
    """Two's complement, row by row; 4-bit codes two a byte, the first in the low half."""
    scales: npt.NDArray[np.float16] = field(repr=False)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def decode(self) -> Floats:
        """float32, the shape of the matrix."""
        rows, columns = self.shape
        if self.bits == 8:
            levels = self.codes.view(np.int8)
        else:
            pairs = np.stack([self.codes << 4, self.codes & 0xF0], axis=-1)  # each code in the high half: sign kept
            levels = (pairs.view(np.int8) >> 4).reshape(-1)[: rows * columns]
        spread = np.repeat(self.scales.astype(np.float32), GROUP, axis=1)[:, :columns]
        return levels.reshape(rows, columns).astype(np.float32) * spread


def round_to_nearest(matrix: Floats, bits: int) -> Rounded:
    """Scale each group's largest weight to 127 (8 bits) or 7 (4 bits), and round."""
    rows, columns = matrix.shape
    groups = -(-columns // GROUP)
    padded = np.zeros((rows, groups * GROUP), np.float32)
    padded[:, :columns] = matrix
    most = (1 << (bits - 1)) - 1
    largest = np.abs(padded).reshape(rows, groups, GROUP).max(axis=2)
    scales = (largest / most).astype(np.float16)
    spread = np.repeat(scales.astype(np.float32), GROUP, axis=1)[:, :columns]
    levels = np.divide(matrix, spread, out=np.zeros_like(matrix), where=spread > 0)
    codes = np.clip(np.rint(levels), -most, most).astype(np.int8).reshape(-1).view(np.uint8)
    if bits == 4:
        codes = np.append(codes, np.zeros(codes.size % 2, np.uint8)) & 0x0F
        codes = codes[0::2] | codes[1::2] << 4
    return Rounded(bits, (rows, columns), codes, scales)


@dataclass(frozen=True)
class Term:
    """sign(R) * (U V^T) for a residual R: a bit a weight (rows first), float16[rows, r] and float16[columns, r].

    `gain` is the squared error that it removes.
    """

    signs: npt.NDArray[np.uint8] = field(repr=False)
    left: npt.NDArray[np.float16] = field(repr=False)
    right: npt.NDArray[np.float16] = field(repr=False)
    gain: float

    @property
    def nbytes(self) -> int:
        return self.signs.nbytes + self.left.nbytes + self.right.nbytes

    def decode(self) -> Floats:
        """float32[rows, columns]."""
        magnitude: Floats = self.left.astype(np.float32) @ self.right.astype(np.float32).T
        bits = np.unpackbits(self.signs, count=magnitude.size).reshape(magnitude.shape)
        return np.where(bits, magnitude, -magnitude)


def residual_terms(matrix: Floats, most_bytes: int) -> list[Term]:
    """Terms whose sum approaches the matrix, as long as they take no more than `most_bytes`.

    The idea of BitStack (Wang et al., 2024): again and again the signs of what is left, times a low-rank approximation
    of its absolute values. Without data to calibrate on, so without their scaling by activations. Where they fix the
    rank, each term takes the one of `RANKS` that removes most squared error per byte (ours are small matrices, where
    rank 16 costs more than the signs).
    """
    terms: list[Term] = []
    residual = matrix.copy()
    while True:
        term = _term(residual)
        if term.nbytes > most_bytes or term.gain <= 0:
            return terms
        most_bytes -= term.nbytes
        terms.append(term)
        residual -= term.decode()


def _term(residual: Floats) -> Term:
    rows, columns = residual.shape
    magnitude = np.abs(residual)
    left, right, singular = _leading(magnitude, max(RANKS))
    captured = np.cumsum(np.square(singular))
    sign_bytes = -(-rows * columns // 8)
    rank = max(
        (r for r in RANKS if r <= len(captured)),
        key=lambda r: captured[r - 1] / (sign_bytes + 2 * r * (rows + columns)),
    )
    left, right = _balanced(left[:, :rank], right[:, :rank])
    signs = np.packbits(residual >= 0)
    term = Term(signs, left.astype(np.float16), right.astype(np.float16), gain=0.0)
    before = float(np.square(residual, dtype=np.float64).sum())
    after = float(np.square(residual - term.decode(), dtype=np.float64).sum())
    return replace(term, gain=before - after)


def _balanced(left: Floats, right: Floats) -> tuple[Floats, Floats]:
    """The same products from factors of equal norms: float16 has few exponents."""
    norms = [np.maximum(np.linalg.norm(factor, axis=0), np.finfo(np.float32).tiny) for factor in (left, right)]
    balance = np.sqrt(norms[0] / norms[1])
    return left / balance, right * balance


def _leading(matrix: Floats, rank: int) -> tuple[Floats, Floats, npt.NDArray[np.float64]]:
    """U and V with U V^T the best approximation of a rank, and singular values, from the smaller Gram matrix."""
    rows, columns = matrix.shape
    if rows < columns:
        right, left, singular = _leading(matrix.T, rank)
        return left, right, singular
    gram = (matrix.T @ matrix).astype(np.float64)
    values, vectors = scipy.linalg.eigh(gram, subset_by_index=(max(columns - rank, 0), columns - 1))
    right = vectors[:, ::-1].astype(np.float32)
    return matrix @ right, right, np.sqrt(np.maximum(values[::-1], 0.0))


def by_gain_per_byte(terms: Mapping[str, Sequence[Term]]) -> Iterator[tuple[str, Term]]:
    """The order to stream terms in: the best gain per byte of those that are next in their matrix."""
    waiting = [(-rows[0].gain / rows[0].nbytes, name, 0) for name, rows in terms.items() if rows]
    heapq.heapify(waiting)
    while waiting:
        _, name, index = heapq.heappop(waiting)
        rows = terms[name]
        yield name, rows[index]
        if index + 1 < len(rows):
            following = rows[index + 1]
            heapq.heappush(waiting, (-following.gain / following.nbytes, name, index + 1))


def zipnn_bytes(tensors: Sequence[Array]) -> int | None:
    """Size of bfloat16 tensors under ZipNN (`pip install zipnn torch`); None where it is not installed."""
    try:
        from zipnn import ZipNN
    except ImportError:
        return None
    coder = ZipNN(input_format="byte", bytearray_dtype="bfloat16", threads=1)
    return len(coder.compress(b"".join(t.tobytes() for t in tensors)))
