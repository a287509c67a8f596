"""What the fuzzer calls: each takes any bytes, and raises only where something is wrong.

The readers may refuse bytes by an error of ours. What they accept must hold: a manifest is read back as it is written,
a safetensors file is one to the reference implementation too, and a tensor has its dtype and shape.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Final

import ml_dtypes
import numpy as np
import pyarrow as pa
import safetensors

import holoray
from holoray.compression import NONE
from holoray.errors import HolorayError
from holoray.formats.safetensors import SafetensorsFile
from holoray.fragment import Fragment, TensorEntry
from holoray.integrity import Digests
from holoray.manifest import Manifest, read_manifest
from holoray.stores import MANIFEST

CODECS: Final = ("planes", "raw", "spectral", "projection", "lowrank")


@cache
def honest_rows() -> pa.RecordBatch:
    store = holoray.MemoryStore()
    holoray.encode({"a": np.ones((2, 3), np.float32), "b": np.zeros(0, np.int8)}, store)
    return pa.ipc.open_file(pa.py_buffer(store.blobs[MANIFEST])).get_batch(0)


def with_header(text: bytes) -> bytes:
    """A manifest of honest rows under another header."""
    batch = honest_rows().replace_schema_metadata({b"holoray": text})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    encoded: bytes = sink.getvalue().to_pybytes()
    return encoded


def manifest(data: bytes) -> None:
    """The reader of manifests: what it takes, it writes and reads back as the same.

    Bytes that begin with a brace are only the JSON in it: a fuzzer hardly keeps Arrow's lengths in step.
    """
    try:
        found = read_manifest(with_header(data) if data.startswith(b"{") else data)
    except HolorayError:
        return
    again = Manifest(found.tensors, found.files, found.options, found.metadata)
    if read_manifest(again.encoded) != found:
        raise AssertionError("not what was read")


def safetensors_file(data: bytes) -> None:
    """The reader of safetensors: what it takes, the reference takes, with the same tensors and bytes.

    Bytes that begin with a brace are a header without its length, up to the last closing brace, and data.
    """
    if data.startswith(b"{"):
        data = (data.rfind(b"}") + 1).to_bytes(8, "little") + data
    memory = os.memfd_create("fuzz")
    try:
        os.pwrite(memory, data, 0)
        try:
            file = SafetensorsFile(f"/proc/self/fd/{memory}")
        except HolorayError:
            return
        mine = {spec.name: (spec.dtype, list(spec.shape), file.read(spec.name).tobytes()) for spec in file.specs}
        file.close()
    finally:
        os.close(memory)
    tensors = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    reference = {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in tensors}
    if mine != reference:
        raise AssertionError("not what the reference reads")


@cache
def encoded(codec: str) -> tuple[TensorEntry, list[Fragment]]:
    """A small tensor; `planes` in bfloat16, the others in float32."""
    random = np.random.default_rng(5)
    array = (0.1 * random.standard_normal((24, 20))).astype(ml_dtypes.bfloat16 if codec == "planes" else np.float32)
    if codec == "raw":
        array = np.round(array)  # compresses well, so that there is a frame to damage
    return holoray.encode_tensor(array, codec=codec, fragments=3, essential=0.1 if codec == "lowrank" else 0.0)


def fragments(data: bytes) -> None:
    """The decoders: byte 0 chooses a codec, byte 1 a fragment, the rest is its payload, under digests that agree."""
    if len(data) < 2:
        return
    entry, own = encoded(CODECS[data[0] % len(CODECS)])
    index, payload = data[1] % len(own), data[2:]
    digests, known = Digests.of(payload), entry.fragments[data[1] % len(own)]
    forged = replace(known, stored_bytes=len(payload), xxh3_64=digests.xxh3_64, sha256=digests.sha256)
    if known.compression == NONE:
        forged = replace(forged, raw_bytes=len(payload))
    members = tuple(forged if f.index == index else f for f in entry.fragments)
    try:
        decoder = holoray.TensorDecoder(replace(entry, fragments=members))
        for fragment in own:
            decoder.add(replace(fragment, payload=payload) if fragment.index == index else fragment)
        out = decoder.reconstruct()
    except HolorayError:
        return
    if (out.dtype, out.shape) != (entry.spec.numpy_dtype, entry.spec.shape):
        raise AssertionError("not the tensor that the entry describes")


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "manifest": manifest,
    "safetensors": safetensors_file,
    "fragments": fragments,
}
