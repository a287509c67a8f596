"""Random schedules for `SourceBook` and `SpanRequest`: virtual time, sources that fail, laws after each step.

A schedule is its seed: `simulate(seed)` does the same again.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from holoray.errors import IntegrityError, MissingError, SourceError
from holoray.pipelines.fault_policy import FaultPolicy
from holoray.pipelines.source_book import SourceBook
from holoray.pipelines.span_request import Fetch, SpanRequest
from holoray.stores.base import Part, Span

KIB = 1 << 10


@dataclass
class World:
    """A source as it really is."""

    bytes_per_s: float
    latency_s: float
    lies: float = 0.0
    breaks: float = 0.0
    stalls: float = 0.0
    ends_at: int = 1 << 60  # byte of every span
    down: Sequence[tuple[float, float]] = ()
    honest: bool = True

    def is_down(self, now: float) -> bool:
        return any(start <= now < stop for start, stop in self.down)


@dataclass
class Reader:
    """One thread of a load: its request, and the source of each grain in its memory (-1: a lie, -2: nothing)."""

    request: SpanRequest
    spans: list[Span]
    memory: list[list[int]]
    done: bool = False
    error: Exception | None = None
    applied: Counter[int] = field(default_factory=Counter)


GRAIN = 8 << 10  # all sizes are multiples of it, so that memory can be modelled


def make_spans(rng: random.Random, largest: int = 75) -> list[Span]:
    """Spans of a few parts of up to some hundred KiB; members are numbered through."""
    spans, member = [], 0
    for number in range(rng.randint(1, 5)):
        parts, at = [], 0
        for _ in range(rng.randint(1, 6)):
            size = GRAIN * rng.randint(1, largest)
            parts.append(Part(member, at, at + size))
            at, member = at + size, member + 1
        spans.append(Span(f"fragments-{number:05d}.arrow", 0, memoryview(b""), parts))
    return spans


def make_worlds(rng: random.Random, *, hopeless: bool = False) -> list[World]:
    """Two to five sources; unless `hopeless`, the first is honest and comes back from whatever happens to it."""
    worlds = []
    for number in range(rng.randint(2, 5)):
        world = World(10 ** rng.uniform(5, 9), rng.uniform(0.0005, 0.05))
        kind = rng.choice(("fine", "liar", "breaking", "stalling", "dead", "flapping", "short"))
        if number == 0 and not hopeless:
            kind = rng.choice(("fine", "breaking", "flapping"))
        if hopeless:
            kind = "dead"
        match kind:
            case "liar":
                world.lies, world.honest = rng.choice((0.1, 1.0)), False
            case "breaking":
                world.breaks = rng.uniform(0.05, 0.3)
            case "stalling":
                world.stalls = rng.choice((0.1, 1.0))
            case "dead":
                world.down = ((0.0 if hopeless else rng.uniform(0, 1), math.inf),)
            case "short":
                world.ends_at = GRAIN * rng.randint(0, 100)
            case "flapping":
                start = rng.uniform(0, 0.2)
                world.down = ((start, start + rng.uniform(0.1, 3.0)),)
        worlds.append(world)
    return worlds


class Simulation:
    """Readers that share a book, in virtual time."""

    def __init__(self, seed: int, policy: FaultPolicy, worlds: list[World], rng: random.Random, readers: int) -> None:
        self.seed, self.policy, self.worlds, self.rng = seed, policy, worlds, rng
        self.now = 0.0
        self.book = SourceBook([(f"s{i}", rng.randint(0, 1)) for i in range(len(worlds))], policy, random.Random(seed))
        self.readers = []
        for _ in range(readers):
            spans = make_spans(rng)
            memory = [[-2] * (span.parts[-1].stop // GRAIN) for span in spans]
            self.readers.append(Reader(SpanRequest(self.book, spans, 0.0, "x"), spans, memory))
        self.largest = max(p.stop - p.start for r in self.readers for s in r.spans for p in s.parts)
        self.events: list[tuple[float, int, int, Fetch | None]] = []
        self.asked: dict[int, list[float]] = defaultdict(list)
        self.fetched: Counter[tuple[int, int, int]] = Counter()
        self.excused: Counter[tuple[int, int, int]] = Counter()
        self.outstanding: dict[int, Fetch] = {}
        self.steps = 0

    def run(self) -> None:
        for number in range(len(self.readers)):
            self._wake(0.0, number)
        while self.events:
            self.steps += 1
            assert self.steps < 100_000, self._where("it never ends")
            self.now, _, number, fetch = heapq.heappop(self.events)
            if fetch is not None:
                self._answer(self.readers[number], fetch)
                for other in range(len(self.readers)):  # news for everybody
                    self._advance(other)
            else:
                self._advance(number)
            self._check()
        assert all(r.done or r.error is not None for r in self.readers), self._where("somebody waits for nothing")

    def _wake(self, at: float, number: int) -> None:
        heapq.heappush(self.events, (at, self.steps, number, None))

    def _advance(self, number: int) -> None:
        reader = self.readers[number]
        if reader.done or reader.error is not None:
            return
        while True:
            try:
                action = reader.request.next(self.now)
            except SourceError as error:
                reader.error = error
                reader.request.close()
                return
            if action is None:
                reader.done = True
                reader.request.close()
                return
            if not isinstance(action, Fetch):
                break
            self._ask(number, action)
        assert action > self.now or math.isinf(action), self._where(f"a wake-up at {action} that is now or past")
        if math.isinf(action):
            assert self.outstanding, self._where("waits for news that cannot come")
        else:
            self._wake(action, number)

    def _ask(self, number: int, fetch: Fetch) -> None:
        reader, world = self.readers[number], self.worlds[fetch.attempt.source]
        self.asked[fetch.attempt.source].append(self.now)
        self.outstanding[fetch.attempt.number] = fetch
        for grain in range(fetch.start // GRAIN, fetch.stop // GRAIN):
            key = (number, fetch.span, grain)
            self.fetched[key] += 1
            if fetch.attempt.hedge:
                self.excused[key] += 1
        assert reader.memory[fetch.span], self._where("an empty span")
        taken = self.rng.expovariate(1 / world.latency_s) + fetch.attempt.nbytes / world.bytes_per_s
        if self.rng.random() < world.stalls:
            taken += 60.0
        at = self.now + taken
        heapq.heappush(self.events, (at, self.steps + 1_000_000 + len(self.events), number, fetch))

    def _answer(self, reader: Reader, fetch: Fetch) -> None:
        world, attempt = self.worlds[fetch.attempt.source], fetch.attempt
        del self.outstanding[attempt.number]
        received, error = fetch.stop - fetch.start, None
        if world.is_down(self.now) or world.is_down(attempt.began):
            received, error = 0, SourceError("down")
        elif self.rng.random() < world.breaks:
            received = GRAIN * self.rng.randrange((fetch.stop - fetch.start) // GRAIN)
            error = SourceError("broke")
        elif fetch.start + received > world.ends_at:
            received = max(0, world.ends_at - fetch.start)
            error = MissingError("no such file") if not received and self.rng.random() < 0.5 else None
        number = self.readers.index(reader)
        for grain in range((fetch.start + received) // GRAIN, fetch.stop // GRAIN):
            self.excused[number, fetch.span, grain] += 1
        waited_for = reader.request.waits_for(fetch)
        landing = reader.request.ended(self.now, attempt.number, received, error)
        if not waited_for:
            assert landing is None
            for grain in range(fetch.start // GRAIN, (fetch.start + received) // GRAIN):
                self.excused[number, fetch.span, grain] += 1  # it was late, or outrun
        if landing is not None:
            self._land(reader, number, fetch, landing.ranges, landing.parts, world, landing)
        self.book.released(attempt)

    def _land(self, reader, number, fetch, ranges, parts, world, landing) -> None:  # type: ignore[no-untyped-def]
        memory = reader.memory[fetch.span]
        for start, stop in ranges:
            assert fetch.start <= start < stop <= fetch.stop, self._where("bytes beside the fetch")
            for grain in range(start // GRAIN, stop // GRAIN):
                memory[grain] = -1 if self.rng.random() < world.lies else fetch.attempt.source
        wrong: dict[int, IntegrityError] = {}
        for part in parts:
            held = memory[part.start // GRAIN : part.stop // GRAIN]
            assert -2 not in held, self._where("a part is checked before all of it is there")
            if -1 in held:
                wrong[part.member] = IntegrityError("a lie")
                for grain in range(part.start // GRAIN, part.stop // GRAIN):
                    self.excused[number, fetch.span, grain] += 1
            else:
                reader.applied[part.member] += 1
                assert reader.applied[part.member] == 1, self._where("a part is settled twice")
        reader.request.checked(self.now, fetch.attempt.number, landing, wrong)

    def _check(self) -> None:
        book, policy = self.book, self.policy
        held: Counter[int] = Counter()
        for fetch in self.outstanding.values():
            held[fetch.attempt.source] += fetch.attempt.nbytes
        assert [s.held_bytes for s in book.sources] == [held[i] for i in range(len(book.sources))], self._where("held")
        share = max(policy.budget_bytes // len(book.sources), self.largest)
        assert max(held.values(), default=0) <= share, self._where("the byte budget is exceeded")
        received = sum(source.counts["received_bytes"] for source in book.sources)
        hedged = sum(source.counts["hedged_bytes"] for source in book.sources)
        assert hedged <= policy.hedge_share * received + policy.hedge_burst_bytes, self._where("too much is hedged")
        for source, world in zip(book.sources, self.worlds, strict=True):
            assert not (world.honest and book.is_quarantined(source)), self._where("an honest source is quarantined")
            assert 0 <= source.in_flight <= policy.in_flight, self._where("too many requests to one source")

    def check_end(self) -> None:
        """At the end everything is settled, nothing was fetched twice without a reason, and no memory is held."""
        assert all(s.held_bytes == s.in_flight == s.in_flight_bytes == 0 for s in self.book.sources)
        for key, times in self.fetched.items():
            assert times <= 1 + self.excused[key], self._where(f"{key} was fetched {times} times for no reason")

    def _where(self, what: str) -> str:
        return f"{what} (seed {self.seed}, at {self.now:.3f} s)"


def simulate(seed: int, *, hopeless: bool = False, policy: FaultPolicy | None = None) -> Simulation:
    """One random schedule, run to its end and held against the laws."""
    rng = random.Random(seed)
    policy = policy or FaultPolicy(
        budget_bytes=rng.choice((1, 4, 64)) << 20,
        min_request_bytes=64 * KIB,
        max_request_bytes=rng.choice((256, 1024)) * KIB,
        max_retries=100,
        patience_s=100.0,
        deadline_s=30.0,
    )
    simulation = Simulation(seed, policy, make_worlds(rng, hopeless=hopeless), rng, rng.randint(1, 3))
    simulation.run()
    simulation.check_end()
    return simulation
