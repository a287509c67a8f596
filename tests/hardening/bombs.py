"""Small inputs that ask for much memory or time: what becomes of each, and how far the memory of a process grows.

    python tests/hardening/bombs.py --build DIR      writes one store for each bomb (this takes memory)
    python tests/hardening/bombs.py --measure DIR    prints a JSON object {name: {outcomes, grown_mib, seconds}}

Built by one process and measured in another, so that what building takes hides nothing.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import zstandard
from manifest_mutations import Row, read_rows, reseal, write_rows
from small_store import Blobs, blobs, pristine

import holoray
from holoray.errors import HolorayError
from holoray.integrity import Digests
from holoray.manifest import MAX_MANIFEST_BYTES, SCHEMA
from holoray.pipelines.api import load_file
from holoray.stores import MANIFEST, ROOT, LocalStore, Store, fragment_file

GIB = 1 << 30
BIG = 1 << 27
_SHIFTS = "AAAA" * (1024 * 2 // 3) + "AAA="
"""Of a spectral tensor with the greatest number of groups."""
_ESSENTIAL = 1 << 20
BOMBS: dict[str, Callable[[], Blobs]] = {}
"""What builds the files of a store."""
SPARSE = {"manifest_file_beyond_the_limit": (MANIFEST, MAX_MANIFEST_BYTES + 1), "root_file_of_a_gibibyte": (ROOT, GIB)}
"""Stores of which a file is extended with a hole."""


def bomb(build: Callable[[], Blobs]) -> Callable[[], Blobs]:
    BOMBS[build.__name__] = build
    return build


def _zeros(compressor: Any, nbytes: int) -> bytes:
    """`nbytes` zeros through a streaming compressor, so that nobody holds them."""
    piece = bytes(1 << 20)
    pieces: list[bytes] = [compressor.compress(piece) for _ in range(nbytes >> 20)]
    return b"".join([*pieces, compressor.flush()])


def _with_payload(tensor: str, payload: bytes, **values: Any) -> Blobs:
    """A store whose fragment 0 of a tensor has another payload, with digests that agree, at the end of its file."""
    files = blobs()
    header, rows = read_rows(files[MANIFEST])
    fragment = _row(rows, tensor)["fragments"][0]
    name, digests = fragment_file(fragment["file"]), Digests.of(payload)
    fragment |= {"offset": len(files[name]), "stored_bytes": len(payload)}
    fragment |= {"xxh3_64": digests.xxh3_64, "sha256": digests.sha256} | values
    files[name] += payload
    _file(header, fragment["file"])["bytes"] = len(files[name])
    return _sealed(files, header, rows)


def _sealed(files: Blobs, header: Row, rows: list[Row]) -> Blobs:
    return reseal(files | {MANIFEST: write_rows(header, rows)})


def _row(rows: list[Row], tensor: str) -> Row:
    return next(row for row in rows if row["name"] == tensor)


def _file(header: Row, number: int) -> Row:
    found: Row = next(file for file in header["files"] if file["number"] == number)
    return found


@bomb
def zstd_states_too_much() -> Blobs:
    payload = _zeros(zstandard.ZstdCompressor().compressobj(size=BIG), BIG)
    return _with_payload("layer.raw", payload, compression="zstd")


@bomb
def zstd_does_not_state_its_size() -> Blobs:
    return _with_payload("layer.raw", _zeros(zstandard.ZstdCompressor().compressobj(), BIG), compression="zstd")


@bomb
def zstd_frame_behind_an_honest_one() -> Blobs:
    honest = zstandard.ZstdCompressor().compress(bytes(90 * 46 * 2))
    payload = honest + _zeros(zstandard.ZstdCompressor().compressobj(size=BIG), BIG)
    return _with_payload("layer.raw", payload, compression="zstd")


@bomb
def zstd_window_of_two_gibibytes() -> Blobs:
    size = 90 * 46 * 2
    # Magic, descriptor (2 bytes of content size, no single segment), window 2^(10 + 21), content size - 256, RLE block.
    frame = bytes.fromhex("28b52ffd") + bytes([0b0100_0000, 21 << 3]) + (size - 256).to_bytes(2, "little")
    frame += (1 | 1 << 1 | size << 3).to_bytes(3, "little") + b"\0"
    return _with_payload("layer.raw", frame, compression="zstd")


@bomb
def lz4_holds_too_much() -> Blobs:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "lz4") as stream:
        for _ in range(BIG >> 20):
            stream.write(bytes(1 << 20))
    return _with_payload("layer.raw", sink.getvalue().to_pybytes(), compression="lz4")


@bomb
def zstd_bomb_in_a_section_of_planes() -> Blobs:
    """The first section of a layer, stored as a zstd frame that states too much."""
    files = blobs()
    fragment = _row(read_rows(files[MANIFEST])[1], "layer.planes")["fragments"][0]
    body = files[fragment_file(fragment["file"])][fragment["offset"] : fragment["offset"] + fragment["stored_bytes"]]
    plane = int.from_bytes(body[4:8], "little")
    frame = _zeros(zstandard.ZstdCompressor().compressobj(size=BIG), BIG)[: plane & 0x3FFFFFFF]
    changed = len(frame).to_bytes(4, "little") + (2 << 30 | plane).to_bytes(4, "little") + body[8:]
    head = len(body) - sum(int.from_bytes(body[i : i + 4], "little") for i in range(0, _directory_bytes(body), 8))
    payload = changed[:head] + frame + changed[head + (plane & 0x3FFFFFFF) :]
    return _with_payload("layer.planes", payload, raw_bytes=len(payload))


def _directory_bytes(body: bytes) -> int:
    """Length of the directory of layer 0 of the small store's planes: its sections are all there is in the body."""
    config = json.loads(_row(read_rows(blobs()[MANIFEST])[1], "layer.planes")["config"])
    return 8 * (int(config["top"]) + 1 + 1 + 2)


def _lying(tensor: str, shape: tuple[int, int], nbytes: int, **config: Any) -> Blobs:
    """Manifest and frame agree on a size of which 20 KB are there, and those are garbage."""
    payload = bytes.fromhex("28b52ffd") + bytes([0b1110_0000]) + nbytes.to_bytes(8, "little") + b"\xff" * 20_000
    files = _with_payload(tensor, payload, raw_bytes=nbytes, compression="zstd")
    header, rows = read_rows(files[MANIFEST])
    row = _row(rows, tensor)
    row |= {"shape": list(shape), "fragments": row["fragments"][:1]}
    row["config"] = json.dumps(json.loads(row["config"]) | {"fragments": 1} | config)
    for order, fragment in enumerate(f for r in rows for f in r["fragments"]):
        fragment["order"] = order
    return _sealed(files, header, rows)


@bomb
def frame_that_lies_about_a_gibibyte() -> Blobs:
    """The tensor is allocated, but never touched."""
    return _lying(
        "layer.spectral", (1 << 14, 1 << 14), (4 << 28) + 8 * _ESSENTIAL, shifts=_SHIFTS, essential=_ESSENTIAL
    )


@bomb
def rank_of_eight_thousand() -> Blobs:
    """The terms, larger than the tensor itself, are allocated and never touched."""
    return _lying("layer.lowrank", (1 << 13, 1 << 13), 4 << 27, rank=1 << 13, essential=1 << 12)


@bomb
def rank_beyond_the_matrix() -> Blobs:
    return _lying("layer.lowrank", (1 << 13, 1 << 13), 4 << 28, rank=1 << 14, essential=0)


@bomb
def more_essential_coefficients_than_there_are() -> Blobs:
    return _lying("layer.spectral", (1 << 14, 1 << 14), 12 << 28, shifts=_SHIFTS, essential=1 << 60)


@bomb
def lowrank_tensor_of_terabytes() -> Blobs:
    files = _huge_claim("layer.lowrank", [1 << 20, 1 << 20], 1 << 40, raw_bytes=1 << 40)
    header, rows = read_rows(files[MANIFEST])
    row = _row(rows, "layer.lowrank")
    row["config"] = json.dumps(json.loads(row["config"]) | {"rank": 1 << 20})
    return _sealed(files, header, rows)


@bomb
def expansion_beyond_any_compression() -> Blobs:
    """Eight TiB from 20 KB."""
    return _lying("layer.spectral", (1 << 21, 1 << 20), 4 << 41, shifts=_SHIFTS, essential=0)


@bomb
def stored_bytes_of_an_exbibyte() -> Blobs:
    files = blobs()
    header, rows = read_rows(files[MANIFEST])
    fragment = _row(rows, "layer.raw")["fragments"][0]
    _file(header, fragment["file"])["bytes"] = 1 << 62
    fragment |= {"stored_bytes": 1 << 60, "offset": 1 << 60}
    return _sealed(files, header, rows)


def _huge_claim(tensor: str, shape: list[int], nbytes: int, **values: Any) -> Blobs:
    """A shape of terabytes and fragments of `nbytes`, in files that are said to be large enough."""
    files = blobs()
    header, rows = read_rows(files[MANIFEST])
    row = _row(rows, tensor)
    row["shape"] = shape
    for position, fragment in enumerate(row["fragments"]):
        _file(header, fragment["file"])["bytes"] = 1 << 62
        fragment |= {"stored_bytes": nbytes, "offset": (position + 1) << 51} | values
    return _sealed(files, header, rows)


@bomb
def raw_tensor_of_terabytes() -> Blobs:
    return _huge_claim("layer.raw", [1 << 43], 1 << 40, raw_bytes=1 << 20)


@bomb
def planes_tensor_of_gigabytes() -> Blobs:
    """Its fragments are said to be the first layer of the first six of 2^18 runs."""
    files = _huge_claim("layer.planes", [1 << 18, 1 << 19], 1 << 20, raw_bytes=1 << 20, layer=0, requires=-1)
    header, rows = read_rows(files[MANIFEST])
    for slot, fragment in enumerate(_row(rows, "layer.planes")["fragments"]):
        fragment["slot"] = slot
    return _sealed(files, header, rows)


@bomb
def spectral_tensor_of_terabytes() -> Blobs:
    files = _huge_claim("layer.spectral", [1 << 18, 1 << 18], 1 << 40)
    header, rows = read_rows(files[MANIFEST])
    row = _row(rows, "layer.spectral")
    row["config"] = json.dumps(json.loads(row["config"]) | {"shifts": _SHIFTS})
    return _sealed(files, header, rows)


@bomb
def empty_tensor_of_yobibytes() -> Blobs:
    """No elements, but other dimensions that no array can have."""
    files = blobs()
    header, rows = read_rows(files[MANIFEST])
    _row(rows, "layer.empty")["shape"] = [1 << 40, 0, 1 << 40]
    return _sealed(files, header, rows)


@bomb
def rank_of_a_hundred_thousand() -> Blobs:
    files = blobs()
    header, rows = read_rows(files[MANIFEST])
    _row(rows, "layer.scale")["shape"] = [1] * 100_000
    return _sealed(files, header, rows)


def _config(text: str) -> Blobs:
    files = blobs()
    header, rows = read_rows(files[MANIFEST])
    _row(rows, "layer.raw")["config"] = text
    return _sealed(files, header, rows)


@bomb
def config_nests_a_million_objects() -> Blobs:
    return _config('{"a":' * 1_000_000 + "1" + "}" * 1_000_000)


@bomb
def config_nests_a_million_lists() -> Blobs:
    return _config("[" * 1_000_000)


@bomb
def config_number_of_a_million_digits() -> Blobs:
    return _config('{"seed":' + "9" * 1_000_000 + "}")


@bomb
def header_nests_a_million_lists() -> Blobs:
    files = blobs()
    _, rows = read_rows(files[MANIFEST])
    manifest = write_rows(b'{"options":' + b"[" * 1_000_000, rows)
    return reseal(files | {MANIFEST: manifest})


@bomb
def name_of_a_mebibyte() -> Blobs:
    files = blobs()
    header, rows = read_rows(files[MANIFEST])
    rows[0]["name"] = "n" * (1 << 20)
    return _sealed(files, header, rows)


@bomb
def manifest_compressed_by_arrow() -> Blobs:
    """50 KB that Arrow's file reader inflates thousands of times before anyone may look at it."""
    files = blobs()
    header, rows = read_rows(files[MANIFEST])
    rows[0]["config"] = " " * BIG
    schema = SCHEMA.with_metadata({b"holoray": json.dumps(header).encode()})
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
    return reseal(files | {MANIFEST: sink.getvalue().to_pybytes()})


def outcomes(store: Store, directory: Path) -> dict[str, str]:
    """What open, verify, load and load to a file come to: `ok` or the name of a holoray error."""
    verbs: dict[str, Callable[[], Any]] = {
        "open": lambda: holoray.open(store),
        "curve": lambda: holoray.open(store).quality_curve(),
        "verify": lambda: holoray.open(store).verify(),
        "load": lambda: holoray.open(store).load(),
        "file": lambda: load_file(holoray.open(store), directory / "out.safetensors"),
    }
    return {name: _outcome(verb) for name, verb in verbs.items()}


def _outcome(verb: Callable[[], Any]) -> str:
    try:
        verb()
    except HolorayError as error:
        return type(error).__name__
    return "ok"


def _status_mib(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def build(directory: Path) -> None:
    for name, files in BOMBS.items():
        _write(directory / name, files())
    for name, (blob, nbytes) in SPARSE.items():
        _write(directory / name, blobs())
        with open(directory / name / blob, "r+b") as file:
            file.truncate(nbytes)


def _write(directory: Path, files: Blobs) -> None:
    directory.mkdir()
    for name, data in files.items():
        (directory / name).write_bytes(data)


def measure(directory: Path) -> Row:
    """Outcomes, growth and time of one bomb."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    Path("/proc/self/clear_refs").write_text("5")  # from now on VmHWM is the peak since here
    before, start = _status_mib("VmRSS"), time.perf_counter()
    found = outcomes(LocalStore(directory), directory)
    grown, seconds = _status_mib("VmHWM") - before, time.perf_counter() - start
    return {"outcomes": found, "grown_mib": round(grown, 1), "seconds": round(seconds, 2)}


def main(verb: str, directory: Path) -> None:
    if verb == "--build":
        build(directory)
    else:
        pristine()  # what every process has: modules, compiled kernels, a first load
        print(json.dumps({name: measure(directory / name) for name in (*BOMBS, *SPARSE)}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
