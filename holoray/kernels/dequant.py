"""Quantised weights to floats on the CPU, from the integers as GPTQ, AWQ and int8 layers pack them: the twin of
`cuda/dequant.cu`.

Packed layers lie inputs first, weights outputs first. Tiles of packed words are turned (an eighth of the weights'
number at four bits), then a row is unpacked, scaled and rounded in passes over what fits into the first cache, each of
which the compiler turns into vector instructions.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from numba import njit

from holoray.errors import FormatError, UsageError
from holoray.formats.quantised import AWQ, AWQ_ORDER, GPTQ, INT8, Packing
from holoray.kernels.bits import float_bits
from holoray.kernels.planes_groups import F16, F32, KINDS
from holoray.tensor import DTYPES

KIND_OF: Final = {np.dtype(np.uint16): KINDS["BF16"], **{DTYPES[name]: kind for name, kind in KINDS.items()}}
"""Kinds of scales and weights by dtype; bfloat16 is uint16 on a device."""
_ROWS: Final = 64
"""Rows of a tile: of each line that is read across, 256 bytes (32 with AWQ) are used at once."""
_COLUMNS: Final = 4096
"""Columns of a tile: its packed words, and the floats of one row, stay in the first and second cache."""
_PITCH: Final = _COLUMNS // 4 + 16
"""Words from one row of a tile to the next: no power of two, whose multiples would share few lines of a cache."""
_METHODS: Final = {GPTQ: 0, AWQ: 1, INT8: 2}
U32: Final = np.uint32


def packed_shape(packing: Packing) -> tuple[tuple[int, int], np.dtype[Any]]:
    """Shape and dtype of the packed integers."""
    per_word = 32 // packing.bits
    if packing.method == INT8:
        return (packing.rows, packing.columns), np.dtype(np.int8)
    if packing.method == AWQ:
        return (packing.columns, packing.rows // per_word), np.dtype(np.int32)
    return (packing.columns // per_word, packing.rows), np.dtype(np.int32)


def check_packed(packing: Packing, q: Any, scales: Any, zeros: Any, out: Any) -> None:
    """Raise UsageError unless shapes and dtypes are those that `dequantise` documents and all arrays are contiguous."""
    if packing.method not in _METHODS:
        raise UsageError(f"nobody knows the packing {packing.method!r}")
    groups, rows = packing.groups, packing.rows
    by_row = packing.method == INT8
    scaled = (rows, groups) if by_row else (groups, rows)
    zeroed = scaled if by_row else (groups, rows * packing.bits // 32)
    q_shape, q_dtype = packed_shape(packing)
    wanted = [
        (q, q_shape, (q_dtype,)),
        (scales, scaled, tuple(KIND_OF)),
        (out, (rows, packing.columns), tuple(KIND_OF)),
    ]
    if zeros is not None or not by_row:
        wanted.append((zeros, zeroed, (np.dtype(np.int8 if by_row else np.int32),)))
    for array, shape, dtypes in wanted:
        if array is None or array.shape != shape or array.dtype not in dtypes or not array.flags.c_contiguous:
            what = "nothing" if array is None else f"{array.dtype} of {array.shape}"
            raise UsageError(f"{what} where a contiguous array of {shape} should be", hint=f"to unpack {packing}")


def check_order(packing: Packing, order: npt.NDArray[np.int32] | None) -> npt.NDArray[np.int32] | None:
    """The group of each input, None where they are consecutive; raises FormatError for one that does not exist."""
    if order is None:
        return None
    if order.shape != (packing.columns,) or order.dtype != np.int32:
        raise UsageError(f"{order.dtype} of {order.shape} is not the group of each of {packing.columns} inputs")
    if packing.method == INT8 and np.any(order == -1):  # compressed-tensors: nobody has set them
        return None
    if order.min() < 0 or order.max() >= packing.groups:
        raise FormatError(
            f"inputs are in groups {order.min()} to {order.max()}, beyond the {packing.groups} that have scales",
            hint="does g_idx belong to this layer?",
        )
    consecutive = np.arange(packing.columns, dtype=np.int32) // packing.group
    return None if np.array_equal(order, consecutive) else np.ascontiguousarray(order)


def dequantise(
    packing: Packing,
    q: npt.NDArray[Any],
    scales: npt.NDArray[Any],
    zeros: npt.NDArray[Any] | None,
    order: npt.NDArray[np.int32] | None,
    out: npt.NDArray[Any],
) -> None:
    """out[r, c] = (q[r, c] - zero[r, g(c)]) * scale[r, g(c)] in float32, rounded once to `out`'s dtype, nearest even.

    `out` is F32, F16 or BF16 [rows, columns] (a value beyond float16 becomes infinite); the others lie as their layer
    stores them (`formats.quantised`), scales F32, F16 or BF16. `order` int32 [columns] is g, `c // group` where None.
    Formula: Jacob et al., Quantization and training of neural networks (2018), equation 1.
    """
    check_packed(packing, q, scales, zeros, out)
    order = check_order(packing, order)
    scale, zero = row_scales(packing, scales), row_zeros(packing, zeros)
    words = q if packing.method == INT8 else q.view(np.uint32)
    groups = np.empty(0, np.int32) if order is None else order
    _KERNELS[packing.method](
        words, scale, zero, groups, packing.group, packing.bits, out.view(np.uint8), KIND_OF[out.dtype]
    )


def row_scales(packing: Packing, scales: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """float32 [rows, groups], exact."""
    wide = (scales.view(DTYPES["BF16"]) if scales.dtype == np.uint16 else scales).astype(np.float32)
    return wide if packing.method == INT8 else np.ascontiguousarray(wide.T)


def row_zeros(packing: Packing, zeros: npt.NDArray[Any] | None) -> npt.NDArray[np.float32]:
    """Zeros as float32 [rows, groups], unpacked."""
    if zeros is None:
        return np.zeros((packing.rows, packing.groups), np.float32)
    if packing.method == INT8:
        return zeros.astype(np.float32)
    per_word = 32 // packing.bits
    places = [AWQ_ORDER.index(i) for i in range(per_word)] if packing.method == AWQ else range(per_word)
    shifts = np.array(places, np.uint32) * np.uint32(packing.bits)
    stored = (zeros.view(np.uint32)[:, :, None] >> shifts) + np.uint32(packing.zero_offset)
    values = stored & np.uint32((1 << packing.bits) - 1)
    return np.ascontiguousarray(values.reshape(packing.groups, packing.rows).T.astype(np.float32))


@njit(nogil=True, cache=True)
def _gptq(q: Any, scale: Any, zero: Any, order: Any, group: int, bits: int, out: Any, kind: int) -> None:
    width = 4 if kind == F32 else 2
    rows, columns = scale.shape[0], out.shape[1] // width
    per_word = 32 // bits
    tile = np.empty((_ROWS, _PITCH), np.uint32)
    values = np.empty(_COLUMNS, np.float32)
    for first in range(0, columns, _COLUMNS):
        count = min(_COLUMNS, columns - first)
        start, words = first // per_word, count // per_word
        for row in range(0, rows, _ROWS):
            height = min(_ROWS, rows - row)
            for w in range(words):
                for r in range(height):
                    tile[r, w] = q[start + w, row + r]
            for r in range(height):
                _unpack(tile[r].view(np.uint8)[: (count * bits + 7) // 8], bits, values)
                place = out[row + r, first * width : (first + count) * width]
                _finish(values[:count], first, scale[row + r], zero[row + r], order, group, place, kind)


@njit(nogil=True, cache=True)
def _awq(q: Any, scale: Any, zero: Any, order: Any, group: int, bits: int, out: Any, kind: int) -> None:
    width = 4 if kind == F32 else 2
    rows, columns = scale.shape[0], out.shape[1] // width
    tile = np.zeros((_ROWS, _PITCH), np.uint32)
    values = np.empty(_COLUMNS, np.float32)
    eight = np.zeros(8, np.uint32)
    for first in range(0, columns, _COLUMNS):
        count = min(_COLUMNS, columns - first)
        for row in range(0, rows, _ROWS):
            height = min(_ROWS, rows - row)
            for w in range((count + 7) // 8):
                present = min(8, count - 8 * w)
                for word in range(height // 8):
                    for i in range(8):
                        eight[i] = q[first + 8 * w + i, row // 8 + word] if i < present else U32(0)
                    _turn_nibbles(eight)
                    for n in range(8):  # nibble n of the words was output AWQ_ORDER[n]
                        tile[8 * word + (2 * n if n < 4 else 2 * n - 7), w] = eight[n]
            for r in range(height):
                _unpack(tile[r].view(np.uint8)[: (count * bits + 7) // 8], bits, values)
                place = out[row + r, first * width : (first + count) * width]
                _finish(values[:count], first, scale[row + r], zero[row + r], order, group, place, kind)


@njit(nogil=True, cache=True)
def _int8(q: Any, scale: Any, zero: Any, order: Any, group: int, bits: int, out: Any, kind: int) -> None:
    width = 4 if kind == F32 else 2
    rows, columns = q.shape
    values = np.empty(_COLUMNS, np.float32)
    for row in range(rows):
        for first in range(0, columns, _COLUMNS):
            count = min(_COLUMNS, columns - first)
            _widen(q[row, first : first + count], values)
            place = out[row, first * width : (first + count) * width]
            _finish(values[:count], first, scale[row], zero[row], order, group, place, kind)


_KERNELS: Final = {GPTQ: _gptq, AWQ: _awq, INT8: _int8}


@njit(nogil=True, cache=True)
def _widen(integers: Any, values: Any) -> None:
    for i in range(integers.size):
        values[i] = np.float32(np.int32(integers[i]))


@njit(nogil=True, cache=True)
def _turn_nibbles(x: Any) -> None:
    """Transpose 8 x 8 nibbles: nibble n of word i and nibble i of word n change places."""
    for i in range(8):
        if not i & 4:
            t = ((x[i] >> U32(16)) ^ x[i + 4]) & U32(0x0000FFFF)
            x[i + 4] ^= t
            x[i] ^= t << U32(16)
    for i in range(8):
        if not i & 2:
            t = ((x[i] >> U32(8)) ^ x[i + 2]) & U32(0x00FF00FF)
            x[i + 2] ^= t
            x[i] ^= t << U32(8)
    for i in range(0, 8, 2):
        t = ((x[i] >> U32(4)) ^ x[i + 1]) & U32(0x0F0F0F0F)
        x[i + 1] ^= t
        x[i] ^= t << U32(4)


@njit(nogil=True, cache=True)
def _unpack(packed: Any, bits: int, values: Any) -> None:
    """Unsigned integers of 2, 4 or 8 bits, lowest first, to float32."""
    if bits == 8:
        for i in range(packed.size):
            values[i] = np.float32(np.int32(packed[i]))
    elif bits == 4:
        for i in range(packed.size):
            values[2 * i] = np.float32(np.int32(packed[i] & 15))
            values[2 * i + 1] = np.float32(np.int32(packed[i] >> 4))
    else:
        for i in range(packed.size):
            for n in range(4):
                values[4 * i + n] = np.float32(np.int32(packed[i] >> (2 * n) & 3))


@njit(nogil=True, cache=True)
def _finish(values: Any, first: int, scale: Any, zero: Any, order: Any, group: int, out: Any, kind: int) -> None:
    """The integers of columns from `first` on of one row, to bytes: (value - zero) * scale, rounded."""
    if order.size:
        _scale_each(values, scale, zero, order[first : first + values.size])
    else:
        start = 0
        while start < values.size:
            g = (first + start) // group
            stop = min(values.size, (g + 1) * group - first)
            z, s = zero[g], scale[g]
            for i in range(np.uint64(start), np.uint64(stop)):  # a slice for each group would cost as much again
                values[i] = (values[i] - z) * s
            start = stop
    if kind == F32:
        _copy_bits(values, out.view(np.uint32))
    elif kind == F16:
        _to_half(values, out.view(np.uint16))
    else:
        _to_bfloat(values, out.view(np.uint16))


@njit(nogil=True, cache=True)
def _scale_each(values: Any, scale: Any, zero: Any, order: Any) -> None:
    for i in range(values.size):
        g = U32(order[i])  # a sign would be asked for at every access
        values[i] = (values[i] - zero[g]) * scale[g]


@njit(nogil=True, cache=True)
def _copy_bits(values: Any, out: Any) -> None:
    for i in range(values.size):
        out[i] = float_bits(values[i])


@njit(nogil=True, cache=True)
def _to_bfloat(values: Any, out: Any) -> None:
    """To nearest even; a NaN becomes the quiet one of its sign. Without branches, so that it runs in vectors."""
    for i in range(values.size):
        bits = float_bits(values[i])
        odd = U32(U32(bits >> U32(16)) & U32(1))
        rounded = U32(U32(bits + U32(0x7FFF) + odd) >> U32(16))
        nan = U32(U32(U32(bits >> U32(16)) & U32(0x8000)) | U32(0x7FC0))
        out[i] = np.uint16(nan if U32(bits & U32(0x7FFFFFFF)) > U32(0x7F800000) else rounded)


@njit(nogil=True, cache=True)
def _to_half(values: Any, out: Any) -> None:
    """To nearest even, infinite beyond float16, a NaN becomes the quiet one of its sign."""
    for i in range(values.size):
        bits = float_bits(values[i])
        size = U32(bits & U32(0x7FFFFFFF))
        odd = U32(U32(size >> U32(13)) & U32(1))
        normal = U32(U32(size + U32(0xFFF) + odd - U32(112 << 23)) >> U32(13))
        # Beside .5 a float32 has the last place of subnormal float16: the addition rounds.
        small = U32(float_bits(np.float32(abs(values[i]) + np.float32(0.5))) - U32(0x3F000000))
        rounded = small if size < U32(0x38800000) else normal
        finite = U32(0x7C00) if size >= U32(0x477FF000) else rounded
        known = U32(0x7E00) if size > U32(0x7F800000) else finite
        out[i] = np.uint16(known | U32(U32(bits >> U32(16)) & U32(0x8000)))


def warm() -> None:
    """Compile what becomes floats."""
    for method in _METHODS:
        packing = Packing(method, 8 if method == INT8 else 4, 8, 8, 8)
        shape, dtype = packed_shape(packing)
        scales = np.ones((8, 1) if method == INT8 else (1, 8), np.float32)
        zeros = None if method == INT8 else np.zeros((1, 1), np.int32)
        dequantise(packing, np.zeros(shape, dtype), scales, zeros, None, np.zeros((8, 8), np.float32))
