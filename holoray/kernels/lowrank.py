"""`lowrank` on the CPU: rank-one terms from orthonormal directions, summed by one matrix product."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from holoray.codecs.base import Codec
from holoray.codecs.lowrank import LowRankCodec
from holoray.compression import MIN_FRAGMENT_SAVING, compress
from holoray.fragment import NO_PREREQUISITE
from holoray.kernels.blas import one_blas_thread
from holoray.kernels.dealt import DealtAccumulator, Floats
from holoray.kernels.encoder import EncodedFragment, EncodeOptions, Encoder
from holoray.kernels.factors import Matrix, leading_directions
from holoray.kernels.rounding import UNFELT, is_faithful, least_error, scaled, scaling_exponent, store
from holoray.kernels.sums import moments, squared_distance
from holoray.quality import widened
from holoray.tensor import Array, TensorSpec, matrix_shape

# Factors are balanced, so their numbers are at most the root of the largest singular value: below 2^15 for float16.
_HALF_RANGE: Final = 29
_SMALLEST_SHARE: Final = 1e-16  # of the largest energy: below it, eigenvalues are noise
# Of the energy: terms that all together hold less are left out. Beside the rounding of the others they are not felt,
# and where a matrix has a lower rank than its shape allows, they would be nothing but that rounding.
_NEGLIGIBLE: Final = {"float32": 1e-13, "float16": 1e-9}


class LowRankEncoder(Encoder):
    """Decomposes in the constructor; one part."""

    parts = 1
    codec: LowRankCodec

    def __init__(self, spec: TensorSpec, array: Array, options: EncodeOptions) -> None:
        super().__init__(spec, array, options)
        weights = widened(array.reshape(matrix_shape(spec.shape)))
        exponent = scaling_exponent(weights)
        self._terms, gains, more = _decompose(scaled(weights, exponent), options)
        gains = np.ldexp(gains, 2 * exponent)
        essential = _leading(gains, options.essential * moments(array)[0])
        self.codec = LowRankCodec(options.fragments, exponent + more, essential, options.coefficients, len(self._terms))
        self.essential_gain = math.fsum(gains[:essential])
        self._gains = [math.fsum(gains[self.codec.terms(i)]) for i in range(options.fragments)]
        out = np.empty(weights.shape, spec.numpy_dtype)
        store(_sum(self._terms.astype(np.float32), weights.shape[0]), out, self.codec.exponent)
        self.residual = squared_distance(out, array)
        self.faithful = is_faithful(array, np.array(self._gains), self.residual) and self._adds_up(array)

    def _adds_up(self, array: Array) -> bool:
        """Whether rounding left the terms so orthogonal that what they gain together is the sum of their gains."""
        energy = moments(array)[0]
        overlap = math.fsum((self.essential_gain, *self._gains, self.residual, -energy))
        allowed = 0.01 * least_error(np.array(self._gains), self.residual, energy)
        return abs(overlap) <= max(allowed, UNFELT**2 * energy)

    def encode(self, part: int) -> list[EncodedFragment]:
        return [self._fragment(index) for index in range(self.options.fragments)]

    def _fragment(self, index: int) -> EncodedFragment:
        own = np.concatenate([np.arange(self.codec.essential), self.codec.terms(index)])
        raw = self._terms[own].reshape(-1).view(np.uint8)
        name, payload = compress(self.options.compression, raw, MIN_FRAGMENT_SAVING)
        return EncodedFragment(
            index, 0, index, NO_PREREQUISITE, name, raw.nbytes, self._gains[index], memoryview(payload)
        )


def _decompose(weights: Floats, options: EncodeOptions) -> tuple[npt.NDArray[Any], Matrix, int]:
    """What `_terms` gives, for a matrix of any shape."""
    matrix, energy = weights.astype(np.float64), moments(weights)[0]
    rows, columns = matrix.shape
    if columns <= rows:
        return _terms(matrix, energy, options)
    terms, gains, more = _terms(matrix.T, energy, options)
    return np.concatenate([terms[:, columns:], terms[:, :columns]], axis=1), gains, more


def _terms(matrix: Matrix, energy: float, options: EncodeOptions) -> tuple[npt.NDArray[Any], Matrix, int]:
    """Terms [rank, rows + columns] as they are stored, by falling gain; these gains; a power of two to multiply with.

    For a matrix with no more columns than rows. With b a direction, scaled and rounded, the column a that leaves the
    least error of W - a b^T is W b / |b|^2: rounding b is thus made up for. Rounded itself, it gains
    2 a^T W b - |a|^2 |b|^2 in the matrix's own scale.
    """
    dtype = np.dtype(options.coefficients)
    full = matrix.shape[1]
    energies, directions = leading_directions(matrix, min(options.rank or full, full), options.seed)
    wanted = min(options.energy or 1.0, 1.0 - _NEGLIGIBLE[options.coefficients])
    rank = max(1, _leading(energies, wanted * energy))
    largest = math.sqrt(energies[0])
    more = math.frexp(largest)[1] - _HALF_RANGE if options.coefficients == "float16" and largest else 0
    sizes = np.sqrt(np.maximum(energies[:rank], _SMALLEST_SHARE * energies[0])) if largest else np.ones(rank)
    rows = (directions[:, :rank] * np.sqrt(np.ldexp(sizes, -more))).astype(dtype)
    wide_rows = rows.astype(np.float64)
    with one_blas_thread():
        products = matrix @ wide_rows
    norms = np.square(wide_rows).sum(axis=0)
    columns = np.ldexp(products / norms, -more).astype(dtype)
    wide_columns = np.ldexp(columns.astype(np.float64), more)
    gains = 2.0 * (wide_columns * products).sum(axis=0) - np.square(wide_columns).sum(axis=0) * norms
    falling = np.argsort(-gains, kind="stable")
    terms = np.concatenate([columns, rows], axis=0).T[falling]
    return np.ascontiguousarray(terms), gains[falling], more


def _leading(energies: npt.NDArray[np.float64], wanted: float) -> int:
    """How many of the first energies hold what is wanted (at least one, if anything is wanted); all, if they do not."""
    if wanted <= 0.0:
        return 0
    return min(int(np.searchsorted(np.cumsum(energies), wanted)) + 1, energies.size)


def _sum(terms: Floats, rows: int) -> Floats:
    """The sum of the terms [rank, rows + columns], as a matrix."""
    with one_blas_thread(), np.errstate(over="ignore", invalid="ignore"):  # whoever sealed a store may write anything
        weights: Floats = terms[:, :rows].T @ terms[:, rows:]
    return weights


class LowRankAccumulator(DealtAccumulator):
    """Its state are the terms [rank, rows + columns], the essential ones first; terms not there yet are zeros."""

    codec: LowRankCodec

    def _make_state(self, memory: npt.NDArray[np.uint8] | None) -> None:
        super()._make_state(memory)
        nbytes = 4 * self.codec.rank * self.codec.width(self.spec)
        self._terms: Any = self._memory[self._memory.size - nbytes :].view(np.float32).reshape(self.codec.rank, -1)

    @classmethod
    def state_sizes(cls, spec: TensorSpec, codec: Codec) -> tuple[int, int]:
        assert isinstance(codec, LowRankCodec)
        width = codec.width(spec)
        return 4 * codec.essential * width, (codec.rank - codec.essential) * width

    def _parse(self, raw: Any) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
        values = np.frombuffer(raw, self.codec.value_dtype)
        head = self.codec.essential * self.codec.width(self.spec)
        return values[:head].astype(np.float32).view(np.uint8), values[head:]

    def _count(self, slot: int) -> int:
        return self.codec.terms(slot).size * self.codec.width(self.spec)

    def _gather(self, slot: int) -> Floats:
        own: Floats = self._terms[self.codec.terms(slot)]
        return own

    def _scatter(self, slot: int, values: npt.NDArray[Any]) -> None:
        own = self.codec.terms(slot)
        self._terms[own] = values.reshape(own.size, self._terms.shape[1])

    def finalize(self) -> None:
        shape = matrix_shape(self.spec.shape)
        store(_sum(self._terms, shape[0]), self.out.reshape(shape), self.codec.exponent)
