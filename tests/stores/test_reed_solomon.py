"""The code against arithmetic of our own: a field of 256 elements, a Cauchy matrix, and Gauss."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holoray.stores.reed_solomon import ALIGNMENT, MAX_SHARES, parity, rebuild


def _tables() -> tuple[list[int], list[int]]:
    """Powers of x, and logarithms, modulo x^8 + x^4 + x^3 + x^2 + 1."""
    powers, logarithms, value = [0] * 510, [0] * 256, 1
    for exponent in range(255):
        powers[exponent] = powers[exponent + 255] = value
        logarithms[value] = exponent
        value = value << 1 ^ (0x11D if value & 0x80 else 0)
    return powers, logarithms


POWERS, LOGARITHMS = _tables()


def times(factor: int, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    row = [POWERS[LOGARITHMS[factor] + LOGARITHMS[b]] if factor and b else 0 for b in range(256)]
    return np.array(row, np.uint8)[data]


def inverse(value: int) -> int:
    return POWERS[255 - LOGARITHMS[value]]


def expected_parity(data: bytes, needed: int, total: int) -> list[bytes]:
    chunks = np.frombuffer(data, np.uint8).reshape(needed, -1)
    out = []
    for i in range(needed, total):
        products = [times(inverse(i ^ j), chunk) for j, chunk in enumerate(chunks)]
        out.append(np.bitwise_xor.reduce(products).tobytes())
    return out


@st.composite
def codes(draw: st.DrawFn) -> tuple[int, int, bytes]:
    total = draw(st.integers(1, MAX_SHARES))
    needed = draw(st.integers(1, total))
    length = ALIGNMENT * draw(st.integers(1, 9))
    return needed, total, random.Random(draw(st.integers(0, 1 << 30))).randbytes(needed * length)


@given(codes())
@settings(max_examples=60, deadline=None)
def test_parity_is_that_of_the_cauchy_matrix(code: tuple[int, int, bytes]) -> None:
    needed, total, data = code
    got = parity(data, needed, total)
    assert (got if total > needed else []) == expected_parity(data, needed, total)


@given(codes(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_any_chunks_give_the_others_and_any_range_of_them(code: tuple[int, int, bytes], choice: random.Random) -> None:
    needed, total, data = code
    length = len(data) // needed
    chunks = [data[j * length : (j + 1) * length] for j in range(needed)] + expected_parity(data, needed, total)
    kept = set(choice.sample(range(total), needed))
    wanted = [i for i in range(total) if i not in kept]
    if not wanted:
        return
    start = ALIGNMENT * choice.randrange(length // ALIGNMENT)
    assert rebuild({i: chunks[i][start:] for i in kept}, wanted, needed, total) == [chunks[i][start:] for i in wanted]


@pytest.mark.parametrize(
    ("chunks", "wanted"),
    [({0: 16}, [2]), ({0: 16, 1: 16, 2: 16}, [3]), ({0: 16, 1: 32}, [2]), ({0: 16, 1: 16}, [1]), ({0: 8, 1: 8}, [2])],
    ids=["too few", "too many", "lengths", "wanted is there", "unaligned"],
)
def test_what_would_end_the_process_below_is_refused(chunks: dict[int, int], wanted: list[int]) -> None:
    with pytest.raises(ValueError, match="chunks"):
        rebuild({i: bytes(n) for i, n in chunks.items()}, wanted, 2, 4)
    with pytest.raises(ValueError, match="chunks"):
        parity(bytes(33), 2, 4)
