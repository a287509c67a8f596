"""The entropy code of planes: kernels against the plain decoder, on good bytes and bad ones."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holoray.codecs import planes_density as density
from holoray.errors import FormatError
from holoray.kernels import planes_density as kernels
from holoray.tensor import Array

SIZES = (1, 2, 3, 5, 100, 8191, 8192, 8193, 20_000)
GUARD = 16


def plane(nbytes: int, share: float, seed: int = 0) -> Array:
    """Bytes of independent bits that are 1 with probability `share`."""
    return np.packbits(np.random.default_rng(seed).random(8 * nbytes) < share)


def encode(raw: Array) -> bytes:
    out = np.zeros(2 * raw.size + 2 * density.CHUNK, np.uint8)
    size = kernels.encode_section(raw, out, 2 * raw.size, *kernels.encoding_tables())
    assert size != kernels.TOO_LARGE
    return out[:size].tobytes()


def decode(data: bytes, raw_bytes: int) -> bytes | None:
    """What the kernel gives, None where it refuses; nothing may be written outside."""
    source = np.frombuffer(data, np.uint8)
    out = np.full(GUARD + raw_bytes + kernels.SLACK + GUARD, 0x5A, np.uint8)
    bad = kernels.decode_section(source.ctypes.data, source.size, out.ctypes.data + GUARD, raw_bytes, *kernels.tables())
    assert (out[:GUARD] == 0x5A).all()
    assert (out[-GUARD:] == 0x5A).all()
    return None if bad else out[GUARD : GUARD + raw_bytes].tobytes()


def oracle(data: bytes, raw_bytes: int) -> bytes | None:
    try:
        return density.decode(data, raw_bytes)
    except FormatError:
        return None


@pytest.mark.parametrize("share", [0.0, 0.002, 0.035, 0.2, 0.36, 0.5, 1.0])
@pytest.mark.parametrize("nbytes", SIZES)
def test_what_is_coded_comes_back(nbytes: int, share: float) -> None:
    raw = plane(nbytes, share)
    data = encode(raw)
    assert density.decode(data, nbytes) == raw.tobytes()
    assert decode(data, nbytes) == raw.tobytes()


@pytest.mark.parametrize(("share", "most"), [(0.035, 0.27), (0.2, 0.75), (0.36, 0.955)])
def test_size_is_near_the_entropy(share: float, most: float) -> None:
    assert len(encode(plane(1 << 16, share))) <= most * (1 << 16)


def test_codes_are_complete_canonical_and_the_same_everywhere() -> None:
    lengths = density.code_lengths()[1:].astype(np.int64)
    assert (2.0**-lengths).sum(axis=1).tolist() == [1.0] * density.CODES
    assert lengths.max() <= density.MAX_BITS
    digest = hashlib.sha256(lengths.astype(np.uint8).tobytes() + density.codewords().astype("<u2").tobytes())
    assert digest.hexdigest()[:16] == "dfeb779dfb4fefa6"


def test_a_section_that_would_not_shrink_is_not_coded() -> None:
    raw = plane(20_000, 0.5)
    out = np.zeros(raw.size + 2 * density.CHUNK, np.uint8)
    assert kernels.encode_section(raw, out, raw.size - 1, *kernels.encoding_tables()) == kernels.TOO_LARGE


def test_every_truncation_and_extension_is_refused() -> None:
    raw = np.concatenate([plane(300, 0.1), plane(8192, 0.5)])
    data = encode(raw)
    for end in range(len(data)):
        assert decode(data[:end], raw.size) is None
        assert oracle(data[:end], raw.size) is None
    assert decode(data + b"\0", raw.size) is None
    assert oracle(data + b"\0", raw.size) is None


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), share=st.sampled_from([0.01, 0.1, 0.3, 0.5]), nbytes=st.sampled_from(SIZES))
def test_damaged_bytes_read_alike_or_are_refused_alike(seed: int, share: float, nbytes: int) -> None:
    rng = np.random.default_rng(seed)
    data = np.frombuffer(encode(plane(nbytes, share, seed)), np.uint8).copy()
    # Heads are where damage leads furthest.
    heads = rng.integers(0, min(9, data.size), 2)
    for place in (*heads, *rng.integers(0, data.size, int(rng.integers(0, 8)))):
        if rng.random() < 0.5:
            data[place] = rng.integers(0, 256)
    assert decode(data.tobytes(), nbytes) == oracle(data.tobytes(), nbytes)
