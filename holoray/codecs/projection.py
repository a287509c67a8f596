"""`projection`: an orthogonal randomised transform, whose rows are dealt to fragments.

The tensor as one vector is cut into blocks of B = 4096 (of the largest power of two below its size, if that is less);
each block is multiplied by seeded signs and by the orthonormal Hadamard matrix of order B. What remains behind the last
whole block is mixed in by a second such step, with signs of its own, over the *last* B elements, which overlap the
block before: a composition of orthogonal maps is orthogonal, so every length has an orthogonal transform of
exactly its own size, without padding.

A fragment is thus a number of rows of an orthogonal matrix, applied. The rows at hand have orthonormal rows among
themselves, so their least-squares solution of minimal norm is their transpose applied to their values: the inverse
transform with zeros for what is missing. Its relative error is sqrt(1 - k/N) for any k of N fragments, 0 for all of
them. (A Gaussian random projection would need a solver, and its average never converges.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt

from holoray.codecs.dealing import splitmix64
from holoray.codecs.registry import register_codec
from holoray.codecs.transform import TransformCodec

MAX_BLOCK: Final = 4096
SIGNS: Final = (0x5851F42D4C957F2D, 0x14057B7EF767814F)
"""What sets the sign sequences of the two steps apart from each other and from the dealing: xored to the seed."""


@register_codec
@dataclass(frozen=True)
class ProjectionCodec(TransformCodec):
    """Signs, Hadamard matrix, dealing: all of them follow from size and seed."""

    name: ClassVar[str] = "projection"

    def inverse(self, coefficients: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        x = coefficients.reshape(-1).copy()
        block = block_size(x.size)
        whole = x.size - x.size % block
        if whole < x.size:
            x[-block:] = _hadamard(x[-block:]) * signs(self.seed ^ SIGNS[1], block)
        x[:whole] = _hadamard(x[:whole].reshape(-1, block)).reshape(-1) * signs(self.seed ^ SIGNS[0], whole)
        return x.reshape(coefficients.shape)


def block_size(size: int) -> int:
    """The order of the Hadamard matrix for a vector of that size (at least 1): 4096, or the greatest that fits."""
    return int(min(MAX_BLOCK, 1 << (size.bit_length() - 1)))


def signs(seed: int, size: int) -> npt.NDArray[np.float64]:
    """+1 or -1 for each of `size` elements: bit i % 64 of number i // 64 of the sequence, where 1 is minus."""
    words = splitmix64(seed, 0, -(-size // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")[:size]
    return np.where(bits, -1.0, 1.0)


def _hadamard(blocks: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The last axis (of length 2^k) times the orthonormal Hadamard matrix, in Sylvester's order.

    The matrix is the k-fold Kronecker product of [[1, 1], [1, -1]] / sqrt(2): as an array with k axes of length 2,
    each axis is transformed by that.
    """
    order = blocks.shape[-1]
    axes = order.bit_length() - 1
    out = blocks.reshape(-1, *[2] * axes)
    for axis in range(1, axes + 1):
        first, second = np.split(out, 2, axis=axis)
        out = np.concatenate([first + second, first - second], axis=axis)
    return out.reshape(blocks.shape) / math.sqrt(order)
