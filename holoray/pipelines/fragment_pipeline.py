"""A fragment's way through one process, a stage a line:

store -> fetch -> verify -> decompress -> accumulate -> finalize -> hand over

One thread carries a batch the whole way. Reading waits, so there are more threads than cores; decoding does not, so a
few scratch memories are handed round: having one is the permission to decode. One byte budget bounds what is in
flight.

With a device a thread has a stream of its own for the batch, and waits for it before it calls a unit done: whoever
reads a tensor then sees what all streams wrote. Copies and kernels of one thread run while others fetch and decompress.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Final, Protocol

from holoray.errors import CapacityError, FormatError, HolorayError, IntegrityError
from holoray.fragment import FragmentEntry
from holoray.integrity import check as check_integrity
from holoray.kernels.accumulator import Accumulator
from holoray.kernels.device import Device
from holoray.kernels.scratch import Scratch
from holoray.manifest import Manifest
from holoray.pipelines.budget import ByteBudget
from holoray.pipelines.fetch import fetch
from holoray.pipelines.frame_groups import FrameOpener, Member, NamedError, groups
from holoray.pipelines.meter import Laps, Meter, Tally
from holoray.pipelines.plan import Unit, batches
from holoray.pipelines.source_pool import SourcePool
from holoray.pipelines.turns import Turns
from holoray.stores.base import Store

# Handing a batch to a thread costs some 0.1 ms; a small model still needs a few batches a thread.
MAX_BATCH_BYTES: Final = 8 << 20
MIN_BATCH_BYTES: Final = 256 << 10
_BATCHES_PER_THREAD: Final = 2
BUDGET_BYTES: Final = 64 << 20
_READERS: Final = 1
_DEVICE_WAITERS: Final = 2
"""With a device, threads beyond the cores: those that wait for their stream."""

OnUnit = Callable[[Unit], None]


class Destination(Protocol):
    """Where weights go: opened when a tensor's first unit arrives, closed when its last planned one is in."""

    def open(self, tensor: int) -> Accumulator: ...

    def close(self, tensor: int) -> None: ...


class FragmentPipeline:
    """Carries units of one sealed store to their destination.

    `strict` checks sha256 besides xxh3_64; `finalize=False` leaves tensors as accumulated. Errors stop the run: the
    first one is raised once all threads are idle. With `skip_corrupted` a damaged fragment is no error: units go on
    without it, and without what requires it. `device`: where the destination's accumulators work, if not on the host;
    with `opens_frames` zstd frames are opened there where accumulators take that. `cores`: how many are to be kept busy
    (default: all).
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        *,
        strict: bool = False,
        cores: int | None = None,
        budget_bytes: int = BUDGET_BYTES,
        meter: Meter | None = None,
        finalize: bool = True,
        skip_corrupted: bool = False,
        device: Device | None = None,
        opens_frames: bool = False,
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._strict = strict
        self._finalize = finalize
        self._skip_corrupted = skip_corrupted
        self._device = device
        self._opener = FrameOpener(device) if device is not None and opens_frames else None
        self.threads = (cores or len(os.sched_getaffinity(0))) + (0 if device is None else _DEVICE_WAITERS)
        self.budget = ByteBudget(budget_bytes)
        self.meter = meter or Meter()
        self._scratches: queue.LifoQueue[Scratch] = queue.LifoQueue()
        for _ in range(self.threads):
            self._scratches.put(Scratch())

    def run(
        self, work: Sequence[Unit], destination: Destination, on_unit: OnUnit | None = None, *, width: int | None = None
    ) -> None:
        """Bring every unit to its destination; `on_unit` is called after each, from the thread that carried it.

        At most `width` threads accumulate at a time, and fewer when memory runs out there.
        """
        turns = Turns(width or self.threads)
        tensors = _OpenTensors(destination, Counter(unit.tensor for unit in work), self._finalize, turns)
        with ThreadPoolExecutor(self.threads + _READERS, thread_name_prefix="holoray") as pool:
            cut = batches(work, self._batch_bytes(work))
            futures = [pool.submit(self._carry, batch, tensors, on_unit) for batch in cut]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # after an error, or an interrupt while waiting: what has not begun never will
                pool.shutdown(wait=True, cancel_futures=True)
            if isinstance(self._store, SourcePool):
                self.meter.add(Tally(sources=self._store.take_counts()))
        try:
            for future in done:
                future.result()
        except MemoryError as error:
            raise CapacityError("not enough memory to decode", hint="close other programs, or load less") from error

    def _batch_bytes(self, work: Sequence[Unit]) -> int:
        share = sum(unit.stored_bytes for unit in work) // (_BATCHES_PER_THREAD * self.threads)
        return min(max(share, MIN_BATCH_BYTES), MAX_BATCH_BYTES)

    def _carry(self, batch: Sequence[Unit], tensors: _OpenTensors, on_unit: OnUnit | None) -> None:
        tally, done = Tally(), 0
        laps = Laps(tally)
        opened = [tensors.open(unit.tensor) for unit in batch]
        landings = [to.landing(fragment) for to, unit in zip(opened, batch, strict=True) for fragment in unit.fragments]
        try:
            with (
                self._fetched(batch, landings, tally, laps) as payloads,
                self._scratch() as scratch,
                self._stream(),
            ):
                laps.start()
                for group in groups(_members(batch, opened, payloads), on_device=self._opener is not None):
                    added: list[Member] = []
                    try:
                        self._add(group, added, scratch, tensors.turns, tally, laps)
                    finally:  # of a group that failed some may be in: what is there is counted
                        for member in added:
                            done += 1
                            with self._range("finalize"):
                                tensors.done(member.unit.tensor)
                            laps.lap("finalize")
                            if on_unit is not None and member.unit.fragments:
                                on_unit(member.unit)
                                laps.start()
        except BaseException:
            for unit, accumulator in zip(batch[done:], opened[done:], strict=True):
                accumulator.discard(unit.slot)
            raise
        finally:
            self.meter.add(tally)

    @contextmanager
    def _fetched(
        self, batch: Sequence[Unit], landings: Sequence[memoryview | None], tally: Tally, laps: Laps
    ) -> Iterator[Sequence[memoryview | None]]:
        """The payloads of a batch, every one of which is what the manifest says; None for one that is skipped."""
        members = [(unit, fragment) for unit in batch for fragment in unit.fragments]
        entries = [fragment for _, fragment in members]
        buffered = sum(e.stored_bytes for e, landing in zip(entries, landings, strict=True) if landing is None)

        def check(member: int, payload: memoryview) -> IntegrityError | None:
            laps.lap("fetch")
            unit, fragment = members[member]
            name = self._manifest.tensors[unit.tensor].name
            try:
                with self._range("verify"):
                    check_integrity(name, fragment, payload, strict=self._strict, source=self._store.uri)
            except IntegrityError as error:
                tally.count("corrupt", 1, fragment.stored_bytes)
                return error
            finally:
                laps.lap("verify")
            return None

        with self.budget.borrow(buffered) as buffer:
            laps.start()
            with self._range("fetch"):
                views, wrong = fetch(self._store, entries, landings, buffer, check)
            if wrong and not self._skip_corrupted:
                raise wrong[min(wrong)]
            yield [None if member in wrong else view for member, view in enumerate(views)]

    def _add(
        self, group: Sequence[Member], added: list[Member], scratch: Scratch, turns: Turns, tally: Tally, laps: Laps
    ) -> None:
        """Accumulate a group, whose members go to `added` as soon as they are in."""
        if self._opener is not None and self._opener.takes(group[0]):
            try:
                with self._range("decompress"):
                    self._opener.add(group, added, turns)
            except NamedError as error:
                with self._located(error.member.unit, tally):
                    raise error.fault from None
            finally:
                for member in added:
                    _count(tally, member)
                laps.lap("accumulate")
            return
        for member in group:
            if member.unit.fragments:
                self._decode(member, scratch, turns, tally, laps)
            else:
                member.accumulator.discard(member.unit.slot)
            added.append(member)

    def _decode(self, member: Member, scratch: Scratch, turns: Turns, tally: Tally, laps: Laps) -> None:
        unit, accumulator = member.unit, member.accumulator
        with self._located(unit, tally):
            with self._range("decompress"):
                raw = accumulator.decompress(unit.fragments, member.payloads, scratch)
            laps.lap("decompress")
            with self._range("accumulate"):
                turns.take(lambda: self._accumulate(accumulator, unit.slot, raw, scratch))
            laps.lap("accumulate")
        _count(tally, member)

    def _accumulate(self, accumulator: Accumulator, slot: int, raw: Any, scratch: Scratch) -> None:
        accumulator.accumulate(slot, raw, scratch)
        if self._device is not None:
            self._device.synchronize()

    @contextmanager
    def _located(self, unit: Unit, tally: Tally) -> Iterator[None]:
        """Count a unit that turns out to be bad, and say in the error where it lies."""
        try:
            yield
        except HolorayError as error:
            if not isinstance(error, CapacityError):
                tally.count("corrupt", len(unit.fragments), unit.stored_bytes)
            raise _located(error, self._manifest.tensors[unit.tensor].name, unit, self._store.uri) from error

    def _stream(self) -> AbstractContextManager[None]:
        return nullcontext() if self._device is None else self._device.stream()

    def _range(self, stage: str) -> AbstractContextManager[None]:
        return nullcontext() if self._device is None else self._device.range(stage)

    @contextmanager
    def _scratch(self) -> Iterator[Scratch]:
        """Blocks until fewer threads decode than there are cores."""
        scratch = self._scratches.get()
        try:
            yield scratch
        finally:
            self._scratches.put(scratch)


class _OpenTensors:
    """Accumulators of the tensors under way, and how many units each still waits for."""

    def __init__(self, destination: Destination, units: Counter[int], finalize: bool, turns: Turns) -> None:
        self.turns = turns
        self._destination = destination
        self._remaining = units
        self._finalize = finalize
        self._accumulators: dict[int, Accumulator] = {}
        self._lock = threading.Lock()

    def open(self, tensor: int) -> Accumulator:
        with self._lock:
            if tensor not in self._accumulators:
                self._accumulators[tensor] = self._destination.open(tensor)
            return self._accumulators[tensor]

    def done(self, tensor: int) -> None:
        with self._lock:
            self._remaining[tensor] -= 1
            if self._remaining[tensor]:
                return
            accumulator = self._accumulators.pop(tensor)
        if self._finalize:
            self.turns.take(accumulator.finalize)
        self._destination.close(tensor)


def _count(tally: Tally, member: Member) -> None:
    tally.count("applied", len(member.unit.fragments), member.unit.stored_bytes)
    tally.decoded_bytes += member.accumulator.slot_nbytes(member.unit.slot)


def _members(
    batch: Sequence[Unit], accumulators: Sequence[Accumulator], payloads: Sequence[memoryview | None]
) -> Iterator[Member]:
    for unit, accumulator in zip(batch, accumulators, strict=True):
        own, payloads = payloads[: len(unit.fragments)], payloads[len(unit.fragments) :]
        yield Member(*_intact(unit, own), accumulator)


def _intact(unit: Unit, payloads: Sequence[memoryview | None]) -> tuple[Unit, list[memoryview]]:
    """The unit without the fragments that have no payload, and without those that require one of them."""
    kept: list[FragmentEntry] = []
    found: list[memoryview] = []
    gone: set[int] = set()
    for fragment, payload in zip(unit.fragments, payloads, strict=True):  # in the order of their layers
        if payload is None or fragment.requires in gone:
            gone.add(fragment.index)
        else:
            kept.append(fragment)
            found.append(payload)
    return (replace(unit, fragments=tuple(kept)) if gone else unit), found


def _located(error: HolorayError, tensor: str, unit: Unit, source: str) -> HolorayError:
    """The error with the place where it happened, where it does not say so itself."""
    if isinstance(error, FormatError) and not isinstance(error, IntegrityError):
        # The digest matched, so whoever sealed the store wrote this.
        error.hint = error.hint or "the store was sealed with a malformed fragment: encode it again"
    error.tensor = error.tensor or tensor
    error.fragment = error.fragment if error.fragment is not None else unit.fragments[0].index
    error.source = error.source or source
    return error
