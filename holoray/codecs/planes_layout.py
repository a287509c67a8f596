"""The body of a `planes` fragment: which sections a layer has, how large they may be, how they are packed and parsed.

A body is a head of little-endian u32 and then the stored sections, back to back:

* directory: for each section its stored length, then its raw length with the compression in the top two bits
  (0 none, 1 lz4, 2 zstd, 3 the density code of planes, for planes only);
* offsets: for each stream of the layer one row of `blocks + 1` numbers, where its blocks begin (in units of the
  stream: bits, records, entries); the last one is its total.

All sections and offset rows of a run have fixed places (`SECTIONS`, `STREAMS`) in the tables that decoders work on.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from holoray.codecs import planes_density
from holoray.compression import LZ4, NONE, ZSTD, decompress
from holoray.errors import FormatError, TruncatedError

GROUP: Final = 4096
BLOCK: Final = 1 << 16
RUN: Final = 1 << 19
BLOCKS: Final = RUN // BLOCK
WORD_BITS: Final = 16
PLANE_BYTES: Final = GROUP // 8
"""Bytes of one plane of one group."""

LAYERS: Final = 6
TAIL: Final = 5
LOW: Final = 6
"""The layer of the low 16 bits, which only F32 has."""

FIRST_CUTS: Final = (-1, -2, -3, -4)
"""Exponents, relative to the threshold, where layers 0 to 3 end; layer 4 ends at `tail_cut`."""
TAIL_PLANES: Final = 7
HALF_PLANES: Final = 3
RECORD_BITS: Final = 12
ESCAPE: Final = 15

# Places of the sections of a run.
PLANE: Final = 0
SIGNS: Final = 16
OUTLIER_PLACES: Final = 21
OUTLIER_VALUES: Final = 22
TAIL_BITS: Final = 23
RECORDS: Final = 30
ESCAPES: Final = 31
HALF_PLANE: Final = 32
LOW_BITS: Final = 35
SECTIONS: Final = 36

# Places of the offset rows of a run, so that those of one layer are adjacent.
STREAM_SIGNS: Final = (0, 2, 3, 4, 5)
STREAM_OUTLIERS: Final = 1
STREAM_TAIL: Final = 6
STREAM_RECORDS: Final = 13
STREAM_ESCAPES: Final = 14
STREAMS: Final = 15

DENSITY: Final = "density"
COMPRESSIONS: Final = (NONE, LZ4, ZSTD, DENSITY)
RAW_BITS: Final = 30
_RAW_MASK: Final = (1 << RAW_BITS) - 1


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """What the body of one layer of a run of `count` weights consists of.

    `sections` are places in the table of sections; `largest` their greatest raw lengths in bytes, and `steps` what a
    raw length is a multiple of (0: there is no other than the greatest). Offset rows are `streams` (first, end).
    """

    sections: tuple[int, ...]
    largest: tuple[int, ...]
    steps: tuple[int, ...]
    streams: tuple[int, int]
    blocks: int
    directory: struct.Struct
    head_bytes: int

    @property
    def min_bytes(self) -> int:
        return self.head_bytes

    @property
    def max_bytes(self) -> int:
        return self.head_bytes + sum(self.largest)


class StoredSection(NamedTuple):
    """One section as the directory describes it; `start` and `end` are places in the body."""

    place: int
    compression: str
    start: int
    end: int
    raw_bytes: int


def groups(count: int) -> int:
    return -(-count // GROUP)


def blocks(count: int) -> int:
    return -(-count // BLOCK)


def planes_of(top: int, tail_cut: int, layer: int) -> range:
    """The planes of one of the layers 0 to 4; plane p holds the digits of exponent `top - 1 - p`."""
    cuts = (top, *FIRST_CUTS, tail_cut)
    return range(top - cuts[layer], top - cuts[layer + 1])


@lru_cache(maxsize=1024)
def layer_layout(dtype: str, top: int, tail_cut: int, layer: int, count: int) -> LayerLayout:
    """The layout of `layer` in a run of `count` weights."""
    plane = PLANE_BYTES * groups(count)
    if layer < TAIL:
        parts = [(PLANE + p, plane, 0) for p in planes_of(top, tail_cut, layer)]
        parts.append((SIGNS + layer, plane, 1))
        streams = (STREAM_SIGNS[layer], STREAM_SIGNS[layer] + 1)
        if layer == 0:
            parts += [(OUTLIER_PLACES, 2 * count, 2), (OUTLIER_VALUES, 2 * count, 2)]
            streams = (STREAM_SIGNS[0], STREAM_OUTLIERS + 1)
    elif layer == TAIL:
        parts = [(TAIL_BITS + r, plane, 1) for r in range(TAIL_PLANES)]
        parts += [(RECORDS, -(-RECORD_BITS * count // 8), 1), (ESCAPES, 2 * count, 2)]
        if dtype == "F16":
            parts += [(HALF_PLANE + p, plane, 0) for p in range(HALF_PLANES)]
        streams = (STREAM_TAIL, STREAM_ESCAPES + 1)
    else:
        parts, streams = [(LOW_BITS, 2 * count, 0)], (0, 0)
    places, largest, steps = zip(*parts, strict=True)
    directory = struct.Struct(f"<{2 * len(parts)}I")
    head_bytes = directory.size + 4 * (streams[1] - streams[0]) * (blocks(count) + 1)
    return LayerLayout(places, largest, steps, streams, blocks(count), directory, head_bytes)


class PackedSection(NamedTuple):
    """One section as it is stored."""

    compression: str
    data: Any
    raw_bytes: int


def pack_body(layout: LayerLayout, sections: Sequence[PackedSection], offsets: npt.NDArray[np.uint32]) -> bytes:
    """The body of a layer from its sections in layout order and the offset rows of its run."""
    directory: list[int] = []
    for compression, data, raw_bytes in sections:
        directory += [memoryview(data).nbytes, COMPRESSIONS.index(compression) << RAW_BITS | raw_bytes]
    first, end = layout.streams
    rows = np.ascontiguousarray(offsets[first:end, : layout.blocks + 1], "<u4")
    return b"".join([layout.directory.pack(*directory), rows.tobytes(), *(section.data for section in sections)])


def parse_body(layout: LayerLayout, body: memoryview) -> tuple[list[StoredSection], npt.NDArray[np.uint32]]:
    """The sections of a body and its offset rows (uint32[streams, blocks + 1]), every length checked; no content is."""
    start = layout.head_bytes
    if body.nbytes < start:
        raise TruncatedError(f"planes body has {body.nbytes} bytes, its head alone has {start}")
    directory = iter(layout.directory.unpack_from(body))
    sections = []
    for place, most, step in zip(layout.sections, layout.largest, layout.steps, strict=True):
        stored, packed = next(directory), next(directory)
        raw_bytes, compression = packed & _RAW_MASK, COMPRESSIONS[packed >> RAW_BITS]
        possible = raw_bytes <= most and raw_bytes % step == 0 if step else raw_bytes == most
        if compression == DENSITY and place >= SIGNS:
            raise FormatError(f"planes section {place} is no plane, but coded like one")
        if not possible or not (stored == raw_bytes if compression == NONE else stored < raw_bytes):
            raise FormatError(f"planes section {place} states {stored} bytes for {raw_bytes} of at most {most}")
        sections.append(StoredSection(place, compression, start, start + stored, raw_bytes))
        start += stored
    if start != body.nbytes:
        raise FormatError(f"planes body has {body.nbytes} bytes instead of {start}")
    first, end = layout.streams
    shape = (end - first, layout.blocks + 1)
    rows = np.frombuffer(body, "<u4", shape[0] * shape[1], layout.directory.size).reshape(shape)
    return sections, rows


def raw_section(body: memoryview, section: StoredSection) -> Any:
    """The raw bytes of a section; raises FormatError where it does not decompress to its stated size."""
    data = body[section.start : section.end]
    if section.compression == DENSITY:
        return planes_density.decode(data, section.raw_bytes)
    return decompress(section.compression, data, section.raw_bytes)
