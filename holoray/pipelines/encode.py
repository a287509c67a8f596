"""Encode: a checkpoint into a store, with all cores, bounded memory, and a journal to resume from.

One thread reads tensors in order, a pool casts, digests and measures them and encodes their parts, the caller's thread
writes the fragments in order: the store does not depend on the number of threads.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Final

from holoray.checkpoint import Checkpoint, open_checkpoint
from holoray.errors import UsageError
from holoray.formats.quantised import find_quantisation
from holoray.fragment import FragmentEntry
from holoray.integrity import Digests
from holoray.kernels.encoder import EncodedFragment, Encoder
from holoray.manifest import Manifest, check_storable, check_text
from holoray.pipelines.entries import fragment_entry, tensor_entry
from holoray.pipelines.notes import encode_notes
from holoray.pipelines.policy import EncodePolicy, is_mandatory
from holoray.pipelines.store_writer import StoreWriter
from holoray.pipelines.tensor_codec import begin_encoding
from holoray.stores import ROOT, ShareTarget, Store, open_store
from holoray.stores.shares import folder_index
from holoray.tensor import Array, TensorSpec, as_bytes

IN_FLIGHT_BYTES: Final = 384 << 20
OnTensor = Callable[[str, int], None]
"""Called with name and bytes (before a cast) of each tensor that is in the store, in order."""


@dataclass(frozen=True, slots=True)
class EncodeReport:
    """What an encode did; `bytes_in` counts the tensors as encoded (after a cast), `bytes_stored` what they take in all
    places, `notes` is what to know about it.
    """

    root: str
    tensors: int
    fragments: int
    bytes_in: int
    bytes_stored: int
    seconds: float
    notes: tuple[str, ...] = ()


def encode(
    checkpoint: str | os.PathLike[str] | Mapping[str, Array],
    where: Store | str | os.PathLike[str],
    policy: EncodePolicy | None = None,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    on_tensor: OnTensor | None = None,
) -> EncodeReport:
    """Encode a checkpoint (file, sharded directory, or dict of arrays) into a new store.

    An interrupted encode of the same input resumes where it stopped. Raises UsageError if the store is already sealed
    (unless `overwrite`) or is being written by somebody else, CapacityError if the disk is full.
    """
    start = time.perf_counter()
    policy = policy or EncodePolicy()
    source, store = open_checkpoint(checkpoint), open_store(where)
    with store.exclusive():
        if any(folder_index(name) >= 0 for name in store.folders()):
            raise UsageError(f"{store.uri} holds shares of a store", hint="choose another path, or encode to shares")
        if store.exists(ROOT) and not overwrite:
            raise UsageError(f"{store.uri} already holds a store", hint="choose another path, or pass --overwrite")
        with store.replacement() if store.exists(ROOT) else nullcontext(store) as target:
            manifest = _encode(source, target, policy, threads or len(os.sched_getaffinity(0)), on_tensor)
    seconds = time.perf_counter() - start
    return EncodeReport(
        root=manifest.root,
        tensors=len(manifest.tensors),
        fragments=manifest.fragment_count,
        bytes_in=manifest.bytes_in,
        bytes_stored=store.bytes_stored if isinstance(store, ShareTarget) else manifest.bytes_stored,
        seconds=seconds,
        notes=encode_notes(manifest, policy),
    )


def _encode(
    source: Checkpoint, store: Store, policy: EncodePolicy, threads: int, on_tensor: OnTensor | None
) -> Manifest:
    notify = on_tensor or (lambda name, nbytes: None)
    for spec in source.specs:
        check_storable(spec)
    for text in (*source.metadata, *source.metadata.values()):
        check_text(text)
    writer = StoreWriter(store, policy.get_config(), source.metadata, source.identity())
    done = writer.resume()
    for spec in source.specs:
        if spec.name in done:
            notify(spec.name, spec.nbytes)
    todo = [spec.name for spec in source.specs if spec.name not in done]
    with writer, _Preparation(source, todo, policy, threads) as preparation:
        for tensor in preparation:
            entries: list[FragmentEntry] = []
            for part in tensor.parts:
                for fragment, digests in part.result():
                    entries.append(fragment_entry(fragment, digests))
                    writer.append(fragment, tensor.encoder.spec, mandatory=tensor.mandatory)
            entry = tensor_entry(tensor.encoder, entries, sha256=tensor.sha256.result(), mandatory=tensor.mandatory)
            writer.finish(entry)
            preparation.release(tensor)
            notify(entry.name, tensor.nbytes)
    return writer.seal([spec.name for spec in source.specs])


_Part = list[tuple[EncodedFragment, Digests]]


@dataclass(slots=True)
class _Prepared:
    """A tensor in memory whose parts are being encoded."""

    encoder: Encoder
    mandatory: bool
    nbytes: int
    sha256: Future[bytes]
    parts: list[Future[_Part]]


class _Preparation:
    """Iterates over prepared tensors in order; reads ahead as far as `IN_FLIGHT_BYTES` allow (one tensor always)."""

    def __init__(self, source: Checkpoint, names: Sequence[str], policy: EncodePolicy, threads: int) -> None:
        self._source = source
        self._names = names
        self._policy = policy
        self._quantised = find_quantisation(source.specs, source.metadata).tensors
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="holoray-encode")
        self._ready: queue.SimpleQueue[Future[_Prepared] | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._prepare_all, name="holoray-prepare", daemon=True)
        self._changed = threading.Condition()
        self._in_flight_bytes = 0
        self._stopped = False

    def __enter__(self) -> _Preparation:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[_Prepared]:
        for _ in self._names:
            tensor = self._ready.get()
            if isinstance(tensor, BaseException):
                raise tensor
            yield tensor.result()

    def release(self, tensor: _Prepared) -> None:
        """The tensor is written: its memory may be used for another."""
        with self._changed:
            self._in_flight_bytes -= tensor.nbytes
            self._changed.notify_all()

    def _prepare_all(self) -> None:
        specs = {spec.name: spec for spec in self._source.specs}
        try:
            for name in self._names:
                if not self._admit(specs[name].nbytes):
                    return
                array = self._source.read(name)
                self._ready.put(self._pool.submit(self._prepare, specs[name], array))
        except BaseException as error:
            self._ready.put(error)

    def _admit(self, nbytes: int) -> bool:
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or not self._in_flight_bytes or self._in_flight_bytes + nbytes <= IN_FLIGHT_BYTES
            )
            self._in_flight_bytes += nbytes
            return not self._stopped

    def _prepare(self, source_spec: TensorSpec, array: Array) -> _Prepared:
        name = source_spec.name
        whole = name in self._quantised  # a scale is a part of integers: rounded or in part it would spoil them all
        array = array if whole else self._policy.cast(name, array)
        spec = TensorSpec.of(name, array)
        codec = self._policy.codec_of(name)
        mandatory = whole or is_mandatory(spec, array, codec)
        sha256 = self._pool.submit(lambda: hashlib.sha256(as_bytes(array).data).digest())
        encoder = begin_encoding("raw" if mandatory else codec, spec, array, self._policy.options)
        parts = [self._pool.submit(_encode_part, encoder, part) for part in range(encoder.parts)]
        return _Prepared(encoder, mandatory, source_spec.nbytes, sha256, parts)


def _encode_part(encoder: Encoder, part: int) -> _Part:
    return [(fragment, Digests.of(fragment.payload)) for fragment in encoder.encode(part)]
