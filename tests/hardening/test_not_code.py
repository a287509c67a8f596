"""Bytes of a source that would be code for somebody else are only bytes here."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from manifest_mutations import read_rows, reseal
from small_store import blobs, store_of

import holoray
from holoray.errors import FormatError, HolorayError, SourceError
from holoray.formats.safetensors import SafetensorsFile
from holoray.manifest import SCHEMA
from holoray.stores import MANIFEST, ROOT


class _Crime:
    """Pickled, it makes a file when somebody loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def _payload(scene: Path) -> bytes:
    data = pickle.dumps(_Crime(scene))
    pickle.loads(data)  # noqa: S301 - that it is one
    assert scene.exists()
    scene.unlink()
    return data


@pytest.mark.fault("code")
def test_a_pickle_in_the_place_of_any_file_is_refused(tmp_path: Path) -> None:
    scene = tmp_path / "scene"
    payload = _payload(scene)
    for name in blobs():
        with pytest.raises(HolorayError):
            holoray.open(store_of(blobs() | {name: payload})).load()
    with pytest.raises(HolorayError):
        holoray.open(store_of(reseal(blobs() | {MANIFEST: payload})))
    for name in ("model.safetensors", "model.pt", "pytorch_model.bin", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes(payload)
        with pytest.raises((FormatError, SourceError)):
            holoray.encode(tmp_path / name, holoray.MemoryStore())
    assert not scene.exists()


@pytest.mark.fault("code")
def test_an_extension_type_of_arrow_is_not_unpickled(tmp_path: Path) -> None:
    scene = tmp_path / "scene"
    forged = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": _payload(scene)}
    header, rows = read_rows(blobs()[MANIFEST])
    name = pa.field("name", pa.string(), nullable=False, metadata=forged)
    schema = SCHEMA.set(SCHEMA.get_field_index("name"), name).with_metadata({b"holoray": json.dumps(header).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
    store = store_of(reseal(blobs() | {MANIFEST: sink.getvalue().to_pybytes()}))
    assert holoray.open(store).load().keys() == holoray.open(store_of(blobs())).load().keys()
    assert not scene.exists()


@pytest.mark.fault("code")
def test_arrays_of_objects_are_refused() -> None:
    store = holoray.MemoryStore()
    with pytest.raises(FormatError):
        holoray.encode({"a": np.array([_Crime(Path("scene"))], dtype=object)}, store)
    assert ROOT not in store.blobs


@pytest.mark.fault("code")
def test_a_checkpoint_of_python_objects_is_no_checkpoint(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(FormatError):
        SafetensorsFile(tmp_path / "x.npy")
