"""Reed-Solomon over GF(256): any k of N chunks give the others; through liberasurecode and ISA-L.

The code is systematic with a Cauchy matrix, so every square of it can be inverted: chunk i of 0 … k-1 is data, and
byte by byte chunk i of k … N-1 is the sum over j < k of data_j / (i xor j), in the field of x^8 + x^4 + x^3 + x^2 + 1.
(`isa_l_rs_vand` is not such a code: some k of its N chunks are not enough.)

liberasurecode wants a header before each chunk and ends the process if it is handed anything but `bytes` of a known
length. The headers are the same for every stripe of one shape, so none is stored: they are put back when decoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Final

from pyeclib.ec_iface import ECDriver

MAX_SHARES: Final = 32
ALIGNMENT: Final = 16
"""Chunks are multiples of so many bytes, so that liberasurecode adds no padding of its own."""


def parity(data: bytes, needed: int, total: int) -> list[bytes]:
    """The total - needed parity chunks of a stripe: `data` is its `needed` data chunks, of equal length, joined."""
    _check_length(len(data), needed)
    if total == needed or not data:
        return [b""] * (total - needed)
    header = len(_headers(needed, total, len(data) // needed)[0])
    return [chunk[header:] for chunk in _driver(needed, total).encode(data)[needed:]]


def rebuild(chunks: Mapping[int, bytes], wanted: Sequence[int], needed: int, total: int) -> list[bytes]:
    """The wanted chunks of a stripe from exactly `needed` others (of equal length, by their place in the stripe).

    A range of bytes of every chunk is a stripe as well: whoever lost a range need not read more.
    """
    lengths = {len(chunk) for chunk in chunks.values()}
    if len(chunks) != needed or len(lengths) != 1 or set(wanted) & set(chunks) or total == needed:
        raise ValueError(f"{len(chunks)} chunks of lengths {lengths} give no {wanted} of a {needed} of {total} code")
    (length,) = lengths
    _check_length(length, 1)
    headers = _headers(needed, total, length)
    with_headers = [headers[i] + chunk for i, chunk in sorted(chunks.items())]
    size = len(headers[0])
    return [chunk[size:] for chunk in _driver(needed, total).reconstruct(with_headers, list(wanted))]


def _check_length(nbytes: int, chunks: int) -> None:
    if nbytes % (chunks * ALIGNMENT):
        raise ValueError(f"{nbytes} bytes are not {chunks} chunks of a multiple of {ALIGNMENT} bytes")


@cache
def _driver(needed: int, total: int) -> ECDriver:
    return ECDriver(ec_type="isa_l_rs_cauchy", k=needed, m=total - needed)


@lru_cache(256)
def _headers(needed: int, total: int, length: int) -> tuple[bytes, ...]:
    """What liberasurecode writes before each chunk of that length; nothing in it depends on the data."""
    chunks = _driver(needed, total).encode(bytes(needed * length))
    return tuple(chunk[: len(chunk) - length] for chunk in chunks)
