"""Bit operations inside compiled kernels: unaligned loads, bit casts, and the deposit and extraction of bits by a mask.

`deposit(bits, mask)` spreads the low bits of a word over the set places of a mask, `extract` is its inverse. x86 has one
instruction for each (BMI2); elsewhere 8-bit tables do the same. Both are compiled side by side, and kernels take a flag
`hardware` that says which to use (`HARDWARE` is what suits this machine).
"""

from __future__ import annotations

from typing import Any, Final

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core import config as numba_config
from numba.extending import intrinsic

# Processors that have the instructions in microcode only, at up to 290 cycles each.
_SLOW_PROCESSORS: Final = ("znver1", "znver2", "bdver4")


def _compiler_has_bmi2() -> bool:
    """Whether the code generator may use BMI2; numba's own settings may name another processor than the host."""
    if not llvm.get_process_triple().startswith(("x86_64", "amd64")):
        return False
    if numba_config.CPU_NAME or numba_config.CPU_FEATURES:
        return "+bmi2" in (numba_config.CPU_FEATURES or "").split(",")
    return bool(llvm.get_host_cpu_features().get("bmi2", False))


_COMPILED: Final = _compiler_has_bmi2()
HARDWARE: Final = _COMPILED and llvm.get_host_cpu_name() not in _SLOW_PROCESSORS
"""Whether deposit and extract should use BMI2 on this machine."""

_I64: Final = ir.IntType(64)


def _bmi2(name: str) -> Any:
    """The BMI2 instruction as an intrinsic; without BMI2 it compiles to 0 and must not be reached."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not _COMPILED:
            return ir.Constant(_I64, 0)
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_I64, [_I64, _I64]), name)
        return builder.call(function, args)

    def typing(context: Any, bits: Any, mask: Any) -> Any:
        return types.uint64(types.uint64, types.uint64), codegen

    return intrinsic(typing)


hardware_deposit: Final = _bmi2("llvm.x86.bmi.pdep.64")
hardware_extract: Final = _bmi2("llvm.x86.bmi.pext.64")


@intrinsic
def popcount(context: Any, bits: Any) -> Any:
    """The number of set bits of a uint64, as int64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.uint64), codegen


@intrinsic
def trailing_zeros(context: Any, bits: Any) -> Any:
    """The place of the lowest set bit of a uint64, as int64; 64 where there is none."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), codegen


@intrinsic
def float_bits(context: Any, value: Any) -> Any:
    """The bits of a float32, as uint32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@intrinsic
def bits_float(context: Any, bits: Any) -> Any:
    """The float32 of these bits (uint32)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


def _load(bits: int, result: Any) -> Any:
    """An intrinsic that loads a little-endian unsigned integer from an address (int64) without alignment."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        loaded = builder.load(builder.inttoptr(args[0], ir.IntType(bits).as_pointer()))
        loaded.align = 1
        return loaded

    def typing(context: Any, address: Any) -> Any:
        return result(types.int64), codegen

    return intrinsic(typing)


load_u8: Final = _load(8, types.uint8)
load_u16: Final = _load(16, types.uint16)
load_u64: Final = _load(64, types.uint64)


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
def array_at(address: Any, count: Any) -> Any:
    """uint8[count] at an address (int64); the caller keeps the memory alive."""
    return numba.carray(_pointer(address), (count,), np.uint8)


@intrinsic
def _pointer(context: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.CPointer(types.uint8)(types.int64), codegen
