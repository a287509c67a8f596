"""Quantised layers to bfloat16 on one core, beside a plain copy of the weights.

python -m benchmarks.dequant [--size 4096] [--repeat 9]
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import ml_dtypes
import numpy as np

from benchmarks.measure import Row, beside
from holoray.formats.quantised import AWQ, GPTQ, INT8, Packing
from holoray.kernels import dequant
from holoray.tensor import Array


def random_layer(packing: Packing, rng: np.random.Generator) -> tuple[Array, Array, Array | None]:
    """Random integers, scales of float16, random zeros (none for int8), packed."""
    shape, dtype = dequant.packed_shape(packing)
    limits = np.iinfo(dtype)
    by_row = packing.method == INT8
    scale_shape = (packing.rows, packing.groups) if by_row else (packing.groups, packing.rows)
    q = rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    zero_shape = (packing.groups, packing.rows * packing.bits // 32)
    zeros = None if by_row else rng.integers(limits.min, limits.max, zero_shape, dtype, endpoint=True)
    return q, np.full(scale_shape, 0.01, np.float16), zeros


def measure(name: str, packing: Packing, ordered: bool, repeat: int) -> Row:
    """A layer into touched memory, by processor time; the copy is of as many bytes as come out."""
    rng = np.random.default_rng(0)
    q, scales, zeros = random_layer(packing, rng)
    order = rng.integers(0, packing.groups, packing.columns).astype(np.int32) if ordered else None
    out = np.zeros((packing.rows, packing.columns), ml_dtypes.bfloat16)
    plain, copied = np.ones(out.shape, np.uint16), np.ones(out.shape, np.uint16)
    run = partial(dequant.dequantise, packing, q, scales, zeros, order, out)
    run()  # compiles
    copy = partial(np.copyto, copied, plain)
    return beside(name, out.nbytes, run, copy, repeat, to="a copy", clock=time.process_time)


def rows(size: int, repeat: int) -> list[Row]:
    cases = (
        ("GPTQ 4 bits", Packing(GPTQ, 4, size, size, 128, 1), False),
        ("GPTQ 4 bits, act-order", Packing(GPTQ, 4, size, size, 128, 1), True),
        ("GPTQ 8 bits", Packing(GPTQ, 8, size, size, 128, 1), False),
        ("AWQ 4 bits", Packing(AWQ, 4, size, size, 128), False),
        ("int8 by channel", Packing(INT8, 8, size, size, size), False),
    )
    return [measure(name, packing, ordered, repeat) for name, packing, ordered in cases]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=9)
    arguments = parser.parse_args()
    for row in rows(arguments.size, arguments.repeat):
        print(f"{row.name:<26} {row.rate:6.2f} GB/s of bf16, {row.ratio:.2f} of {row.to}")


if __name__ == "__main__":
    main()
