"""Writing a store: one fragment file a layer, in segments that are journalled, sealed at the end.

A segment is a stretch of about 2 GiB of tensors. When it is written, its files are closed and synced and a journal
(a manifest of just that segment) is added: an interrupted encode goes on after the last journalled segment. The final
manifest joins the journals; `ROOT` is written last and makes the store one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Final

from holoray.errors import HolorayError
from holoray.fragment import FragmentEntry, TensorEntry
from holoray.kernels.encoder import EncodedFragment
from holoray.manifest import MAX_MANIFEST_BYTES, FileEntry, Manifest, read_manifest
from holoray.pipelines.plan import with_streaming_order
from holoray.stores import MANIFEST, ROOT, ShareTarget, Store, fragment_file, is_journal, is_own, journal_file
from holoray.stores.base import GROUPS, LEAD_GROUP, MANDATORY_GROUP
from holoray.stores.fragment_writer import FragmentFileWriter
from holoray.tensor import TensorSpec

SEGMENT_BYTES = 2 << 30
_IDENTITY: Final = "holoray.checkpoint"


@dataclass(slots=True)
class _Pending:
    """A tensor under way: where its fragments went is known by (file, position) until the segment is closed."""

    places: list[tuple[int, int]] = field(default_factory=list)
    entry: TensorEntry | None = None


class StoreWriter:
    """Appends encoded tensors to a store; a context manager (an error closes what is open and leaves the journals)."""

    def __init__(self, store: Store, options: Mapping[str, Any], metadata: Mapping[str, str], identity: str) -> None:
        self._store = store
        self._shares = store.shares if isinstance(store, ShareTarget) else None
        if self._shares is not None:
            options = {**options, "shares": self._shares.get_config()}
        self._split = 0  # fragments so far, in this segment, of the layer that is split
        self._options = dict(options)
        self._metadata = dict(metadata)
        self._identity = identity
        self._tensors: dict[str, TensorEntry] = {}
        self._files: list[FileEntry] = []
        self._segment = 0
        self._open = ExitStack()
        self._writers: dict[int, FragmentFileWriter] = {}
        self._pending: list[_Pending] = [_Pending()]
        self._segment_bytes = 0

    def resume(self) -> frozenset[str]:
        """Names of the tensors that journals of the same encode hold; everything else in the store goes."""
        journals = self._read_journals()
        for manifest in journals:
            self._tensors |= {t.name: t for t in manifest.tensors}
            self._files.extend(manifest.files)
        self._segment = len(journals)
        keep = {fragment_file(f.number) for f in self._files} | {journal_file(i) for i in range(self._segment)}
        for name in list(self._store.names()):
            if name not in keep and is_own(name):
                self._store.delete(name)
        return frozenset(self._tensors)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._close_segment()
        else:
            self._open.__exit__(kind, error, at)

    def append(self, fragment: EncodedFragment, spec: TensorSpec, *, mandatory: bool) -> None:
        """Add a fragment of the tensor under way; `finish` ends the tensor."""
        group = MANDATORY_GROUP if mandatory else self._group(fragment.layer)
        number = self._segment * GROUPS + group
        if number not in self._writers:
            self._writers[number] = self._open.enter_context(FragmentFileWriter(self._store, number))
        position = self._writers[number].append(spec.name, fragment.index, fragment.payload)
        self._pending[-1].places.append((number, position))

    def _group(self, layer: int) -> int:
        """One file a layer; with shares, a part of one layer goes to a file of its own that is coded like the first."""
        if self._shares is None or layer != self._shares.lead_layer:
            return 1 + layer
        self._split += 1
        return LEAD_GROUP if self._shares.leads(self._split - 1) else 1 + layer

    def finish(self, entry: TensorEntry) -> None:
        """End the tensor under way: `entry.fragments` are in the order of the `append` calls."""
        self._pending[-1].entry = entry
        self._pending.append(_Pending())
        self._segment_bytes += entry.spec.nbytes
        if self._segment_bytes >= SEGMENT_BYTES:
            self._close_segment()

    def seal(self, names: Sequence[str]) -> Manifest:
        """Write the manifest of these tensors, in this order, then `ROOT`; the journals go."""
        tensors = with_streaming_order([self._tensors[name] for name in names])
        manifest = Manifest(tensors, tuple(sorted(self._files, key=lambda f: f.number)), self._options, self._metadata)
        read_manifest(manifest.encoded)  # what this version cannot read back must not be sealed
        self._write(MANIFEST, manifest.encoded)
        self._write(ROOT, manifest.root.encode() + b"\n")
        for name in list(self._store.names()):
            if is_journal(name):
                self._store.delete(name)
        return manifest

    def _close_segment(self) -> None:
        self._open.close()
        closed = [w.entry for w in self._writers.values() if w.entry is not None]
        tensors = [_located(p, self._writers) for p in self._pending[:-1]]
        if tensors and self._identity:
            metadata = {_IDENTITY: self._identity}
            journal = Manifest(with_streaming_order(tensors), tuple(closed), self._options, metadata)
            self._write(journal_file(self._segment), journal.encoded)
        self._segment += 1
        self._tensors |= {t.name: t for t in tensors}
        self._files.extend(closed)
        self._open, self._writers, self._pending = ExitStack(), {}, [_Pending()]
        self._segment_bytes = self._split = 0

    def _read_journals(self) -> list[Manifest]:
        """The journals from the first on, as long as they belong to this encode and their files are whole."""
        journals: list[Manifest] = []
        present = set(self._store.names())
        while self._identity and journal_file(len(journals)) in present:
            try:
                manifest = read_manifest(self._store.read(journal_file(len(journals)), MAX_MANIFEST_BYTES))
                whole = all(self._store.size(fragment_file(f.number)) == f.bytes for f in manifest.files)
            except HolorayError:
                break
            if not whole or manifest.metadata.get(_IDENTITY) != self._identity or manifest.options != self._options:
                break
            journals.append(manifest)
        return journals

    def _write(self, name: str, data: bytes) -> None:
        with self._store.create(name) as file:
            file.write(data)


def _located(pending: _Pending, writers: Mapping[int, FragmentFileWriter]) -> TensorEntry:
    entry = pending.entry
    assert entry is not None
    located: list[FragmentEntry] = [
        replace(fragment, file=number, offset=writers[number].offsets[position])
        for fragment, (number, position) in zip(entry.fragments, pending.places, strict=True)
    ]
    return replace(entry, fragments=tuple(sorted(located, key=lambda f: f.index)))
