"""Our streaming reader and writer against the reference library, and against files that lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from holoray.errors import CapacityError, FormatError, LimitError, SourceError, TruncatedError
from holoray.formats.safetensors import SafetensorsFile, SafetensorsWriter
from holoray.tensor import DTYPES, Array, TensorSpec

NUMPY_DTYPES = [DTYPES[n] for n in ("F64", "F32", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL", "U64")]
ARRAYS = st.sampled_from(NUMPY_DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)
TMP = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@TMP
@given(
    arrays=st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda n: n != "__metadata__"), ARRAYS, max_size=5)
)
def test_reads_what_the_reference_writes(arrays: dict[str, Array], tmp_path: Path) -> None:
    save_file(arrays, tmp_path / "x", {"format": "np"})
    file = SafetensorsFile(tmp_path / "x")
    assert {s.name for s in file.specs} == set(arrays)
    assert file.metadata == {"format": "np"}
    for name, array in arrays.items():
        got = file.read(name)
        assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes())


@TMP
@given(
    arrays=st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda n: n != "__metadata__"), ARRAYS, max_size=5)
)
def test_the_reference_reads_what_we_write(arrays: dict[str, Array], tmp_path: Path) -> None:
    specs = [TensorSpec.of(name, array) for name, array in arrays.items()]
    with SafetensorsWriter(tmp_path / "y", specs, {"a": "b"}) as writer:
        for name in reversed(arrays):  # any order
            writer.write(name, arrays[name])
    got = load_file(tmp_path / "y")
    assert {n: (a.dtype, a.shape, a.tobytes()) for n, a in got.items()} == {
        n: (a.dtype, a.shape, a.tobytes()) for n, a in arrays.items()
    }
    with safe_open(tmp_path / "y", "numpy") as reference:
        assert reference.metadata() == {"a": "b"}


def _file(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def _entry(dtype: str = "F32", shape: Any = (2,), start: Any = 0, end: Any = 8, **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end], **more}


LIES: dict[str, tuple[Any, bytes]] = {
    "a hole before": ({"a": _entry(start=4, end=12)}, bytes(12)),
    "too few bytes for the shape": ({"a": _entry(shape=(3,))}, bytes(8)),
    "overlap": ({"a": _entry(), "b": _entry(start=4, end=12)}, bytes(12)),
    "bytes of nobody": ({"a": _entry()}, bytes(9)),
    "cut short": ({"a": _entry()}, bytes(7)),
    "negative shape": ({"a": _entry(shape=(-2,))}, bytes(8)),
    "shape that overflows u64": ({"a": _entry(shape=(1 << 40, 1 << 40))}, bytes(8)),
    "zero times a lot": ({"a": _entry(shape=(0, 1 << 63), end=0)}, b""),
    "float shape": ({"a": _entry(shape=(2.0,))}, bytes(8)),
    "bool shape": ({"a": _entry(shape=(True,), end=4)}, bytes(4)),
    "unknown dtype": ({"a": _entry("F4", (2,), 0, 1)}, bytes(1)),
    "an extra key": ({"a": _entry(pickle="no")}, bytes(8)),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "not an object": ([1, 2], b""),
    "no JSON": (b"{", b""),
    "no UTF-8": (b'{"\xff": 1}', b""),
    "deep nesting": (b"[" * 100_000, b""),
    "a key twice": (b"{%s,%s}" % ((b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}',) * 2), bytes(8)),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b""),
    "a tensor where metadata belongs": ({"__metadata__": {}, "b": _entry("F4")}, bytes(8)),
    "an empty name": ({"": _entry()}, bytes(8)),
    "a megabyte of a name": ({"x" * (1 << 20): _entry()}, bytes(8)),
}


@pytest.mark.fault("absurd-layout")
@pytest.mark.parametrize("lie", LIES)
def test_lies_are_format_errors(lie: str, tmp_path: Path) -> None:
    header, data = LIES[lie]
    path = _file(tmp_path / "x", header, data)
    with pytest.raises(FormatError):
        SafetensorsFile(path)


@pytest.mark.fault("absurd-layout")
def test_no_tensor_is_larger_than_any_memory() -> None:
    with pytest.raises(LimitError, match="bytes"):
        TensorSpec("a", "F32", (1 << 30, 1 << 30))


@pytest.mark.fault("absurd-layout")
def test_absurd_header_lengths(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for length, error, why in [
        (1 << 63, LimitError, "states a header of"),
        (100_000_001, LimitError, "states a header of"),
        (1000, TruncatedError, "ends inside its header"),
    ]:
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(error, match=why):
            SafetensorsFile(path)
    path.write_bytes(b"\0\0")
    with pytest.raises(TruncatedError):
        SafetensorsFile(path)
    with pytest.raises(SourceError):
        SafetensorsFile(tmp_path / "missing")
    with pytest.raises(SourceError):
        SafetensorsFile(tmp_path)


@pytest.mark.fault("truncated")
def test_every_truncation_is_refused(tmp_path: Path) -> None:
    save_file({"a": np.arange(5, dtype=np.float32), "b": np.zeros((2, 2), np.int8)}, tmp_path / "x")
    whole = (tmp_path / "x").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(FormatError):
            SafetensorsFile(tmp_path / "cut")


@pytest.mark.fault("disk-full")
def test_an_unfinished_write_leaves_the_old_file(tmp_path: Path) -> None:
    spec = TensorSpec("a", "F32", (4,))
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(RuntimeError), SafetensorsWriter(tmp_path / "x", [spec]):
        raise RuntimeError
    assert (tmp_path / "x").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    with pytest.raises(SourceError), SafetensorsWriter(tmp_path / "no" / "x", [spec]):
        pass


@pytest.mark.fault("disk-full")
def test_a_full_disk_is_a_capacity_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", no_room)
    with pytest.raises(CapacityError), SafetensorsWriter(tmp_path / "x", [TensorSpec("a", "F32", (4,))]):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_reference_refuses_the_same_holes(tmp_path: Path) -> None:
    """Not our code: a check that these lies are lies to the reference implementation as well."""
    for lie in ("a hole before", "overlap", "bytes of nobody", "cut short"):
        with pytest.raises(SafetensorError):
            safe_open(_file(tmp_path / "x", *LIES[lie]), "numpy")


def test_no_tensor_is_called_like_the_metadata() -> None:
    with pytest.raises(FormatError, match="metadata"):
        TensorSpec("__metadata__", "F32", (2,))
