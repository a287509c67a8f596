"""Launching the kernels that finalize: arguments checked, geometry chosen. Each has a twin with the same signature.

`weights`, `out` and the rest lie on `device`; work is queued, not waited for: keep the arrays until `synchronize`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from holoray.codecs.dealing import Deal
from holoray.codecs.projection import SIGNS, block_size
from holoray.errors import UsageError
from holoray.formats.quantised import AWQ, GPTQ, INT8, Packing
from holoray.kernels.dequant import KIND_OF, check_order, check_packed
from holoray.kernels.device import Device, Geometry, grid_stride
from holoray.tensor import DTYPES, LARGEST

KINDS: Final = {"BF16": 0, "F16": 1, "F32": 2}
_THREADS: Final = 256
_BLOCKS_EACH: Final = 8
"""Thread blocks for each multiprocessor that a grid-stride kernel gets: enough to fill it at 256 threads."""
_STRIPS_EACH: Final = 64
"""A block takes one strip after the other; many blocks, since a strip of 256 waits for its reads."""
MAX_TILE: Final = 64
"""Two tiles of float32 must fit into the shared memory that every device gives unasked, 48 KiB."""
_UNROLLED_TILES: Final = (8, 16, 32, 64)
_WIDE: Final = 128
"""Columns, and threads, of a block of dct_tiles.cu."""
_ROTATION_THREADS: Final = 512
_OUTPUTS: Final = {GPTQ: 64, AWQ: 128, INT8: 1}
_INPUTS: Final = {GPTQ: 128, AWQ: 64, INT8: 8 * _THREADS}
"""Outputs and inputs that a block of `dequant` takes at once."""


def output_dtype(out: Any) -> str:
    """F32, F16 or BF16 (as uint16 on a device); raises UsageError for another dtype or an array with gaps."""
    names = {np.dtype(np.uint16): "BF16", **{DTYPES[name]: name for name in KINDS}}
    name = names.get(np.dtype(out.dtype))
    if name is None or not out.flags.c_contiguous:
        raise UsageError(f"weights cannot be written to a {out.dtype} array, or it has gaps")
    return name


def store(device: Device, weights: Any, out: Any, exponent: int) -> None:
    """Scale float32 by 2**exponent, clip where that or F16 may overflow, round to `out`. Twin: `rounding.store`."""
    kind = output_dtype(out)
    if weights.dtype != np.float32 or weights.size != out.size or not weights.flags.c_contiguous:
        raise UsageError(f"{weights.dtype} of {weights.shape} is not float32 of {out.shape}")
    if out.size == 0:
        return
    arguments = (_address(device, weights), _address(device, out), np.uint64(out.size), *_finish(kind, exponent))
    device.launch("cast", "cast_weights", _strided(device, -(-out.size // 8)), arguments)


def dequantise(
    device: Device,
    packing: Packing,
    q: Any,
    scales: Any,
    zeros: Any,
    order: npt.NDArray[np.int32] | None,
    out: Any,
) -> None:
    """A quantised layer to `out` [rows, columns]. Twin, with the formula: `dequant.dequantise`.

    `order` lies on the host: groups beyond the scales are found there, before a kernel would read them.
    """
    check_packed(packing, q, scales, zeros, out)
    order = check_order(packing, order)
    uploaded = None if order is None else device.upload(order)
    sizes = packing.rows, packing.columns, packing.group, packing.groups, packing.bits, packing.zero_offset
    arguments: tuple[np.generic, ...] = (
        _address(device, q),
        _address(device, scales),
        *(np.uint64(0) if array is None else _address(device, array) for array in (zeros, uploaded)),
        _address(device, out),
        *(np.uint32(size) for size in sizes),
        np.int32(KIND_OF[np.dtype(scales.dtype)]),
        np.int32(KINDS[output_dtype(out)]),
    )
    blocks = -(-packing.rows // _OUTPUTS[packing.method]) * -(-packing.columns // _INPUTS[packing.method])
    device.launch("dequant", f"dequantise_{packing.method}", _strided(device, blocks * _THREADS), arguments)


def inverse_rotation(device: Device, x: Any, seed: int) -> None:
    """Undo the signs and Hadamard transforms of `projection` on float32[n], in place. Twin: `hadamard.inverse`."""
    if x.dtype != np.float32 or x.ndim != 1 or x.size == 0 or not x.flags.c_contiguous:
        raise UsageError(f"{x.dtype} of {x.shape} is not a vector of float32")
    order = block_size(x.size)
    whole = x.size - x.size % order
    if whole < x.size:
        _rotate(device, x[x.size - order :], order, seed ^ SIGNS[1])
    _rotate(device, x[:whole], order, seed ^ SIGNS[0])


def _rotate(device: Device, x: Any, order: int, seed: int) -> None:
    scale = np.float32(1 / math.sqrt(order))
    # Sixteen-byte accesses need 16-byte addresses; the window at the end begins anywhere.
    address = _address(device, x, alignment=4)
    vector = np.int32(address % 16 == 0 and order % 4 == 0)
    shared = 4 * (order + order % 2) + 8 * -(-order // 64)
    geometry = Geometry(x.size // order, min(_ROTATION_THREADS, max(1, order // 2)), shared)
    device.launch("rotation", "inverse_rotation", geometry, (address, np.uint64(seed), np.uint32(order), scale, vector))


def collect_shares(device: Device, shares: Any, starts: Any, offsets: Any, deal: Deal, raster: Any) -> None:
    """Coefficients of all fragments to their places in float32[size]. Twin: `dealing.scatter`, share by share.

    `shares` float32: fragment f's begin at `starts[f]` (uint64[fragments]); `offsets` uint16[strips] are the deal's.
    """
    wanted = ((starts, deal.fragments, np.uint64), (offsets, deal.strips, np.uint16), (raster, deal.size, np.float32))
    if shares.size < deal.size:
        raise UsageError(f"{shares.size} coefficients where {deal.size} were dealt")
    for array, size, dtype in (*wanted, (shares, shares.size, np.float32)):
        _check_vector(array, size, dtype)
    addresses = (_address(device, array) for array in (shares, starts, offsets, raster))
    numbers = (np.uint64(deal.size), np.uint32(deal.strip), np.uint32(deal.fragments))
    grid = min(deal.strips, _STRIPS_EACH * device.multiprocessors)
    device.launch("deal", "collect_shares", Geometry(grid, _THREADS), (*addresses, *numbers))


def put_numbers(device: Device, positions: Any, values: Any, raster: Any) -> None:
    """raster[positions] = values, both float32; positions are uint32 or uint64 and in range, which is not looked at."""
    wide = positions.dtype == np.uint64
    _check_vector(positions, values.size, np.uint64 if wide else np.uint32)
    _check_vector(values, values.size, np.float32)
    _check_vector(raster, raster.size, np.float32)
    if values.size == 0:
        return
    addresses = (_address(device, array) for array in (positions, values, raster))
    numbers = (np.uint64(values.size), np.int32(wide))
    device.launch("deal", "put_numbers", _strided(device, values.size), (*addresses, *numbers))


def _check_vector(array: Any, size: int, dtype: npt.DTypeLike) -> None:
    if array.dtype != dtype or array.shape != (size,) or not array.flags.c_contiguous:
        raise UsageError(f"{array.dtype} of {array.shape} is not a vector of {size} {np.dtype(dtype)}")


def inverse_dct(device: Device, coefficients: Any, out: Any, exponent: int, tile: int) -> None:
    """Inverse DCT of the tiles of float32[rows, columns], scaled, clipped and cast into `out`, in one pass.

    Twin: `spectral.inverse_tiles` and `rounding.store`. Sums run in another order: equal within rounding.
    """
    if not 1 <= tile <= MAX_TILE:
        raise UsageError(
            f"tiles of {tile} do not fit into a thread block", hint=f"this kernel takes tiles up to {MAX_TILE}"
        )
    if coefficients.dtype != np.float32 or coefficients.ndim != 2 or coefficients.shape != out.shape:
        raise UsageError(f"{coefficients.dtype} of {coefficients.shape} is not a float32 matrix of {out.shape}")
    kind = output_dtype(out)
    rows, columns = out.shape
    if out.size == 0:
        return
    # Whole tiles of the usual sides have kernels of their own; what is left is a strip on the right and one below.
    down, across = (rows - rows % tile, columns - columns % tile) if tile in _UNROLLED_TILES else (0, 0)
    parts = _Parts(device, coefficients, out, columns, _finish(kind, exponent))
    if down and across:
        parts.whole_tiles(down, across, tile)
    else:
        down = across = 0
    if across < columns:
        parts.tiles(0, across, rows, columns - across, tile)
    if down < rows and across:
        parts.tiles(down, 0, rows - down, across, tile)


@dataclass(frozen=True, slots=True)
class _Parts:
    """Launches of inverse DCTs on parts of one matrix whose rows are `pitch` long."""

    device: Device
    coefficients: Any
    out: Any
    pitch: int
    finish: tuple[np.generic, ...]

    def _ends(self, top: int, left: int) -> tuple[np.uint64, np.uint64]:
        skipped = top * self.pitch + left
        ends = ((_address(self.device, array), array.dtype.itemsize) for array in (self.coefficients, self.out))
        first, second = (np.uint64(int(address) + skipped * width) for address, width in ends)
        return first, second

    def whole_tiles(self, rows: int, columns: int, tile: int) -> None:
        """The part at the top left, which holds whole tiles."""
        geometry = Geometry(rows // tile * -(-columns // _WIDE), _WIDE, 4 * tile * (_WIDE + 1))
        sizes = np.uint64(columns), np.uint64(self.pitch)
        self.device.launch("dct_tiles", f"inverse_dct_{tile}", geometry, (*self._ends(0, 0), *sizes, *self.finish))

    def tiles(self, top: int, left: int, rows: int, columns: int, tile: int) -> None:
        """A part that begins at a tile's corner, with the smaller tiles at its edges."""
        tables = [self.device.upload(cosines(n)) for n in (tile, rows % tile, tile, columns % tile)]
        sizes = np.uint64(rows), np.uint64(columns), np.uint64(self.pitch), np.uint32(tile)
        places = [_address(self.device, table) for table in tables]
        threads = min(_THREADS, 32 * -(-tile * tile // 32))
        geometry = Geometry(-(-rows // tile) * -(-columns // tile), threads, 8 * tile * tile)
        self.device.launch("dct", "inverse_dct", geometry, (*self._ends(top, left), *sizes, *places, *self.finish))


@lru_cache(maxsize=256)
def cosines(n: int) -> npt.NDArray[np.float32]:
    """float32[n, n]: a_j cos(pi j (2k + 1) / 2n) at [j, k], a_0 = sqrt(1/n), else sqrt(2/n); one zero for n = 0."""
    if n == 0:
        return np.zeros((1, 1), np.float32)
    j, k = np.arange(n)[:, None], np.arange(n)[None, :]
    table = np.cos(np.pi * (j * (2 * k + 1) % (4 * n)) / (2 * n)) * math.sqrt(2 / n)
    table[0] = math.sqrt(1 / n)
    return table.astype(np.float32)


def _finish(kind: str, exponent: int) -> tuple[np.generic, ...]:
    limit = LARGEST[kind] if exponent or kind == "F16" else math.inf
    return np.int32(KINDS[kind]), np.int32(exponent), np.float32(limit)


def _strided(device: Device, items: int) -> Geometry:
    return grid_stride(items, _THREADS, _BLOCKS_EACH * device.multiprocessors)


def _address(device: Device, array: Any, *, alignment: int = 16) -> np.uint64:
    address = device.address(array)
    if address % alignment:
        raise UsageError(f"an array on the device lies at no multiple of {alignment} bytes")
    return np.uint64(address)
