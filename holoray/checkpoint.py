"""Checkpoints: what encode takes in. Tensors are read one at a time, so a checkpoint may be larger than memory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Protocol

from holoray.errors import FormatError, LimitError, SourceError
from holoray.formats.quantised import quantisation_metadata
from holoray.formats.safetensors import SafetensorsFile, SafetensorsWriter
from holoray.tensor import Array, TensorSpec, canonical

INDEX: Final = "model.safetensors.index.json"
_MAX_INDEX_BYTES: Final = 100_000_000


class Checkpoint(Protocol):
    """Tensors with names, in a fixed order."""

    specs: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]

    def read(self, name: str) -> Array:
        """One tensor, little-endian and C-contiguous; the caller does not write to it."""
        ...

    def identity(self) -> str:
        """A text that changes when the files behind it change (empty: cannot tell); guards resumed encodes."""
        ...


def open_checkpoint(source: str | os.PathLike[str] | Mapping[str, Array]) -> Checkpoint:
    """A safetensors file, a directory of them (sharded by `model.safetensors.index.json` or not), or a dict."""
    if isinstance(source, Mapping):
        return DictCheckpoint(source)
    path = Path(source)
    if path.is_dir():
        return ShardedCheckpoint(_shards_of(path))
    if path.name.endswith(".index.json"):
        return ShardedCheckpoint(_indexed_shards(path))
    return ShardedCheckpoint({path: None})


class DictCheckpoint:
    """Arrays in memory."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = dict(arrays)
        self.specs = tuple(TensorSpec.of(name, array) for name, array in self._arrays.items())
        self.metadata: Mapping[str, str] = {}

    def read(self, name: str) -> Array:
        return canonical(self._arrays[name])

    def identity(self) -> str:
        return ""


class ShardedCheckpoint:
    """One or several safetensors files; `shards` maps each to the names it must hold (None: whatever it holds).

    The metadata of a quantised checkpoint says how it is packed, from the configuration beside the files.
    """

    def __init__(self, shards: Mapping[Path, set[str] | None]) -> None:
        self._files = {path: SafetensorsFile(path) for path in shards}
        self._home: dict[str, SafetensorsFile] = {}
        specs: list[TensorSpec] = []
        metadata: dict[str, str] = {}
        for path, file in self._files.items():
            self._check_names(path, file, shards[path])
            metadata |= file.metadata
            for spec in file.specs:
                if spec.name in self._home:
                    raise FormatError(f"tensor {spec.name!r} is in two shards", tensor=spec.name)
                self._home[spec.name] = file
                specs.append(spec)
        self.specs = tuple(specs)
        directory = next(iter(self._files)).parent
        self.metadata: Mapping[str, str] = quantisation_metadata(directory, self._home) | metadata

    def read(self, name: str) -> Array:
        return self._home[name].read(name)

    def identity(self) -> str:
        stats = ((path, path.stat()) for path in self._files)
        return json.dumps([[str(path.absolute()), s.st_size, s.st_mtime_ns] for path, s in stats])

    @staticmethod
    def _check_names(path: Path, file: SafetensorsFile, expected: set[str] | None) -> None:
        missing = (expected or set()) - {spec.name for spec in file.specs}
        if missing:
            raise FormatError(f"{path} lacks tensor {min(missing)!r}", hint="is the download complete?")


def _shards_of(directory: Path) -> dict[Path, set[str] | None]:
    if (directory / INDEX).exists():
        return _indexed_shards(directory / INDEX)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise SourceError(f"{directory} holds no .safetensors file", hint="point to a safetensors checkpoint")
    return dict.fromkeys(files)


def _indexed_shards(index: Path) -> dict[Path, set[str] | None]:
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise LimitError(f"{index} is absurdly large")
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        items = [(str(name), str(file)) for name, file in weight_map.items()]
    except OSError as error:
        raise SourceError(f"{index}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise FormatError(f"{index} is no safetensors index") from None
    shards: dict[Path, set[str] | None] = {}
    for name, file in items:
        # A file name from inside a file must never lead out of its directory.
        if file != os.path.basename(file) or file in ("", ".", "..") or "\0" in file:
            raise FormatError(f"{index} names the shard {file!r}, which is no plain file name", tensor=name)
        names = shards.setdefault(index.parent / file, set())
        assert names is not None
        names.add(name)
    return shards


def save_checkpoint(
    path: str | os.PathLike[str], arrays: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays as one safetensors file (whole or not at all)."""
    specs = [TensorSpec.of(name, array) for name, array in arrays.items()]
    with SafetensorsWriter(path, specs, metadata) as writer:
        for name, array in arrays.items():
            writer.write(name, canonical(array))
