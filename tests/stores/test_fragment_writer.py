"""Fragment files are Arrow files whose payload ranges are where we say."""

from __future__ import annotations

import hashlib

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holoray.stores import MemoryStore, fragment_file
from holoray.stores.fragment_writer import SCHEMA, FragmentFileWriter


@settings(deadline=None, max_examples=40)
@given(payloads=st.lists(st.binary(max_size=300), max_size=40), batch=st.integers(1, 700))
def test_offsets_match_what_arrow_reads(payloads: list[bytes], batch: int) -> None:
    store = MemoryStore()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("holoray.stores.fragment_writer.BATCH_BYTES", batch)
        with FragmentFileWriter(store, 3) as writer:
            positions = [writer.append(f"t{i}", i, payload) for i, payload in enumerate(payloads)]
    data = store.blobs[fragment_file(3)]
    table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
    assert table.schema.equals(SCHEMA)
    assert table["payload"].to_pylist() == payloads
    assert table["index"].to_pylist() == list(range(len(payloads)))
    ranges = [(writer.offsets[p], len(b)) for p, b in zip(positions, payloads, strict=True)]
    assert [data[start : start + length] for start, length in ranges] == payloads
    assert writer.entry is not None
    assert writer.entry.bytes == len(data)
    assert writer.entry.framing_sha256 == _digest_of_the_rest(data, ranges)


def _digest_of_the_rest(data: bytes, ranges: list[tuple[int, int]]) -> str:
    rest = bytearray()
    position = 0
    for start, length in sorted(r for r in ranges if r[1]):
        rest += data[position:start]
        position = start + length
    return hashlib.sha256(rest + data[position:]).hexdigest()


def test_an_error_leaves_no_file() -> None:
    store = MemoryStore()
    with pytest.raises(RuntimeError), FragmentFileWriter(store, 0) as writer:
        writer.append("t", 0, b"x")
        raise RuntimeError
    assert store.blobs == {}
