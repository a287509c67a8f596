"""Checkpoints as users have them: one file, a directory, shards with an index, arrays in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from holoray.checkpoint import open_checkpoint, save_checkpoint
from holoray.errors import FormatError, SourceError
from holoray.tensor import Array

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.arange(4, dtype=np.int64)


def _names(source: Any) -> list[str]:
    return [spec.name for spec in open_checkpoint(source).specs]


def _sharded(directory: Path, weight_map: Any) -> Path:
    save_file({"a": A}, directory / "one.safetensors")
    save_file({"b": B}, directory / "two.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_a_file_a_directory_and_shards_read_the_same(tmp_path: Path) -> None:
    index = _sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    for source in (tmp_path, index):
        checkpoint = open_checkpoint(source)
        np.testing.assert_array_equal(checkpoint.read("a"), A)
        np.testing.assert_array_equal(checkpoint.read("b"), B)
    index.unlink()
    assert sorted(_names(tmp_path)) == ["a", "b"]
    assert _names(tmp_path / "two.safetensors") == ["b"]


@pytest.mark.fault("hostile-name")
@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "", ".", "..", "sub/x.safetensors", "a\0b"])
def test_shards_never_leave_the_directory(file: str, tmp_path: Path) -> None:
    index = _sharded(tmp_path, {"a": file})
    with pytest.raises(FormatError, match="plain file name"):
        open_checkpoint(index)


@pytest.mark.fault("malformed")
@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000, '{"weight_map": ["a"]}'])
def test_malformed_indexes(text: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(FormatError):
        open_checkpoint(index)


@pytest.mark.fault("missing")
def test_incomplete_downloads_are_named(tmp_path: Path) -> None:
    index = _sharded(tmp_path, {"a": "one.safetensors", "c": "two.safetensors"})
    with pytest.raises(FormatError, match="'c'"):
        open_checkpoint(index)
    _sharded(tmp_path, {"a": "gone.safetensors"})
    with pytest.raises(SourceError, match="gone"):
        open_checkpoint(index)
    with pytest.raises(SourceError):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"no \.safetensors"):
        open_checkpoint(tmp_path / "empty")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "one.safetensors")
    save_file({"a": A}, tmp_path / "two.safetensors")
    with pytest.raises(FormatError, match="two shards"):
        open_checkpoint(tmp_path)


@pytest.mark.fault("odd-tensor")
@pytest.mark.parametrize(
    "array",
    [
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.arange(12, dtype=">f4"),
        np.arange(24.0)[::2],
        np.float16(3.5).reshape(()),
        np.zeros((0, 3), np.int8),
        np.arange(7).astype(ml_dtypes.bfloat16),
        np.arange(7).astype(ml_dtypes.float8_e4m3fn),
        np.array([True, False]),
    ],
    ids=lambda a: f"{a.dtype}{a.shape}",
)
def test_arrays_in_memory_become_canonical_and_survive_a_file(array: Array, tmp_path: Path) -> None:
    read = open_checkpoint({"x": array}).read("x")
    assert read.flags.c_contiguous
    assert read.dtype.newbyteorder("=") == array.dtype.newbyteorder("=")
    assert read.tobytes() == np.ascontiguousarray(array).astype(read.dtype).tobytes()
    save_checkpoint(tmp_path / "x.safetensors", {"x": array})
    again = open_checkpoint(tmp_path / "x.safetensors").read("x")
    assert (again.dtype, again.shape, again.tobytes()) == (read.dtype, array.shape, read.tobytes())


@pytest.mark.fault("odd-tensor")
@pytest.mark.parametrize("array", [np.array(["a"]), np.array([object()]), np.zeros(2, "M8[s]"), np.zeros(2, "c16")])
def test_dtypes_without_a_name_are_refused(array: Array) -> None:
    with pytest.raises(FormatError, match="cannot be stored"):
        open_checkpoint({"x": array})


def test_identity_changes_with_the_file(tmp_path: Path) -> None:
    import os

    path = tmp_path / "x.safetensors"
    save_file({"a": A}, path)
    before = open_checkpoint(path).identity()
    assert before == open_checkpoint(path).identity()
    os.utime(path, ns=(1, 1))
    assert open_checkpoint(path).identity() != before
