"""Semantic mutations of a sealed store: what its manifest says, and payloads whose digests agree with it again."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from small_store import Blobs

from holoray.integrity import Digests, format_root
from holoray.manifest import SCHEMA
from holoray.stores import MANIFEST, ROOT, fragment_file
from holoray.tensor import DTYPES

Row = dict[str, Any]
MutateBytes = Callable[[random.Random, bytes, bytes], bytes]

_KEY = b"holoray"
_I64 = (0, 1, -1, 2, 7, 255, 4095, 4096, 1 << 16, 1 << 19, (1 << 31) - 1, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63))
_I32 = tuple(n for n in _I64 if -(1 << 31) <= n < 1 << 31)
_F64 = (0.0, -0.0, 1.0, -1.0, 1e-320, 1e308, -1e308, 1.7e308, float("inf"), float("-inf"), float("nan"))
_TEXT = (
    "",
    "layer.bias",
    "../../etc/passwd",
    "\0",
    "a\nb",
    "\x1b[2J",
    "\u202e",
    "x" * 5000,
    "planes",
    "raw",
    "none",
    "zstd",
)


def reseal(files: Blobs) -> Blobs:
    """The files with a `ROOT` that fits the manifest."""
    return files | {ROOT: format_root(files[MANIFEST]).encode() + b"\n"}


def read_rows(manifest: bytes) -> tuple[Row, list[Row]]:
    """Header and rows, as plain values."""
    table = pa.ipc.open_file(pa.py_buffer(manifest)).read_all()
    return json.loads(table.schema.metadata[_KEY]), table.to_pylist()


def write_rows(header: Any, rows: list[Row]) -> bytes:
    """A manifest that says whatever the rows say."""
    schema = SCHEMA.with_metadata({_KEY: header if isinstance(header, bytes) else json.dumps(header).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
    encoded: bytes = sink.getvalue().to_pybytes()
    return encoded


@dataclass
class Draft:
    """A store under mutation; `mutate_bytes` is what payloads are changed with."""

    header: Row
    rows: list[Row]
    files: Blobs
    mutate_bytes: MutateBytes


def mutate_manifest(random_: random.Random, files: Blobs, mutate_bytes: MutateBytes) -> Blobs:
    """One to three semantic mutations, sealed again.

    Where Arrow does not take a value, or a mutation stumbles over what an earlier one left, others are tried.
    """
    while True:
        draft = Draft(*read_rows(files[MANIFEST]), dict(files), mutate_bytes)
        try:
            for _ in range(random_.choice((1, 1, 1, 2, 3))):
                if draft.rows:
                    random_.choice(MUTATIONS)(random_, draft)
            manifest = write_rows(draft.header, draft.rows)
        except (pa.ArrowException, OverflowError, ValueError, TypeError, RecursionError):
            continue
        return reseal(draft.files | {MANIFEST: manifest})


def _tensor_value(random_: random.Random, draft: Draft) -> None:
    row, other = random_.choice(draft.rows), random_.choice(draft.rows)
    column = random_.choice(
        ("name", "dtype", "codec", "residual", "essential_gain", "mandatory", "sha256", "shape", "config")
    )
    row[column] = {
        "name": random_.choice((*_TEXT, other["name"])),
        "dtype": random_.choice((*DTYPES, "F4", "")),
        "codec": random_.choice(("raw", "planes", "spectral", "projection", "lowrank", "")),
        "residual": random_.choice(_F64),
        "essential_gain": random_.choice(_F64),
        "mandatory": not row["mandatory"],
        "sha256": random_.randbytes(32),
        "shape": other["shape"],
        "config": other["config"],
    }[column]


def _shape(random_: random.Random, draft: Draft) -> None:
    shape = random_.choice(draft.rows)["shape"]
    how = random_.randrange(5)
    if how == 0:
        shape.append(random_.choice((*_I64, 1, 1)))
    elif how == 1:
        shape.extend([1] * random_.choice((1, 30, 70)))
    elif shape and how == 2:
        shape[random_.randrange(len(shape))] = random_.choice(_I64)
    elif shape and how == 3:
        shape[random_.randrange(len(shape))] += random_.choice((-1, 1))
    elif shape:
        shape.reverse()


def _config(random_: random.Random, draft: Draft) -> None:
    row = random_.choice(draft.rows)
    config = json.loads(row["config"])
    how = random_.randrange(4)
    if how < 2 and config:
        key = random_.choice(list(config))
        values: tuple[Any, ...] = (*_I64, config[key], 1.5, True, None, "", "AAAA", [], {}, 1 << 70, -2, 3, 16, 127)
        config[key] = random_.choice(values)
        if isinstance(config[key], int) and random_.random() < 0.3:
            config[key] += random_.choice((-1, 1))
    elif how == 2:
        config[random_.choice(_TEXT)] = random_.choice(_I64)
    text = json.dumps(config)
    if how == 3:
        text = random_.choice((text[:-1], "[" * 100_000, '{"a":' * 50_000, "NaN", "null", "1" * 5000, text + " ", "{}"))
    row["config"] = text


def _fragment_value(random_: random.Random, draft: Draft) -> None:
    fragments = random_.choice(draft.rows)["fragments"]
    if not fragments:
        return
    row, other = random_.choice(fragments), random_.choice(random_.choice(draft.rows)["fragments"] or fragments)
    column = random_.choice(list(row))
    value: Any = random_.choice(_I64)
    if column in ("index", "layer", "slot", "requires", "file", "order"):
        value = random_.choice((*_I32, row[column] + 1, row[column] - 1))
    elif column in ("stored_bytes", "raw_bytes", "offset"):
        value = random_.choice((*_I64, row[column] + 1, row[column] - 1, row[column] + 4))
    elif column == "gain":
        value = random_.choice((*_F64, -row["gain"], row["gain"] * 1e9))
    elif column == "compression":
        value = random_.choice(("none", "zstd", "lz4", "brotli", ""))
    elif column == "xxh3_64":
        value = random_.choice((0, 1, (1 << 64) - 1, random_.getrandbits(64)))
    elif column == "sha256":
        value = random_.randbytes(32)
    row[column] = other[column] if random_.random() < 0.25 else value


def _point_elsewhere(random_: random.Random, draft: Draft) -> None:
    """A fragment takes place and digests of another: a replay that the root vouches for."""
    first, second = (random_.choice(random_.choice(draft.rows)["fragments"] or [{}]) for _ in range(2))
    if first and second:
        columns = ["file", "offset", "stored_bytes", "xxh3_64", "sha256", "compression"]
        if random_.random() < 0.5:
            columns.append("raw_bytes")
        for column in columns:
            first[column], second[column] = second[column], first[column]


def _fragment_rows(random_: random.Random, draft: Draft) -> None:
    fragments = random_.choice(draft.rows)["fragments"]
    how = random_.randrange(4)
    if fragments and how == 0:
        del fragments[random_.randrange(len(fragments))]
    elif fragments and how == 1:
        fragments.append(dict(random_.choice(fragments)))
    elif how == 2:
        random_.shuffle(fragments)
    elif fragments:
        fragments.extend([dict(fragments[-1])] * random_.choice((1, 1000)))


def _tensor_rows(random_: random.Random, draft: Draft) -> None:
    how = random_.randrange(3)
    if how == 0:
        del draft.rows[random_.randrange(len(draft.rows))]
    elif how == 1:
        draft.rows.append(dict(random_.choice(draft.rows)))
    else:
        random_.shuffle(draft.rows)


def _orders(random_: random.Random, draft: Draft) -> None:
    """Swap two places of the streaming order, or renumber all that are left."""
    fragments = [f for row in draft.rows for f in row["fragments"]]
    if len(fragments) > 1:
        first, second = random_.sample(fragments, 2)
        first["order"], second["order"] = second["order"], first["order"]
    if random_.random() < 0.5:
        for order, fragment in enumerate(sorted(fragments, key=lambda f: int(f["order"]))):
            fragment["order"] = order


def _files(random_: random.Random, draft: Draft) -> None:
    files = draft.header.get("files")
    if not isinstance(files, list) or not files:
        return
    how = random_.randrange(6)
    if how == 0:
        del files[random_.randrange(len(files))]
    elif how == 1:
        files.append(dict(random_.choice(files)))
    elif how == 2:
        random_.choice(files)["number"] = random_.choice((*_I64, "0", None, 1.0, True))
    elif how == 3:
        random_.choice(files)["bytes"] = random_.choice((*_I64, 1 << 70, "0", None, 1e9, True))
    elif how == 4:
        random_.choice(files)["framing_sha256"] = random_.choice(("", "0" * 64, None, 5, "\ud800"))
    else:
        random_.choice(files)[random_.choice(_TEXT)] = 1


def _header(random_: random.Random, draft: Draft) -> None:
    key = random_.choice(("format", "files", "options", "metadata", "other"))
    values: tuple[Any, ...] = (
        0,
        2,
        -1,
        None,
        [],
        {},
        "x",
        True,
        {"a": 1},
        {"a": "\ud800"},
        {"\ud800": "b"},
        [[]],
        {"x": float("nan")},
    )
    if random_.random() < 0.2:
        draft.header.pop(key, None)
    else:
        draft.header[key] = random_.choice(values)


def _gains(random_: random.Random, draft: Draft) -> None:
    """Gains that are finite one by one and overflow together."""
    for row in draft.rows:
        for fragment in row["fragments"]:
            fragment["gain"] = random_.choice((1e308, -1e308, 1e308, 0.0))


def _payload(random_: random.Random, draft: Draft) -> None:
    """Another payload in the place of a fragment, its lengths and digests made to agree: decoders must refuse it."""
    fragments = [f for row in draft.rows for f in row["fragments"] if fragment_file(f["file"]) in draft.files]
    if not fragments:
        return
    fragment, other = random_.choice(fragments), random_.choice(fragments)
    name = fragment_file(fragment["file"])
    old = draft.files[name][fragment["offset"] : fragment["offset"] + fragment["stored_bytes"]]
    spliced = draft.files[fragment_file(other["file"])][other["offset"] : other["offset"] + other["stored_bytes"]]
    new = spliced if random_.random() < 0.1 else draft.mutate_bytes(random_, old, spliced)
    if random_.random() < 0.5:
        new = (new + bytes(len(old)))[: len(old)]  # of the old length: most layouts ask for it
    if len(new) == len(old):
        draft.files[name] = (
            draft.files[name][: fragment["offset"]] + new + draft.files[name][fragment["offset"] + len(old) :]
        )
    else:  # appended: the others stay where they are
        fragment["offset"] = len(draft.files[name])
        draft.files[name] += new
        _set_size(draft, fragment["file"], len(draft.files[name]))
    if fragment["compression"] == "none":
        fragment["raw_bytes"] = len(new)
    digests = Digests.of(new)
    fragment |= {"stored_bytes": len(new), "xxh3_64": digests.xxh3_64, "sha256": digests.sha256}


def _set_size(draft: Draft, number: int, nbytes: int) -> None:
    files = draft.header.get("files")
    for file in files if isinstance(files, list) else []:
        if isinstance(file, dict) and file.get("number") == number:
            file["bytes"] = nbytes


MUTATIONS: tuple[Callable[[random.Random, Draft], None], ...] = (
    *[_payload] * 5, *[_fragment_value] * 3, *[_tensor_value] * 2, *[_config] * 2, *[_shape] * 2,
    _point_elsewhere, _fragment_rows, _tensor_rows, _orders, _files, _header, _gains,
)  # fmt: skip
