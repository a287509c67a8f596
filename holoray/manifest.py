"""The manifest: every tensor and every fragment of a store, as one Arrow table sealed by its SHA-256 (the root)."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Final

import pyarrow as pa

from holoray.codecs.base import Codec, check_entry
from holoray.codecs.registry import get_codec
from holoray.compression import NAMES, NONE
from holoray.errors import FormatError, HolorayError, LimitError
from holoray.fragment import NO_PREREQUISITE, FragmentEntry, TensorEntry
from holoray.integrity import format_root
from holoray.tensor import MAX_TENSOR_BYTES, TensorSpec

FORMAT: Final = 1
MAX_MANIFEST_BYTES: Final = 1 << 30
MAX_CONFIG_BYTES: Final = 1 << 26
# zstd reaches about 32,700:1 on constants; a tensor that claims more than this per stored byte is a bomb.
MAX_EXPANSION: Final = 1 << 16
_METADATA_KEY: Final = b"holoray"

_FRAGMENT: Final = pa.struct(
    [
        pa.field("index", pa.int32(), nullable=False),
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("slot", pa.int32(), nullable=False),
        pa.field("requires", pa.int32(), nullable=False),
        pa.field("compression", pa.string(), nullable=False),
        pa.field("stored_bytes", pa.int64(), nullable=False),
        pa.field("raw_bytes", pa.int64(), nullable=False),
        pa.field("gain", pa.float64(), nullable=False),
        pa.field("xxh3_64", pa.uint64(), nullable=False),
        pa.field("sha256", pa.binary(32), nullable=False),
        pa.field("file", pa.int32(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("order", pa.int32(), nullable=False),
    ]
)
SCHEMA: Final = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("shape", pa.list_(pa.field("item", pa.int64(), nullable=False)), nullable=False),
        pa.field("codec", pa.string(), nullable=False),
        pa.field("config", pa.large_string(), nullable=False),
        pa.field("residual", pa.float64(), nullable=False),
        pa.field("essential_gain", pa.float64(), nullable=False),
        pa.field("mandatory", pa.bool_(), nullable=False),
        pa.field("sha256", pa.binary(32), nullable=False),
        pa.field("fragments", pa.list_(pa.field("item", _FRAGMENT, nullable=False)), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One fragment file: its size and the sha256 of everything in it that is no payload (Arrow's framing)."""

    number: int
    bytes: int
    framing_sha256: str


@dataclass(frozen=True)
class Manifest:
    """Tensors in checkpoint order, the files that hold their fragments, and how the store was made."""

    tensors: tuple[TensorEntry, ...]
    files: tuple[FileEntry, ...]
    options: Mapping[str, Any]
    metadata: Mapping[str, str]
    """The checkpoint's own free-form metadata (safetensors `__metadata__`)."""
    lost: Mapping[int, str] = field(default_factory=dict, compare=False)
    """Files (by number) that cannot be read where the manifest was, and why; no part of what is sealed."""

    @cached_property
    def codecs(self) -> tuple[Codec, ...]:
        """The codec of each tensor."""
        return tuple(get_codec(t.codec, t.config) for t in self.tensors)

    @cached_property
    def by_name(self) -> Mapping[str, int]:
        return {t.name: i for i, t in enumerate(self.tensors)}

    def without(self, lost: Mapping[int, str]) -> Manifest:
        """The same manifest where some files cannot be read."""
        manifest = replace(self, lost=lost)
        manifest.__dict__["encoded"] = self.encoded
        return manifest

    @property
    def fragment_count(self) -> int:
        return sum(len(t.fragments) for t in self.tensors)

    @property
    def bytes_in(self) -> int:
        """Bytes of the tensors as they will be loaded."""
        return sum(t.spec.nbytes for t in self.tensors)

    @cached_property
    def encoded(self) -> bytes:
        """The Arrow IPC file: what `ROOT` is the digest of."""
        return _to_arrow(self)

    @property
    def root(self) -> str:
        return format_root(self.encoded)

    @property
    def bytes_stored(self) -> int:
        """Bytes of the whole store: fragment files, manifest and ROOT."""
        return sum(f.bytes for f in self.files) + len(self.encoded) + len(self.root) + 1


def _to_arrow(manifest: Manifest) -> bytes:
    rows = [
        {
            "name": t.name,
            "dtype": t.spec.dtype,
            "shape": list(t.spec.shape),
            "codec": t.codec,
            "config": json.dumps(t.config, sort_keys=True, separators=(",", ":")),
            "residual": t.residual,
            "essential_gain": t.essential_gain,
            "mandatory": t.mandatory,
            "sha256": t.sha256,
            "fragments": [{f: getattr(entry, f) for f in _FRAGMENT_FIELDS} for entry in t.fragments],
        }
        for t in manifest.tensors
    ]
    header = {
        "format": FORMAT,
        "files": [asdict(f) for f in manifest.files],
        "options": dict(manifest.options),
        "metadata": dict(manifest.metadata),
    }
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    batch = pa.RecordBatch.from_pylist(rows, schema=SCHEMA.with_metadata({_METADATA_KEY: text.encode()}))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    encoded: bytes = sink.getvalue().to_pybytes()
    return encoded


_FRAGMENT_FIELDS: Final = tuple(f.name for f in fields(FragmentEntry))


_MALFORMED: Final = (
    pa.ArrowException,
    ArithmeticError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    TypeError,
    ValueError,
    struct.error,
)


def read_manifest(encoded: bytes) -> Manifest:
    """Parse and check a manifest; every later stage may trust what this returns.

    Raises FormatError (or LimitError) for anything that `Manifest.encoded` would not have written.
    """
    if len(encoded) > MAX_MANIFEST_BYTES:
        raise LimitError(f"a manifest of {len(encoded)} bytes is beyond the limit of {MAX_MANIFEST_BYTES}")
    try:
        header, rows = _parse_arrow(encoded)
        manifest = Manifest(
            tensors=tuple(_tensor_entry(row) for row in rows),
            files=tuple(_file_entry(row) for row in header["files"]),
            options=_object(header["options"]),
            metadata={check_text(str(k)): check_text(str(v)) for k, v in _object(header["metadata"]).items()},
        )
        _check(manifest)
    except HolorayError:
        raise
    except _MALFORMED as error:
        raise FormatError(f"the manifest is malformed: {type(error).__name__}: {error}") from None
    except RecursionError:
        raise FormatError("the manifest nests too deeply") from None
    manifest.__dict__["encoded"] = encoded  # as read: re-encoding could differ in Arrow's padding
    return manifest


def _parse_arrow(encoded: bytes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    with pa.ipc.open_file(pa.py_buffer(encoded)) as reader:
        if reader.num_record_batches != 1 or not reader.schema.equals(SCHEMA, check_metadata=False):
            raise FormatError("the manifest does not have holoray's schema", hint="was it written by a newer version?")
        text = (reader.schema.metadata or {}).get(_METADATA_KEY, b"")
    batch = _read_batch(encoded)
    batch.validate(full=True)  # Arrow trusts offsets of IPC files; unchecked ones crash the process
    header = _object(json.loads(text))
    if header.get("format") != FORMAT:
        raise FormatError(f"store format {header.get('format')!r} is not {FORMAT}", hint="upgrade holoray")
    if any(column.null_count for column in batch.columns):
        raise FormatError("the manifest has null values")
    return header, batch.to_pylist()


def _read_batch(encoded: bytes) -> pa.RecordBatch:
    """The only record batch. Not read through the file reader, which would decompress a body: a bomb of 50 KB."""
    stream = pa.BufferReader(encoded)
    stream.seek(len(b"ARROW1\0\0"))
    pa.ipc.read_message(stream)  # the schema
    message = pa.ipc.read_message(stream)
    if message.type != "record batch" or _is_compressed(memoryview(message.metadata)):
        raise FormatError("the manifest is not one plain Arrow record batch")
    return pa.ipc.read_record_batch(message, SCHEMA)


def _is_compressed(metadata: memoryview) -> bool:
    """Whether a record batch message has the field `compression` (Message.fbs: 2 is `header`, there 3)."""
    (root,) = struct.unpack_from("<I", metadata)
    header = _flatbuffer_field(metadata, root, 2)
    if header is None:
        raise FormatError("the manifest has a record batch without a header")
    (distance,) = struct.unpack_from("<I", metadata, header)
    return _flatbuffer_field(metadata, header + distance, 3) is not None


def _flatbuffer_field(data: memoryview, table: int, number: int) -> int | None:
    """Where a field of a flatbuffer table lies, None if the table does not have it."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    (size,) = struct.unpack_from("<H", data, vtable)
    if 4 + 2 * number >= size:
        return None
    (offset,) = struct.unpack_from("<H", data, vtable + 4 + 2 * number)
    return table + offset if offset else None


def check_storable(spec: TensorSpec) -> None:
    """Raise FormatError for a tensor that neither Arrow nor NumPy could hold."""
    check_text(spec.name)
    # NumPy refuses arrays whose other dimensions overflow even where one of them is 0.
    if math.prod(max(d, 1) for d in spec.shape) * spec.numpy_dtype.itemsize > MAX_TENSOR_BYTES:
        raise LimitError(f"tensor {spec.name!r} has an impossible shape", tensor=spec.name)


def check_text(text: str) -> str:
    """Return text unchanged; raises FormatError for lone surrogates, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise FormatError(f"{text!r} holds half a character") from None
    return text


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError("the manifest holds something else where a JSON object belongs")
    return value


def _tensor_entry(row: Mapping[str, Any]) -> TensorEntry:
    if len(row["config"]) > MAX_CONFIG_BYTES:
        raise LimitError("a codec configuration is absurdly large")
    return TensorEntry(
        spec=TensorSpec(row["name"], row["dtype"], tuple(row["shape"])),
        codec=row["codec"],
        config=_object(json.loads(row["config"])),
        residual=row["residual"],
        essential_gain=row["essential_gain"],
        mandatory=row["mandatory"],
        sha256=row["sha256"],
        fragments=tuple(FragmentEntry(**f) for f in row["fragments"]),
    )


def _file_entry(row: Mapping[str, Any]) -> FileEntry:
    entry = FileEntry(**row)
    if type(entry.number) is not int or type(entry.bytes) is not int or type(entry.framing_sha256) is not str:
        raise FormatError("the manifest's list of files is malformed")
    if not 0 <= entry.number < 1 << 31 or entry.bytes < 0:
        raise LimitError(f"the manifest lists an impossible file {entry.number}")
    return entry


def _check(manifest: Manifest) -> None:
    sizes = {f.number: f.bytes for f in manifest.files}
    if len(sizes) != len(manifest.files):
        raise FormatError("the manifest lists a file twice")
    if len(manifest.by_name) != len(manifest.tensors):
        raise FormatError("the manifest lists a tensor twice")
    for codec, tensor in zip(manifest.codecs, manifest.tensors, strict=True):
        _check_tensor(codec, tensor, sizes)
    _check_energy(manifest.tensors)
    _check_ranges(manifest.tensors)
    _check_order(manifest.tensors)


def _check_energy(tensors: Sequence[TensorEntry]) -> None:
    """Raise FormatError unless every sum of some gains and residuals is finite: whoever keeps books relies on that."""
    try:
        math.fsum(abs(value) for t in tensors for value in _squares(t))
    except OverflowError:
        raise FormatError("the gains of the manifest overflow") from None


def _squares(tensor: TensorEntry) -> Iterator[float]:
    yield tensor.residual
    yield tensor.essential_gain
    for fragment in tensor.fragments:
        yield fragment.gain


def _check_tensor(codec: Codec, tensor: TensorEntry, sizes: Mapping[int, int]) -> None:
    check_storable(tensor.spec)
    if tensor.spec.nbytes > (tensor.stored_bytes + 16) * MAX_EXPANSION:
        raise LimitError(
            f"tensor {tensor.name!r} claims {tensor.spec.nbytes} bytes from {tensor.stored_bytes} stored ones",
            tensor=tensor.name,
        )
    check_entry(codec, tensor)
    if tensor.residual < 0 or not math.isfinite(tensor.energy):  # the sum is finite only if every part is
        raise FormatError(f"tensor {tensor.name!r} has no finite energy", tensor=tensor.name)
    if not 0.0 <= tensor.essential_gain <= (math.inf if codec.carries_essential else 0.0):
        raise FormatError(f"tensor {tensor.name!r} has an impossible essential gain", tensor=tensor.name)
    for fragment in tensor.fragments:
        _check_fragment(codec, tensor, fragment, sizes)


def _check_fragment(codec: Codec, tensor: TensorEntry, fragment: FragmentEntry, sizes: Mapping[int, int]) -> None:
    inside = 0 <= fragment.offset <= sizes.get(fragment.file, -1) - fragment.stored_bytes and fragment.stored_bytes >= 0
    known = fragment.compression in NAMES and (codec.whole_fragment_compression or fragment.compression == NONE)
    same = fragment.compression != NONE or fragment.stored_bytes == fragment.raw_bytes
    if not (inside and known and same):
        raise FormatError(
            f"fragment {fragment.index} of tensor {tensor.name!r} is described impossibly",
            tensor=tensor.name,
            fragment=fragment.index,
        )


def _check_ranges(tensors: Sequence[TensorEntry]) -> None:
    ranges = sorted((f.file, f.offset, f.stored_bytes) for t in tensors for f in t.fragments if f.stored_bytes)
    for (file, offset, length), (next_file, next_offset, _) in pairwise(ranges):
        if file == next_file and offset + length > next_offset:
            raise FormatError(f"fragments of file {file} overlap at byte {next_offset}")


def _check_order(tensors: Sequence[TensorEntry]) -> None:
    places = [f.order for t in tensors for f in t.fragments]
    if sorted(places) != list(range(len(places))):
        raise FormatError("the streaming order is not a permutation of the fragments")
    for tensor in tensors:
        for fragment in tensor.fragments:
            requires = fragment.requires
            if requires != NO_PREREQUISITE and tensor.fragments[requires].order > fragment.order:
                raise FormatError(f"fragment {fragment.index} of {tensor.name!r} streams before its prerequisite")
