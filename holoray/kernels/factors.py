"""Orthonormal directions in which a matrix has most energy, by LAPACK: all of them, or some by random probing.

Only the eigenvectors of a Gram matrix are computed, of the smaller side, in float64. Squaring the matrix costs the
small singular values their digits, which does not matter here: for *any* orthonormal V, the terms (W v) v^T add up to
W exactly and are orthogonal; how true V is only decides how much energy the first terms take.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.linalg

from holoray.kernels.blas import one_blas_thread

_OVERSAMPLING = 8
_POWER_ITERATIONS = 2
_PROBE_SHARE = 4  # random probing pays for ranks below a quarter of the full one

Matrix = npt.NDArray[np.float64]


def leading_directions(matrix: Matrix, rank: int, seed: int) -> tuple[npt.NDArray[np.float64], Matrix]:
    """Energies, falling, and orthonormal directions [columns, rank] of a matrix with no more columns than rows.

    For a small rank by randomised subspace iteration (Halko, Martinsson, Tropp: Finding structure with randomness,
    2011, algorithm 4.4), which finds somewhat less energy where singular values fall slowly.
    """
    with one_blas_thread():
        if _PROBE_SHARE * (rank + _OVERSAMPLING) > matrix.shape[1]:
            return _eigen(matrix, rank)
        basis = _range_basis(matrix, rank + _OVERSAMPLING, seed, _POWER_ITERATIONS)
        energies, turned = _eigen(matrix @ basis, rank)
        return energies, basis @ turned


def probed_energy(matrix: Matrix, rank: int, seed: int) -> float:
    """About the energy of the best `rank` terms, of a matrix with no more columns than rows: cheap, random.

    A few more directions than `rank` are probed, once: they held at least four fifths of it in every spectrum tried.
    """
    count = min(rank + _OVERSAMPLING, matrix.shape[1])
    with one_blas_thread():
        projected = matrix @ _range_basis(matrix, count, seed, 0)
    return float(np.square(projected).sum())


def _eigen(matrix: Matrix, rank: int) -> tuple[npt.NDArray[np.float64], Matrix]:
    energies, directions = scipy.linalg.eigh(matrix.T @ matrix, driver="evd", overwrite_a=True, check_finite=False)
    return np.maximum(energies[::-1][:rank], 0.0), np.ascontiguousarray(directions[:, ::-1][:, :rank])


def _range_basis(matrix: Matrix, count: int, seed: int, power_iterations: int) -> Matrix:
    """Orthonormal [columns, count] that spans most of the matrix's rows."""
    basis: Matrix = np.random.default_rng(seed).standard_normal((matrix.shape[1], count))
    for _ in range(1 + power_iterations):
        basis = np.linalg.qr(matrix.T @ (matrix @ basis))[0]
    return basis
