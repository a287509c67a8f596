"""The manifest: what is written is read back, and what nobody would write is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import holoray
from holoray.errors import FormatError, LimitError
from holoray.fragment import TensorEntry
from holoray.manifest import SCHEMA, FileEntry, Manifest, read_manifest
from holoray.tensor import Array


@pytest.fixture(scope="module")
def manifest(model: dict[str, Array]) -> Manifest:
    store = holoray.MemoryStore()
    holoray.encode(model, store, pattern=["layers.0.mlp*=spectral"])
    return holoray.open(store).manifest


def test_round_trip(manifest: Manifest) -> None:
    again = read_manifest(Manifest(manifest.tensors, manifest.files, manifest.options, manifest.metadata).encoded)
    assert again == manifest
    assert again.root == manifest.root


def test_any_arrow_tool_reads_it(manifest: Manifest) -> None:
    table = pa.ipc.open_file(pa.py_buffer(manifest.encoded)).read_all()
    assert table.num_rows == len(manifest.tensors)
    assert table["fragments"].combine_chunks().flatten().field("gain").to_pylist() == [
        f.gain for t in manifest.tensors for f in t.fragments
    ]


def refused(manifest: Manifest, error: type[Exception] = FormatError) -> None:
    with pytest.raises(error):
        read_manifest(Manifest(manifest.tensors, manifest.files, manifest.options, manifest.metadata).encoded)


def with_tensor(manifest: Manifest, position: int, **changes: Any) -> Manifest:
    tensors = list(manifest.tensors)
    tensors[position] = replace(tensors[position], **changes)
    return replace(manifest, tensors=tuple(tensors))


def with_fragment(manifest: Manifest, position: int, index: int, /, **changes: Any) -> Manifest:
    fragments = list(manifest.tensors[position].fragments)
    fragments[index] = replace(fragments[index], **changes)
    return with_tensor(manifest, position, fragments=tuple(fragments))


@pytest.mark.fault("absurd-layout")
@pytest.mark.parametrize(
    "changes",
    [
        {"index": 5},
        {"layer": 1},
        {"slot": 7},
        {"requires": 0},
        {"compression": "zstd"},
        {"compression": "brotli"},
        {"stored_bytes": -1},
        {"stored_bytes": 1 << 60},
        {"raw_bytes": 3},
        {"gain": float("nan")},
        {"gain": float("inf")},
        {"file": 12345},
        {"file": -1},
        {"offset": -1},
        {"offset": (1 << 63) - 1},
        {"offset": 1 << 40},
        {"order": 0},
        {"order": -1},
        {"order": 10**6},
    ],
    ids=str,
)
def test_impossible_fragments(changes: dict[str, Any], manifest: Manifest) -> None:
    refused(with_fragment(manifest, 0, 1, **changes))


@pytest.mark.fault("malformed")
@pytest.mark.parametrize(
    "changes",
    [
        {"codec": "raw"},
        {"codec": "zip"},
        {"config": {}},
        {"config": {"threshold": 1, "top": 2}},
        {"residual": -1.0},
        {"residual": float("nan")},
        {"residual": float("inf")},
        {"essential_gain": 1.0},
        {"essential_gain": -1.0},
        {"essential_gain": float("nan")},
        {"essential_gain": float("inf")},
        {"fragments": ()},
    ],
    ids=str,
)
def test_impossible_tensors(changes: dict[str, Any], manifest: Manifest) -> None:
    refused(with_tensor(manifest, 0, **changes))


@pytest.mark.fault("absurd-layout")
@pytest.mark.parametrize("changes", [{"offset": -1}, {"stored_bytes": -1}, {"compression": "none"}], ids=str)
def test_an_impossible_fragment_that_is_alone(changes: dict[str, Any]) -> None:
    """Nothing overlaps it, and no codec knows how many bytes a compressed fragment takes."""
    store = holoray.MemoryStore()
    holoray.encode({"zeros": np.zeros(4096, np.int32)}, store)
    manifest = holoray.open(store).manifest
    assert [f.compression for f in manifest.tensors[0].fragments] == ["zstd"]
    refused(with_fragment(manifest, 0, 0, **changes))


@pytest.mark.fault("absurd-layout")
def test_shapes_that_do_not_fit(manifest: Manifest) -> None:
    entry = manifest.tensors[0]
    for shape in ((1500, 900), (1 << 40, 1), (1 << 62,)):
        raw_shape = object.__new__(type(entry.spec))
        for name, value in (("name", entry.name), ("dtype", "BF16"), ("shape", shape)):
            object.__setattr__(raw_shape, name, value)
        refused(with_tensor(manifest, 0, spec=raw_shape))


@pytest.mark.fault("absurd-layout")
def test_lists_that_contradict_themselves(manifest: Manifest) -> None:
    refused(replace(manifest, tensors=(*manifest.tensors, manifest.tensors[0])))
    refused(replace(manifest, files=(*manifest.files, manifest.files[0])))
    refused(replace(manifest, files=manifest.files[1:]))
    refused(replace(manifest, files=(*manifest.files, FileEntry(-1, 3, ""))))
    overlapping = with_fragment(manifest, 0, 1, offset=manifest.tensors[0].fragments[0].offset + 1)
    refused(overlapping)


@pytest.mark.fault("malformed")
def test_streaming_before_a_prerequisite(manifest: Manifest) -> None:
    first, later = manifest.tensors[0].fragments[0], manifest.tensors[0].fragments[2]
    assert later.requires == 0
    swapped = with_fragment(with_fragment(manifest, 0, 0, order=later.order), 0, 2, order=first.order)
    refused(swapped)


def _encoded(table_metadata: bytes, tensors: tuple[TensorEntry, ...], manifest: Manifest) -> bytes:
    batch = pa.ipc.open_file(pa.py_buffer(manifest.encoded)).get_batch(0)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA.with_metadata({b"holoray": table_metadata})) as writer:
        writer.write_batch(batch.replace_schema_metadata({b"holoray": table_metadata}))
    encoded: bytes = sink.getvalue().to_pybytes()
    return encoded


@pytest.mark.fault("malformed")
@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"{",
        b"[" * 100_000,
        b'{"format": 2, "files": [], "options": {}, "metadata": {}}',
        b'{"format": 1}',
        b'{"format": 1, "files": 3, "options": {}, "metadata": {}}',
        b'{"format": 1, "files": [{"number": "x"}], "options": {}, "metadata": {}}',
        b'{"format": 1, "files": [], "options": [], "metadata": {}}',
    ],
    ids=lambda header: header[:30].decode(),
)
def test_malformed_headers(header: bytes, manifest: Manifest) -> None:
    with pytest.raises(FormatError):
        read_manifest(_encoded(header, manifest.tensors, manifest))


@pytest.mark.fault("downgraded")
def test_newer_formats_say_upgrade(manifest: Manifest) -> None:
    header = json.dumps({"format": 99, "files": [], "options": {}, "metadata": {}}).encode()
    with pytest.raises(FormatError) as caught:
        read_manifest(_encoded(header, manifest.tensors, manifest))
    assert "upgrade" in caught.value.hint


@pytest.mark.parametrize("data", [b"", b"ARROW1", b"ARROW1\0\0" + bytes(64), bytes(1000)])
def test_what_is_no_arrow_file(data: bytes) -> None:
    with pytest.raises(FormatError):
        read_manifest(data)


@pytest.mark.fault("downgraded")
def test_other_schemas(manifest: Manifest) -> None:
    table = pa.table({"name": ["x"]})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(FormatError, match="schema"):
        read_manifest(sink.getvalue().to_pybytes())


@pytest.mark.fault("bomb")
def test_a_tensor_that_claims_too_much_is_a_bomb() -> None:
    store = holoray.MemoryStore()
    holoray.encode({"w": np.zeros((2000, 2000), np.float32)}, store, codec="raw")
    manifest = holoray.open(store).manifest
    assert manifest.tensors[0].spec.nbytes / manifest.tensors[0].stored_bytes > 1000  # an honest one may be extreme
    tiny = tuple(replace(f, stored_bytes=1) for f in manifest.tensors[0].fragments)
    refused(with_tensor(manifest, 0, fragments=tiny), LimitError)


@pytest.mark.fault("huge-count")
def test_a_manifest_beyond_the_limit(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holoray.manifest.MAX_MANIFEST_BYTES", len(manifest.encoded))
    assert read_manifest(manifest.encoded) == manifest
    monkeypatch.setattr("holoray.manifest.MAX_MANIFEST_BYTES", len(manifest.encoded) - 1)
    with pytest.raises(LimitError, match="beyond the limit"):
        read_manifest(manifest.encoded)


@pytest.mark.fault("huge-count")
def test_a_configuration_beyond_the_limit(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holoray.manifest.MAX_CONFIG_BYTES", 1)
    with pytest.raises(LimitError, match="configuration"):
        read_manifest(manifest.encoded)


def _written(manifest: Manifest, batches: list[pa.RecordBatch], schema: pa.Schema) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    encoded: bytes = sink.getvalue().to_pybytes()
    return encoded


@pytest.mark.fault("malformed")
def test_two_record_batches_are_refused(manifest: Manifest) -> None:
    """A second one would be read by Arrow's tools and not by us."""
    batch = pa.ipc.open_file(pa.py_buffer(manifest.encoded)).get_batch(0)
    assert read_manifest(_written(manifest, [batch], batch.schema)) == manifest
    with pytest.raises(FormatError):
        read_manifest(_written(manifest, [batch, batch], batch.schema))


@pytest.mark.fault("malformed")
@pytest.mark.parametrize("column", ["name", "residual", "fragments"])
def test_null_values_are_refused(manifest: Manifest, column: str) -> None:
    """Arrow writes them under a schema that denies them."""
    batch = pa.ipc.open_file(pa.py_buffer(manifest.encoded)).get_batch(0)
    position = batch.schema.get_field_index(column)
    nulls = pa.nulls(batch.num_rows, batch.schema.field(column).type)
    columns = [nulls if i == position else batch.column(i) for i in range(batch.num_columns)]
    hollow = pa.RecordBatch.from_arrays(columns, schema=batch.schema)
    with pytest.raises(FormatError, match="null"):
        read_manifest(_written(manifest, [hollow], batch.schema))


@pytest.mark.fault("absurd-layout")
def test_offsets_of_arrow_that_lead_out_of_its_buffers(manifest: Manifest) -> None:
    """Unchecked, they make Arrow read whatever lies in memory there."""
    ends = np.cumsum([0, *(len(t.spec.shape) for t in manifest.tensors)], dtype=np.int32).tobytes()
    assert manifest.encoded.count(ends) == 1
    for position in (-1, -3):  # the last one, and one whose neighbours are in order
        for value in (1 << 20, 1 << 28, (1 << 31) - 1, -1):
            forged = np.frombuffer(ends, np.int32).copy()
            forged[position] = value
            with pytest.raises(FormatError):
                read_manifest(manifest.encoded.replace(ends, forged.tobytes()))


@pytest.mark.fault("malformed")
@pytest.mark.parametrize(
    "changes",
    [{"number": "0"}, {"number": 0.0}, {"number": True}, {"number": -1}, {"number": 1 << 31}, {"bytes": 1e9},
     {"bytes": -1}, {"bytes": None}, {"framing_sha256": 5}],
    ids=str,
)  # fmt: skip
def test_malformed_lists_of_files(manifest: Manifest, changes: dict[str, Any]) -> None:
    """Of a file that no fragment lies in, so that nothing else speaks against it."""
    spare = {"number": 999, "bytes": 0, "framing_sha256": "0" * 64}
    header = json.loads(pa.ipc.open_file(pa.py_buffer(manifest.encoded)).schema.metadata[b"holoray"])
    for extra, fine in ((spare, True), (spare | changes, False)):
        text = json.dumps(header | {"files": [*header["files"], extra]}).encode()
        if fine:
            read_manifest(_encoded(text, manifest.tensors, manifest))
        else:
            with pytest.raises(FormatError):
                read_manifest(_encoded(text, manifest.tensors, manifest))


@pytest.mark.fault("malformed")
def test_gains_that_overflow_together(manifest: Manifest) -> None:
    """Each tensor's are finite, and the sum over tensors is not."""
    large = replace(manifest, tensors=tuple(replace(t, residual=1.2e308) for t in manifest.tensors))
    with pytest.raises(FormatError, match="overflow"):
        read_manifest(large.encoded)
