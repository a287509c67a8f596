"""Opening the bodies of `planes` fragments: directories checked, planes decoded, sections located."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from numba import njit

from holoray.codecs import planes_layout as lay
from holoray.compression import NONE
from holoray.kernels.bits import load_u32
from holoray.kernels.planes_density import decode_section

_GAP: Final = 16
_NONE: Final = lay.COMPRESSIONS.index(NONE)
_DENSITY: Final = lay.COMPRESSIONS.index(lay.DENSITY)


@dataclass(frozen=True, slots=True, eq=False)
class RunTables:
    """The layouts of all layers of a run as arrays.

    `sections`: int64[layers, most sections, 3], place, greatest raw length and step of each. `heads`: int64[layers, 5],
    number of sections, first and end row of offsets, blocks, and where in the buffer the layer's planes go.
    """

    sections: npt.NDArray[np.int64]
    heads: npt.NDArray[np.int64]
    buffer_bytes: int


@lru_cache(maxsize=1024)
def run_tables(dtype: str, top: int, tail_cut: int, layers: int, count: int) -> RunTables:
    """The tables of a run of `count` weights."""
    layouts = [lay.layer_layout(dtype, top, tail_cut, layer, count) for layer in range(layers)]
    most = max(len(layout.sections) for layout in layouts)
    sections = np.zeros((layers, most, 3), np.int64)
    heads = np.zeros((layers, 5), np.int64)
    buffer_bytes = 0
    for layer, layout in enumerate(layouts):
        rows = np.array([layout.sections, layout.largest, layout.steps]).T
        sections[layer, : len(rows)] = rows
        heads[layer] = len(rows), *layout.streams, layout.blocks, buffer_bytes
        planes = [n for place, n in zip(layout.sections, layout.largest, strict=True) if place < lay.SIGNS]
        buffer_bytes += sum(planes) + _GAP * len(planes)
    return RunTables(sections, heads, buffer_bytes)


@njit(nogil=True, cache=True)
def open_bodies(
    bodies: Any,
    sections: Any,
    heads: Any,
    addresses: Any,
    lengths: Any,
    offsets: Any,
    buffer: int,
    pending: Any,
    singles: Any,
    several: Any,
) -> int:
    """Locate the raw sections of `bodies` (int64[n, 3]: layer, address, length); checks what `parse_body` checks.

    `addresses` and `lengths` (int64[SECTIONS]) take what raw sections there are, the offset rows go to `offsets`
    (uint32[STREAMS, BLOCKS + 1]), planes in the density code are decoded to the buffer. Returns how many sections are
    left to decompress: place, body, start, end and compression in the rows of `pending` (int64[SECTIONS, 5]). For a
    malformed body n: -1 - n.
    """
    count = 0
    for n in range(bodies.shape[0]):
        layer, body, nbytes = bodies[n, 0], bodies[n, 1], bodies[n, 2]
        parts, first, end, blocks = heads[layer, 0], heads[layer, 1], heads[layer, 2], heads[layer, 3]
        free = buffer + heads[layer, 4]
        row = body + 8 * parts
        start = 8 * parts + 4 * (end - first) * (blocks + 1)
        if nbytes < start:
            return -1 - n
        for s in range(parts):
            place, most, step = sections[layer, s, 0], sections[layer, s, 1], sections[layer, s, 2]
            stored, packed = np.int64(load_u32(body + 8 * s)), np.int64(load_u32(body + 8 * s + 4))
            raw_bytes, compression = packed & ((1 << lay.RAW_BITS) - 1), packed >> lay.RAW_BITS
            if raw_bytes > most or (raw_bytes != most if step == 0 else raw_bytes % step != 0):
                return -1 - n
            if (stored != raw_bytes if compression == _NONE else stored >= raw_bytes) or start + stored > nbytes:
                return -1 - n
            lengths[place] = raw_bytes
            if compression == _NONE:
                addresses[place] = body + start
            elif compression == _DENSITY:
                if place >= lay.SIGNS or decode_section(body + start, stored, free, raw_bytes, singles, several):
                    return -1 - n
                addresses[place] = free
                free += raw_bytes + _GAP
            else:
                pending[count, 0], pending[count, 1] = place, n
                pending[count, 2], pending[count, 3], pending[count, 4] = start, start + stored, compression
                count += 1
            start += stored
        if start != nbytes:
            return -1 - n
        for stream in range(first, end):
            for block in range(blocks + 1):
                offsets[stream, block] = load_u32(row)
                row += 4
    return count
