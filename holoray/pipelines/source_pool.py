"""Several sources of one store as one store: the I/O around `SpanRequest` and `SourceBook`, which decide everything.

With one source a read is made by the thread that wants it, straight into place. With several, each request has a
thread and memory of its own, since nobody can stop a read that somebody else has outrun.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final, TypeVar

from holoray.errors import HolorayError, IntegrityError, LimitError, SourceError, UsageError
from holoray.pipelines.answers import ask_each
from holoray.pipelines.budget import ByteBudget
from holoray.pipelines.fault_policy import FaultPolicy
from holoray.pipelines.source_book import SourceBook
from holoray.pipelines.span_request import Fetch, SpanRequest
from holoray.stores.base import ROOT, Check, Span, Store
from holoray.stores.read_only import ReadOnlyStore

T = TypeVar("T")
_GRACE_S: Final = 2.0  # for a blob as a whole; then another source is asked too
_BLOB_BYTES: Final = 16 << 20  # what a blob of unknown size is reckoned as: the manifest of a model of 10 B weights

_COUNTS: Final = (
    "requests", "received_bytes", "errors", "retries", "hedges", "hedged_bytes", "mismatches", "trips", "quarantined",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SourceStats:
    """What one source did so far. `state`: healthy, suspect, waiting, open or quarantined; rate in bytes a second."""

    source: str
    state: str
    priority: int
    requests: int
    received_bytes: int
    bytes_per_s: float | None
    errors: int
    retries: int
    hedges: int
    hedged_bytes: int
    mismatches: int
    trips: int
    quarantined: int
    last_error: str | None


@dataclass(frozen=True, slots=True)
class _Answer:
    """What came of a fetch: its memory (none where it was read straight into place) is held until `release`."""

    fetch: Fetch
    at: float
    received: int
    error: Exception | None
    memory: memoryview | None
    release: Callable[[], None]


class SourcePool(ReadOnlyStore):
    """Copies of one sealed store, read as if they were one; it cannot be written.

    `root` is the root that all of them have. The decisions are those of `policy`; `clock` and `rng` are for tests.
    A pool travels by pickle, and what it has learnt stays behind.
    """

    write_hint = "encode to one place, and copy that"

    def __init__(
        self,
        sources: Sequence[tuple[Store, int]],
        policy: FaultPolicy | None = None,
        *,
        root: str,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        if not sources:
            raise UsageError("a pool needs at least one source")
        self.policy = policy or FaultPolicy()
        self.root = root
        self._stores = [store for store, _ in sources]
        self._priorities = [priority for _, priority in sources]
        more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
        self.uri = self._stores[0].uri + more
        # Which of several sources tells the truth, only sha256 can say.
        self.remote = len(sources) > 1 or self._stores[0].remote
        self.in_process = any(store.in_process for store in self._stores)
        self._clock = clock
        named = list(zip(_distinct([store.uri for store in self._stores]), self._priorities, strict=True))
        self._book = SourceBook(named, self.policy, rng or random.Random())
        self._memory = ByteBudget(2 * self.policy.budget_bytes)  # the book keeps to its budget: this one never blocks
        self._changed = threading.Condition()
        self._reported: Counter[tuple[str, str]] = Counter()

    def __reduce__(self) -> tuple[object, ...]:
        sources = list(zip(self._stores, self._priorities, strict=True))
        return _unpickled, (sources, self.policy, self.root)

    def note_absent(self, store: Store, error: Exception) -> None:
        """A source did not answer when the pool was opened: it is asked last, and now and then."""
        with self._changed:
            self._book.note_absent(self._clock(), self._stores.index(store), error)

    def stats(self) -> list[SourceStats]:
        """What each source did so far, and how it is."""
        with self._changed:
            now = self._clock()
            return [
                SourceStats(
                    source=source.name,
                    state=self._book.state(source, now),
                    priority=source.priority,
                    bytes_per_s=1 / source.slowness if source.slowness else None,
                    last_error=str(source.last_error) if source.last_error is not None else None,
                    **{name: source.counts[name] for name in _COUNTS},
                )
                for source in self._book.sources
            ]

    def take_counts(self) -> Counter[tuple[str, str]]:
        """What was counted since the last call, by (source, count)."""
        with self._changed:
            now = Counter({(s.name, name): n for s in self._book.sources for name, n in s.counts.items()})
            fresh = now - self._reported
            self._reported = now
            return fresh

    # -- fragments -----------------------------------------------------------------------------------------

    def read_spans(self, spans: Sequence[Span], check: Check) -> dict[int, IntegrityError]:
        wrong = {p.member: e for s in spans if not s.out.nbytes for p in s.parts if (e := check(p.member, s.out))}
        wanted = [span for span in spans if span.out.nbytes]
        answers: deque[_Answer] = deque()
        with self._changed:
            request = SpanRequest(self._book, wanted, self._clock(), _names_of(wanted))
        try:
            while (fetch := self._next(request, answers)) is not None:
                if isinstance(fetch, Fetch):
                    self._start(request, wanted[fetch.span], fetch, answers)
                while answers:
                    self._land(request, wanted, answers.popleft(), check)
        finally:
            with self._changed:
                request.close()
                for answer in answers:
                    self._drop(request, answer)
                self._changed.notify_all()
        return wrong | request.corrupt

    def _next(self, request: SpanRequest, answers: deque[_Answer]) -> Fetch | bool | None:
        """What to fetch next; True once there are answers; None when all is settled."""
        with self._changed:
            while not answers:
                action = request.next(self._clock())
                if not isinstance(action, float):
                    return action
                wait = action - self._clock()
                if wait > 0:
                    self._changed.wait(min(wait, threading.TIMEOUT_MAX))
        return True

    def _start(self, request: SpanRequest, span: Span, fetch: Fetch, answers: deque[_Answer]) -> None:
        if len(self._stores) == 1:
            answers.append(self._read(span, fetch, span.out[fetch.start : fetch.stop], None))
        else:
            # A thread pool would have to be waited for at the end of the program: a stalled read may take a minute.
            run = (request, span, fetch, answers)
            threading.Thread(target=self._attempt, args=run, name="holoray-source", daemon=True).start()

    def _attempt(self, request: SpanRequest, span: Span, fetch: Fetch, answers: deque[_Answer]) -> None:
        memory = ExitStack()
        buffer = memory.enter_context(self._memory.borrow(fetch.attempt.nbytes))
        answer = self._read(span, fetch, buffer, memory)
        with self._changed:
            if request.waits_for(fetch):
                answers.append(answer)
            else:
                self._drop(request, answer)
            self._changed.notify_all()

    def _read(self, span: Span, fetch: Fetch, out: memoryview, memory: ExitStack | None) -> _Answer:
        store = self._stores[fetch.attempt.source]
        error: Exception | None = None
        try:
            received = store.read_into(span.name, span.offset + fetch.start, out)
        except SourceError as broken:
            error, received = broken, min(broken.received, out.nbytes)
        except Exception as raised:  # whoever waits raises it
            error, received = raised, 0
        release = memory.close if memory is not None else _nothing
        return _Answer(fetch, self._clock(), received, error, out if memory is not None else None, release)

    def _land(self, request: SpanRequest, spans: Sequence[Span], answer: _Answer, check: Check) -> None:
        """Put the bytes of an answer in their place and check them, without keeping others waiting meanwhile."""
        fetch, number = answer.fetch, answer.fetch.attempt.number
        try:
            with self._changed:
                landing = request.ended(answer.at, number, answer.received, answer.error)
                self._changed.notify_all()
            if landing is None:
                return
            out = spans[landing.span].out
            if answer.memory is not None:
                for start, stop in landing.ranges:
                    out[start:stop] = answer.memory[start - fetch.start : stop - fetch.start]
            found = ((part.member, check(part.member, out[part.start : part.stop])) for part in landing.parts)
            wrong = {member: error for member, error in found if error is not None}
            with self._changed:
                request.checked(self._clock(), number, landing, wrong)
        finally:
            with self._changed:
                self._release(answer)
                self._changed.notify_all()

    def _drop(self, request: SpanRequest, answer: _Answer) -> None:
        request.ended(answer.at, answer.fetch.attempt.number, answer.received, answer.error)
        self._release(answer)

    def _release(self, answer: _Answer) -> None:
        self._book.released(answer.fetch.attempt)
        answer.release()

    # -- whole blobs: few and small, so whoever answers first ----------------------------------------------------

    def size(self, name: str) -> int:
        return self._first(lambda store: store.size(name), name)

    def read_into(self, name: str, offset: int, out: memoryview) -> int:
        if len(self._stores) == 1:
            return self._first(lambda store: store.read_into(name, offset, out), name)

        def read(store: Store) -> bytes:  # to memory of its own: others may read at the same time
            beside = bytearray(out.nbytes)
            return bytes(beside[: store.read_into(name, offset, memoryview(beside))])

        data = self._first(read, name, out.nbytes)
        out[: len(data)] = data
        return len(data)

    def read(self, name: str, limit: int) -> bytes:
        return self.read_checked(name, limit, lambda data: None)

    def read_checked(self, name: str, limit: int, check: Callable[[bytes], None]) -> bytes:
        """A blob that passes the check, from the first source that has one so; ROOT is known already."""

        def read(store: Store) -> bytes:
            return store.read_checked(name, limit, check)

        return f"{self.root}\n".encode() if name == ROOT else self._first(read, name, _BLOB_BYTES)

    def exists(self, name: str) -> bool:
        return self._first(lambda store: store.exists(name), name)

    def names(self) -> Iterator[str]:
        return iter(self._first(lambda store: list(store.names()), "the list of files"))

    def unreadable(self, names: Sequence[str]) -> Mapping[str, str]:
        """The blobs that no source has, and what the last one says: one that does not answer may have them."""
        lost: Mapping[str, str] = dict.fromkeys(names, "")
        for _, found in self._answers(lambda store: store.unreadable(names)):
            if isinstance(found, SourceError):
                return {}
            if isinstance(found, Exception):
                raise found
            lost = {name: found[name] for name in lost if name in found}
            if not lost:
                return {}
        return lost

    def notes(self) -> Sequence[str]:
        return [
            note if len(self._stores) == 1 else f"{source.name}: {note}"
            for source, store in zip(self._book.sources, self._stores, strict=True)
            for note in store.notes()
        ]

    def _first(self, ask: Callable[[Store], T], what: str, nbytes: int = 0) -> T:
        """The first answer that is one; a wrong digest is only raised if nobody has a better one."""
        wrong: HolorayError | None = None
        for number, answer in self._answers(ask, nbytes):
            if not isinstance(answer, Exception):
                return answer
            if isinstance(answer, IntegrityError | LimitError):
                wrong = answer
            elif not isinstance(answer, SourceError):
                raise answer
            with self._changed:
                source = self._book.sources[number]
                source.last_error = answer
                source.counts["errors"] += 1
        if wrong is not None:
            raise wrong
        with self._changed:
            raise self._book.no_healthy_source(what, self._clock())

    def _answers(self, ask: Callable[[Store], T], nbytes: int = 0) -> Iterator[tuple[int, T | Exception]]:
        """What each source says, those that are well first; answers have about so many bytes."""
        sources = self._book.sources
        order = sorted(range(len(sources)), key=lambda i: (sources[i].failures > 0, sources[i].priority))
        deadline_s = self.policy.deadline_of(nbytes)
        return ask_each(lambda i: ask(self._stores[i]), order, grace_s=_GRACE_S, deadline_s=deadline_s)


def _unpickled(sources: Sequence[tuple[Store, int]], policy: FaultPolicy, root: str) -> SourcePool:
    return SourcePool(sources, policy, root=root)


def _distinct(uris: Sequence[str]) -> list[str]:
    """A name for each: endpoints of one bucket, say, differ in what no message shows."""
    before = [uris[:i].count(uri) for i, uri in enumerate(uris)]
    return [f"{uri} ({n + 1})" if n else uri for uri, n in zip(uris, before, strict=True)]


def _names_of(spans: Sequence[Span]) -> str:
    names = sorted({span.name for span in spans})
    return names[0] + (f" and {len(names) - 1} more files" if len(names) > 1 else "") if names else "nothing"


def _nothing() -> None:
    """Nothing to give back."""
