"""Bit operations inside compiled kernels: unaligned loads, bit casts, deposit and extraction of bits by a mask.

`deposit(bits, mask)` spreads the low bits of a word over the set places of a mask, `extract` is its inverse. x86 has
one instruction for each (BMI2); elsewhere 8-bit tables do the same. Both are compiled side by side, and kernels take a
flag `hardware` that says which to use (`HARDWARE` is what suits this machine).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import config
from numba.extending import intrinsic

# Processors that have the instructions in microcode only, at up to 290 cycles each.
_SLOW_PROCESSORS: Final = ("znver1", "znver2", "bdver4")


def _compiler_has_bmi2() -> bool:
    """Whether the code generator may use BMI2; numba's own settings may name another processor than the host."""
    if not llvm.get_process_triple().startswith(("x86_64", "amd64")):
        return False
    settings: Any = config
    if settings.CPU_NAME or settings.CPU_FEATURES:
        return "+bmi2" in (settings.CPU_FEATURES or "").split(",")
    return bool(llvm.get_host_cpu_features().get("bmi2", False))


_COMPILED: Final = _compiler_has_bmi2()
HARDWARE: Final = _COMPILED and llvm.get_host_cpu_name() not in _SLOW_PROCESSORS
"""Whether deposit and extract should use BMI2 on this machine."""

_I64: Final = ir.IntType(64)
_carray: Final[Any] = vars(numba)["carray"]  # exported, but not to type checkers


def _instruction(result: Any, arguments: tuple[Any, ...], emit: Callable[..., Any]) -> Any:
    """An intrinsic of that signature; `emit(builder, *values)` gives its LLVM value, or None where it has none."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        value = emit(builder, *values)
        return context.get_dummy_value() if value is None else value

    # numba asks for as many parameters as the intrinsic has.
    if len(arguments) == 1:

        def typing1(context: Any, first: Any) -> Any:
            return result(*arguments), codegen

        return intrinsic(typing1)

    def typing2(context: Any, first: Any, second: Any) -> Any:
        return result(*arguments), codegen

    return intrinsic(typing2)


def _bmi2(name: str) -> Any:
    """The BMI2 instruction as an intrinsic; without BMI2 it compiles to 0 and must not be reached."""

    def emit(builder: Any, bits: Any, mask: Any) -> Any:
        if not _COMPILED:
            return ir.Constant(_I64, 0)
        function = builder.module.globals.get(name)
        if function is None:
            function = ir.Function(builder.module, ir.FunctionType(_I64, [_I64, _I64]), name)
        return builder.call(function, (bits, mask))

    return _instruction(types.uint64, (types.uint64, types.uint64), emit)


def _load(dtype: Any) -> Any:
    """An intrinsic that loads a little-endian unsigned integer from an address (int64) without alignment."""

    def emit(builder: Any, address: Any) -> Any:
        loaded = builder.load(builder.inttoptr(address, ir.IntType(dtype.bitwidth).as_pointer()))
        loaded.align = 1
        return loaded

    return _instruction(dtype, (types.int64,), emit)


def _store(dtype: Any) -> Any:
    """An intrinsic that stores a little-endian unsigned integer at an address (int64) without alignment."""

    def emit(builder: Any, address: Any, value: Any) -> None:
        stored = builder.store(value, builder.inttoptr(address, ir.IntType(dtype.bitwidth).as_pointer()))
        stored.align = 1

    return _instruction(types.void, (types.int64, dtype), emit)


def _pointer(dtype: Any) -> Any:
    """An intrinsic that makes a typed pointer of an address (int64)."""

    element = ir.FloatType() if dtype == types.float32 else ir.IntType(dtype.bitwidth)

    def emit(builder: Any, address: Any) -> Any:
        return builder.inttoptr(address, element.as_pointer())

    pointer: Any = types.CPointer
    return _instruction(pointer(dtype), (types.int64,), emit)


def _prefetch_for_writing() -> Any:
    """An intrinsic that asks for the cache line at an address (int64), to write it soon."""
    number = ir.IntType(32)
    signature = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), number, number, number])

    def emit(builder: Any, address: Any) -> None:
        name = "llvm.prefetch.p0"
        function = builder.module.globals.get(name) or ir.Function(builder.module, signature, name)
        writing, locality, data = ir.Constant(number, 1), ir.Constant(number, 3), ir.Constant(number, 1)
        builder.call(function, (builder.inttoptr(address, ir.IntType(8).as_pointer()), writing, locality, data))

    return _instruction(types.void, (types.int64,), emit)


hardware_deposit: Final = _bmi2("llvm.x86.bmi.pdep.64")
hardware_extract: Final = _bmi2("llvm.x86.bmi.pext.64")
popcount: Final = _instruction(types.int64, (types.uint64,), lambda builder, bits: builder.ctpop(bits))
"""The number of set bits of a uint64, as int64."""
trailing_zeros: Final = _instruction(
    types.int64, (types.uint64,), lambda builder, bits: builder.cttz(bits, ir.Constant(ir.IntType(1), 0))
)
"""The place of the lowest set bit of a uint64, as int64; 64 where there is none."""
float_bits: Final = _instruction(
    types.uint32, (types.float32,), lambda builder, value: builder.bitcast(value, ir.IntType(32))
)
bits_float: Final = _instruction(
    types.float32, (types.uint32,), lambda builder, bits: builder.bitcast(bits, ir.FloatType())
)
load_u8: Final = _load(types.uint8)
load_u16: Final = _load(types.uint16)
load_u32: Final = _load(types.uint32)
load_u64: Final = _load(types.uint64)
store_u8: Final = _store(types.uint8)
store_u64: Final = _store(types.uint64)
prefetch_for_writing: Final = _prefetch_for_writing()
_pointer_u8: Final = _pointer(types.uint8)
_pointer_u16: Final = _pointer(types.uint16)
_pointer_u64: Final = _pointer(types.uint64)
_pointer_f32: Final = _pointer(types.float32)


def _deposit_table() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8[mask << 8 | bits]: the low bits of `bits` spread over the set places of `mask`."""
    masks = np.arange(256)[:, None]
    bits = np.arange(256)[None, :]
    table, taken = np.zeros((256, 256), np.int64), np.zeros((256, 1), np.int64)
    for place in range(8):
        here = masks >> place & 1
        table |= (bits >> taken & here) << place
        taken = taken + here
    return table.astype(np.uint8).reshape(-1)


def _extract_table() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8[mask << 8 | word]: the bits of `word` at the set places of `mask`, pushed together."""
    masks = np.arange(256)[:, None]
    words = np.arange(256)[None, :]
    table, taken = np.zeros((256, 256), np.int64), np.zeros((256, 1), np.int64)
    for place in range(8):
        here = masks >> place & 1
        table |= (words >> place & here) << taken
        taken = taken + here
    return table.astype(np.uint8).reshape(-1)


_DEPOSIT: Final = _deposit_table()
_EXTRACT: Final = _extract_table()
_COUNT: Final = np.array([bin(mask).count("1") for mask in range(256)], np.uint8)


@njit(nogil=True, cache=True)
def table_deposit(bits: Any, mask: Any) -> Any:
    """`deposit` by tables (uint64, uint64 -> uint64)."""
    result = np.uint64(0)
    for byte in range(8):
        shift = np.uint64(8 * byte)
        part = (mask >> shift) & np.uint64(255)
        result |= np.uint64(_DEPOSIT[(part << np.uint64(8)) | (bits & np.uint64(255))]) << shift
        bits >>= np.uint64(_COUNT[part])
    return result


@njit(nogil=True, cache=True)
def table_extract(word: Any, mask: Any) -> Any:
    """`extract` by tables (uint64, uint64 -> uint64)."""
    result = np.uint64(0)
    taken = np.uint64(0)
    for byte in range(8):
        shift = np.uint64(8 * byte)
        part = (mask >> shift) & np.uint64(255)
        chosen = _EXTRACT[(part << np.uint64(8)) | ((word >> shift) & np.uint64(255))]
        result |= np.uint64(chosen) << taken
        taken += np.uint64(_COUNT[part])
    return result


@njit(nogil=True, cache=True)
def deposit(bits: Any, mask: Any, hardware: bool) -> Any:
    """The low bits of `bits` spread over the set places of `mask` (uint64)."""
    return hardware_deposit(bits, mask) if hardware else table_deposit(bits, mask)


@njit(nogil=True, cache=True)
def extract(word: Any, mask: Any, hardware: bool) -> Any:
    """The bits of `word` at the set places of `mask`, pushed together (uint64)."""
    return hardware_extract(word, mask) if hardware else table_extract(word, mask)


@njit(nogil=True, cache=True)
def prefetch_words(words: Any) -> None:
    """Ask for the cache lines of uint16[n], to write them soon."""
    address = address_of(words)
    for line in range(address, address + 2 * words.size, 64):
        prefetch_for_writing(line)


@njit(nogil=True, cache=True)
def array_at(address: Any, count: Any) -> Any:
    """uint8[count] at an address (int64); the caller keeps the memory alive."""
    return _carray(_pointer_u8(address), (count,), np.uint8)


@njit(nogil=True, cache=True)
def address_of(array: Any) -> Any:
    """Where an array's elements begin (int64)."""
    return np.int64(array.ctypes.data)


@njit(nogil=True, cache=True)
def unowned_rows(array: Any) -> Any:
    """The same uint64[rows, 64] without an owner: slices of it cost no atomic reference counts."""
    return _carray(_pointer_u64(address_of(array)), array.shape, np.uint64)


@njit(nogil=True, cache=True)
def unowned(array: Any) -> Any:
    """The same uint16[n] without an owner."""
    return _carray(_pointer_u16(address_of(array)), array.shape, np.uint16)


@njit(nogil=True, cache=True)
def words_from(rows: Any, first: int, count: int) -> Any:
    """uint16[256 * count]: `count` rows of a uint64[n, 64] from `first` on, without an owner."""
    return _carray(_pointer_u16(address_of(rows) + 512 * first), (256 * count,), np.uint16)


@njit(nogil=True, cache=True)
def floats_from(rows: Any, first: int, count: int) -> Any:
    """float32[128 * count]: `count` rows of a uint64[n, 64] from `first` on, without an owner."""
    return _carray(_pointer_f32(address_of(rows) + 512 * first), (128 * count,), np.float32)
