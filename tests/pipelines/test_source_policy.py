"""The decisions about sources: single rules by hand, and random schedules against the laws."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from source_simulator import Simulation, World, make_spans, simulate

from holoray.errors import IntegrityError, MissingError, SourceError, UsageError
from holoray.pipelines.fault_policy import FaultPolicy
from holoray.pipelines.source_book import OVERHEAD_BYTES, SourceBook
from holoray.pipelines.span_request import Fetch, Landing, SpanRequest
from holoray.stores.base import Part, Span

MIB = 1 << 20


def book(*priorities: int, **policy: Any) -> SourceBook:
    return SourceBook([(f"s{i}", p) for i, p in enumerate(priorities)], FaultPolicy(**policy), random.Random(0))


def taught(book: SourceBook, number: int, bytes_per_s: float, at: float = 0.0) -> None:
    """One request that gave this speed, fixed cost included."""
    attempt = book.begin(at - MIB / bytes_per_s, number, MIB - OVERHEAD_BYTES)
    book.arrived(at, attempt)
    book.released(attempt)


# -- single rules ------------------------------------------------------------------------------------------------


@pytest.mark.fault("lying-source")
def test_a_source_that_was_convicted_often_enough_is_never_asked_again() -> None:
    sources = book(0, 1, quarantine_after=3)
    for _ in range(2):
        sources.convict(0)
    assert sources.choose(0.0, MIB, ())[0] == 0
    sources.convict(0)
    assert sources.state(sources.sources[0], 0.0) == "quarantined"
    assert sources.choose(1e9, MIB, ())[0] == 1
    for _ in range(3):
        sources.convict(1)
    assert sources.choose(1e9, MIB, ()) == (None, -math.inf)


def test_whoever_would_be_done_first_is_asked() -> None:
    sources = book(0, 0)
    taught(sources, 0, 100e6)
    taught(sources, 1, 50e6)
    asked = []
    for _ in range(6):
        number, _ = sources.choose(0.0, MIB, ())
        assert number is not None
        sources.begin(0.0, number, MIB)
        asked.append(number)
    assert asked.count(0) == 4
    assert asked.count(1) == 2


def test_a_busy_fast_source_is_better_than_a_slow_idle_one() -> None:
    sources = book(0, 0)
    taught(sources, 0, 100e6)
    taught(sources, 1, 1e6)
    for _ in range(FaultPolicy().in_flight):
        assert sources.choose(0.0, MIB, ())[0] == 0
        sources.begin(0.0, 0, MIB)
    assert sources.choose(0.0, MIB, ())[0] is None


def test_a_lower_priority_is_only_asked_while_the_higher_one_is_away() -> None:
    sources = book(0, 1)
    taught(sources, 0, 1e6)
    taught(sources, 1, 1e9)
    assert sources.choose(0.0, MIB, ())[0] == 0
    attempt = sources.begin(0.0, 0, MIB)
    sources.failed(0.0, attempt, SourceError("x"))
    assert sources.choose(0.0, MIB, ())[0] == 1
    assert sources.choose(1.0, MIB, ())[0] == 0


def test_the_breaker_opens_and_lets_single_tries_through() -> None:
    sources = book(0)
    tries, now = [], 0.0
    for _ in range(8):
        number, when = sources.choose(now, MIB, ())
        while number is None:
            assert when > now
            now = when
            number, when = sources.choose(now, MIB, ())
        tries.append(now)
        attempt = sources.begin(now, number, MIB)
        if sources.sources[0].failures >= FaultPolicy().breaker_failures:
            assert sources.choose(now, MIB, ())[0] is None  # half-open: one at a time
        sources.failed(now, attempt, SourceError("x"))
    waits = [b - a for a, b in pairwise(tries)]
    assert waits[0] <= 0.1
    assert waits[1] <= 0.2
    for n, wait in enumerate(waits[2:]):
        assert min(2.0**n, 10) <= wait <= min(2.0**n, 10) + min(0.1 * 2 ** (n + 2), 10)
    assert sources.sources[0].counts["trips"] == 1
    attempt = sources.begin(now + 100, 0, MIB)
    sources.arrived(now + 101, attempt)
    assert sources.state(sources.sources[0], now + 101) == "healthy"


@pytest.mark.fault("slow-source")
def test_who_never_answers_does_not_keep_a_range_from_those_of_a_lower_priority() -> None:
    """Two of them would take turns for ever: each is due for another try while the other is waited for."""
    sources = book(0, 0, 1)
    for number in (0, 1):
        for _ in range(FaultPolicy().breaker_failures):
            sources.failed(0.0, sources.begin(0.0, number, MIB), SourceError("x"))
    assert sources.choose(100.0, MIB, (), retry=True)[0] == 2
    assert sources.choose(100.0, MIB, (), retry=False)[0] == 0  # or nobody would learn that it is back
    assert sources.choose(100.0, MIB, (2,), retry=True)[0] == 0
    sources.failed(100.0, sources.begin(100.0, 2, MIB), SourceError("x"))
    assert sources.choose(200.0, MIB, (), retry=True)[0] == 2  # if all failed, who failed least


@pytest.mark.fault("slow-source")
def test_who_owes_an_answer_is_not_waited_for_by_what_a_lower_priority_could_give() -> None:
    sources = book(0, 1, in_flight=1)
    taught(sources, 0, 100e6)
    taught(sources, 1, 50e6)
    attempt = sources.begin(0.0, 0, MIB)
    assert sources.choose(0.001, MIB, ())[0] is None
    assert sources.choose(1.0, MIB, ())[0] == 1  # it should have come by now
    sources.failed(1.0, attempt, SourceError("x"))
    sources.begin(2.0, 0, MIB)
    assert sources.choose(2.0, MIB, ())[0] == 1  # it failed, and nobody knows yet whether it is back


def test_retries_have_a_budget_that_time_and_successes_fill() -> None:
    sources = book(0, 0, retry_burst=2, retry_share=0.5)
    for _ in range(2):
        assert sources.choose(0.0, MIB, (), retry=True)[0] is not None
        sources.released(sources.begin(0.0, 0, 1, retry=True))
    number, when = sources.choose(0.0, MIB, (), retry=True)
    assert (number, when) == (None, 1.0)
    assert sources.choose(0.0, MIB, (), retry=False)[0] is not None
    assert sources.choose(1.0, MIB, (), retry=True)[0] is not None


def test_hedges_wait_for_the_tail_and_keep_to_their_budget() -> None:
    sources = book(0, 0, 0, hedge_burst_bytes=MIB, hedge_share=0.5)
    taught(sources, 1, 100e6)
    taught(sources, 2, 50e6)
    slow = sources.begin(0.0, 0, MIB)
    due = 2 * (MIB + OVERHEAD_BYTES) / 100e6
    assert sources.hedge_at(slow, ()) == pytest.approx(due)
    assert sources.choose_hedge(due * 0.99, slow, ()) is None
    assert sources.choose_hedge(due * 1.01, slow, ()) == 1
    assert sources.choose_hedge(due * 2.01, slow, (1,)) == 2
    sources.begin(due, 1, MIB, hedge=True)
    sources.begin(due, 1, MIB, hedge=True)
    assert sources.choose_hedge(1.0, slow, ()) is None  # beyond the burst and half of what came
    assert book(0, 0, hedge_share=0).choose_hedge(9.0, slow, ()) is None


@pytest.mark.fault("slow-source")
def test_the_deadline_grows_with_what_is_asked_for() -> None:
    """Else nobody could ever give a fragment that takes longer."""
    sources = book(0, 0, deadline_s=1.0, slowest_bytes_per_s=1e6)
    assert sources.begin(0.0, 0, 10**6).late_at == pytest.approx(2.0)
    assert sources.begin(0.0, 0, 10**6).late_at == pytest.approx(3.0)  # they share the way
    taught(sources, 1, 100e6)
    assert sources.begin(0.0, 1, 10**6).late_at == pytest.approx(2.0)  # eight times the expected, and 2 s at least
    span = Span("f", 0, memoryview(b""), [Part(0, 0, 10**7)])
    request = SpanRequest(book(0, deadline_s=1.0, slowest_bytes_per_s=1e6), [span], 0.0)
    fetch = _fetch(request, 0.0)
    assert request.next(10.9) == pytest.approx(11.0)
    _answer(request, fetch, 10.9, 10**7)
    assert request.next(10.9) is None


def test_lies_need_proof_and_suspicion_does_not() -> None:
    sources = book(0, 0)
    taught(sources, 0, 100e6)
    taught(sources, 1, 50e6)
    assert sources.choose(0.0, MIB, ())[0] == 0
    sources.suspect(0, IntegrityError("x"))
    assert sources.choose(0.0, MIB, ())[0] == 1
    assert sources.state(sources.sources[0], 0.0) == "suspect"
    for _ in range(10):
        sources.trust(0)
    assert sources.state(sources.sources[0], 0.0) == "healthy"
    for _ in range(3):
        sources.convict(0)
    assert sources.choose(0.0, MIB, (1,)) == (None, float("-inf"))


def test_a_source_of_unknown_speed_gets_one_small_request() -> None:
    sources = book(0, 0)
    number, _ = sources.choose(0.0, 8 * MIB, ())
    assert number == 0
    assert sources.request_bytes(0) == FaultPolicy().min_request_bytes
    sources.begin(0.0, 0, 1)
    assert sources.choose(0.0, MIB, ())[0] == 1
    sources.begin(0.0, 1, 1)
    assert sources.choose(0.0, MIB, ())[0] is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_retries": -1},
        {"patience_s": 0},
        {"backoff_s": float("nan")},
        {"deadline_s": float("inf")},
        {"min_quality": 1.5},
        {"in_flight": 0},
        {"max_request_bytes": 1},
    ],
    ids=str,
)
def test_a_policy_without_meaning_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        FaultPolicy(**wrong)
    assert next(iter(wrong)) in caught.value.message


# -- random schedules ------------------------------------------------------------------------------------------------


def _run(seed: int) -> None:
    """While an honest source comes back, everything is settled, whatever the others do."""
    simulation = simulate(seed)
    for reader in simulation.readers:
        assert reader.error is None, f"seed {seed}: {reader.error}"
        assert not reader.request.corrupt, f"seed {seed}"
        assert set(reader.applied) == {p.member for span in reader.spans for p in span.parts}, f"seed {seed}"


def test_schedules() -> None:
    for seed in (*range(100), 1595, 9728):  # in the last two, others that never answer come first
        _run(seed)


@pytest.mark.soak
def test_many_schedules() -> None:
    for seed in range(1000, 20_000):
        _run(seed)


def test_a_seed_gives_the_same_again() -> None:
    first, second = simulate(7), simulate(7)
    assert first.asked == second.asked
    assert first.now == second.now


def test_nobody_spins_when_all_are_down() -> None:
    """After its first failures a source is tried no more than once a second, and less and less."""
    for seed in range(5):
        policy = FaultPolicy(max_retries=1000, patience_s=100.0)
        simulation = Simulation(
            seed, policy, [World(1e8, 0.001, down=((0, 1e9),)) for _ in range(3)], random.Random(seed), 1
        )
        simulation.run()
        simulation.check_end()
        assert all(isinstance(reader.error, SourceError) for reader in simulation.readers)
        assert simulation.now >= 100
        for times in simulation.asked.values():
            free = policy.breaker_failures
            for i in range(free, len(times)):
                assert times[i] - times[i - 1] >= policy.breaker_s - 1e-9, f"seed {seed}"
            assert len(times) <= free + 100 / policy.max_backoff_s + 5


def test_spans_are_what_the_simulator_thinks() -> None:
    spans = make_spans(random.Random(0))
    assert all(a.stop == b.start for s in spans for a, b in pairwise(s.parts))


# -- what an answer means --------------------------------------------------------------------------------------------


def _one_piece(*priorities: int, parts: int = 2, **policy: Any) -> tuple[SourceBook, SpanRequest]:
    """A request of one span, all of which fits into one fetch."""
    span = Span("f", 0, memoryview(b""), [Part(i, 1000 * i, 1000 * i + 1000) for i in range(parts)])
    sources = book(*priorities, **policy)
    return sources, SpanRequest(sources, [span], 0.0)


def _fetch(request: SpanRequest, now: float) -> Fetch:
    fetch = request.next(now)
    assert isinstance(fetch, Fetch)
    return fetch


def _answer(request: SpanRequest, fetch: Fetch, now: float, received: int, wrong: Sequence[int] = ()) -> Landing:
    error = SourceError("broke") if received < fetch.attempt.nbytes else None
    landing = request.ended(now, fetch.attempt.number, received, error)
    assert landing is not None
    request.checked(now, fetch.attempt.number, landing, {member: IntegrityError("x") for member in wrong})
    return landing


def test_a_lie_is_proven_by_who_has_it_right_and_counts_once_a_request() -> None:
    sources, request = _one_piece(0, 1)
    _answer(request, _fetch(request, 0.0), 0.1, 2000, wrong=(0, 1))
    assert (sources.sources[0].lies, sources.sources[0].counts["mismatches"]) == (0, 1)
    again = _fetch(request, 0.2)
    assert again.attempt.source == 1
    _answer(request, again, 0.3, 2000)
    assert [source.lies for source in sources.sources] == [1, 0]
    assert request.next(0.4) is None


def test_nobody_is_accused_over_a_part_from_two_sources() -> None:
    sources, request = _one_piece(0, 1)
    landing = _answer(request, _fetch(request, 0.0), 0.1, 1500)
    assert [part.member for part in landing.parts] == [0]
    rest = _fetch(request, 0.1)
    assert (rest.attempt.source, rest.start, rest.stop) == (1, 1500, 2000)
    _answer(request, rest, 0.2, 500, wrong=(1,))
    assert [source.suspicion for source in sources.sources] == [0.0, 0.0]
    whole = _fetch(request, 5.0)
    assert (whole.start, whole.stop) == (1000, 2000)
    _answer(request, whole, 5.1, 1000)
    assert [source.lies for source in sources.sources] == [0, 0]
    assert request.next(6.0) is None


def test_a_hedge_that_comes_later_touches_nothing_that_is_good() -> None:
    sources, request = _one_piece(0, 1)
    taught(sources, 1, 100e6)
    first = _fetch(request, 0.0)
    hedge = _fetch(request, 1.0)
    assert (first.attempt.source, hedge.attempt.source, hedge.attempt.hedge) == (0, 1, True)
    _answer(request, first, 1.1, 2000, wrong=(1,))
    assert request.next(1.1) != 0.0
    landing = _answer(request, hedge, 1.2, 2000)
    assert landing.ranges == ((1000, 2000),)
    assert [part.member for part in landing.parts] == [1]
    assert request.next(1.3) is None


def _lacks(request: SpanRequest, fetch: Fetch, now: float, received: int, error: Exception | None) -> None:
    landing = request.ended(now, fetch.attempt.number, received, error)
    assert landing is not None
    request.checked(now, fetch.attempt.number, landing, {})


@pytest.mark.fault("missing")
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("error", [None, MissingError("no such file")], ids=["short", "missing"])
def test_what_no_source_has_is_known_at_once(error: Exception | None, skip: bool) -> None:
    sources, request = _one_piece(0, 1, skip_corrupted=skip)
    _lacks(request, _fetch(request, 0.0), 0.1, 1000, None)
    rest = _fetch(request, 0.1)
    assert (rest.attempt.source, rest.start, rest.stop) == (1, 1000, 2000)
    _lacks(request, rest, 0.2, 0, error)
    if skip:
        assert request.next(0.2) is None
        assert set(request.corrupt) == {1}
    else:
        with pytest.raises(SourceError, match=r"s0 \(healthy\): f ends at byte 1000; s1"):
            request.next(0.2)
    assert [sources.state(source, 0.2) for source in sources.sources] == ["healthy", "healthy"]


@pytest.mark.fault("missing")
def test_what_a_silent_source_may_have_is_not_corrupt() -> None:
    _, request = _one_piece(0, 1, skip_corrupted=True, max_retries=2)
    _lacks(request, _fetch(request, 0.0), 0.1, 0, MissingError("no such file"))
    now = 0.1
    with pytest.raises(SourceError, match=r"s1 \(open\): broke"):
        for _ in range(100):
            action = request.next(now)
            if isinstance(action, Fetch):
                assert action.attempt.source == 1
                _answer(request, action, now, 0)
            else:
                assert action is not None
                now = action
    assert not request.corrupt


def test_wrong_everywhere_is_corrupt_and_convicts_nobody() -> None:
    sources, request = _one_piece(0, 1)
    for now in (0.0, 1.0):
        _answer(request, _fetch(request, now), now + 0.1, 2000 if not now else 1000, wrong=(1,))
    assert request.next(2.0) is None
    assert set(request.corrupt) == {1}
    assert [source.lies for source in sources.sources] == [0, 0]
