"""One batch of ranges on its way: what to ask for next, and what an answer means. No I/O, no clock.

A *piece* is a run of neighbouring parts of one span that are still wanted. Asking takes pieces from `todo`, cut to
what suits the source; an answer settles the parts that match their digests and puts the others back: bad ones without
the source that they came from, cut off ones behind the bytes that did come, and without the source if its blob ends
there. A piece that is late is asked for once
more elsewhere (hedged); whichever comes first counts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Final

from holoray.errors import HolorayError, IntegrityError, MissingError, SourceError
from holoray.pipelines.source_book import Attempt, SourceBook
from holoray.stores.base import Part, Span

_NOBODY: Final[frozenset[int]] = frozenset()


@dataclass(frozen=True, slots=True)
class Fetch:
    """Ask the attempt's source for these bytes of a span; then say `ended`."""

    attempt: Attempt
    span: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Landing:
    """What of an answer is wanted: ranges of the span to put in their place, and parts that are then to be checked."""

    span: int
    ranges: tuple[tuple[int, int], ...] = ()
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, slots=True)
class _Piece:
    """Parts `first` to `stop` of a span, from byte `start` on; what is before that came from `origins`."""

    span: int
    first: int
    stop: int
    start: int
    avoid: frozenset[int] = _NOBODY
    origins: frozenset[int] = _NOBODY
    failures: int = 0


@dataclass(slots=True)
class _Flight:
    fetch: Fetch
    piece: _Piece
    twin: int = 0  # number of the attempt for the same piece, while that is under way


class SpanRequest:
    """Spans that are wanted from the sources of a book; `what` names them in messages. One thread at a time."""

    def __init__(self, book: SourceBook, spans: Sequence[Span], now: float, what: str = "") -> None:
        self.corrupt: dict[int, IntegrityError] = {}
        """Members of which no source has an honest copy."""
        self._book = book
        self._spans = spans
        self._began = now
        self._what = what
        self._todo = deque(_Piece(i, 0, len(s.parts), s.parts[0].start) for i, s in enumerate(spans) if s.parts)
        self._flights: dict[int, _Flight] = {}
        self._good: set[int] = set()
        self._wrong: dict[int, IntegrityError] = {}
        self._accused: dict[int, set[Attempt]] = {}
        self._convicted: set[Attempt] = set()
        self._lacking: dict[int, set[int]] = {}  # by member: the sources whose blob ends before it
        self._outrun: dict[int, Fetch] = {}

    def next(self, now: float) -> Fetch | float | None:
        """What to do now: ask a source, wait until a time (or for news), or None: every part is settled.

        Raises SourceError if there is no source left to wait for.
        """
        self._give_up_late(now)
        wake = math.inf
        for piece in list(self._todo):
            chosen, when = self._book.choose(
                now, self._nbytes(piece), piece.avoid, least=self._least(piece), retry=piece.failures > 0
            )
            hopeless = when == -math.inf or piece.failures > self._book.policy.max_retries
            if hopeless or (chosen is None and self._is_out_of_patience(now)):
                self._todo.remove(piece)
                self._settle_lost(piece, now)
            elif chosen is not None:
                self._todo.remove(piece)
                return self._launch(now, piece, chosen)
            else:
                wake = min(wake, when)
        for flight in list(self._flights.values()):
            hedge = None if flight.twin else self._book.choose_hedge(now, flight.fetch.attempt, flight.piece.avoid)
            if hedge is not None:
                return self._hedge(now, flight, hedge)
        if not self._flights and not self._todo:
            return None
        return min(wake, *self._times(now))

    def ended(self, now: float, number: int, received: int, error: Exception | None) -> Landing | None:
        """An attempt was over at `now`, with so many bytes; None if nobody waits for it any more.

        Whoever gets a landing puts it in its place, checks it, and says `checked`. Raises what is no fault of a source.
        """
        if number in self._outrun:
            self._end(now, self._outrun.pop(number), received, error)
        flight = self._flights.get(number)
        if flight is None:
            return None
        fetch = flight.fetch
        self._end(now, fetch, received, error)
        if error is not None and not isinstance(error, HolorayError):
            raise error
        reached = fetch.start + received
        wanted = [part for part in self._parts(flight.piece) if part.member not in self._good]
        ranges = ((max(part.start, fetch.start), min(part.stop, reached)) for part in wanted)
        whole = tuple(part for part in wanted if part.stop <= reached)
        if reached < fetch.stop:
            self._put_back_rest(flight, reached, lacking=error is None or isinstance(error, MissingError))
        return Landing(fetch.span, tuple((a, b) for a, b in ranges if a < b), whole)

    def checked(self, now: float, number: int, landing: Landing, wrong: Mapping[int, IntegrityError]) -> None:
        """Which parts of a landing did not match their digests."""
        flight = self._flights.pop(number)
        attempt, piece = flight.fetch.attempt, flight.piece
        for part in landing.parts:
            if part.member not in wrong:
                self._good.add(part.member)
                self._convict(self._accused.pop(part.member, set()))
        if wrong:
            self._blame(attempt, piece, wrong)
            if not flight.twin:
                bad = [i for i in self._wanted(piece) if self._spans[piece.span].parts[i].member in wrong]
                mixed = bool(piece.origins - {attempt.source})
                self._put_back(piece, bad, failures=piece.failures + mixed)
        elif landing.parts:
            self._book.trust(attempt.source)
        if flight.twin:
            self._flights[flight.twin].twin = 0
        self._drop_outrun(now)

    def waits_for(self, fetch: Fetch) -> bool:
        """Whether an answer would be looked at."""
        return fetch.attempt.number in self._flights

    def close(self) -> None:
        """Nobody waits for anything any more."""
        self._outrun |= {number: flight.fetch for number, flight in self._flights.items()}
        self._flights.clear()
        self._todo.clear()

    # -- asking --------------------------------------------------------------------------------------------

    def _launch(self, now: float, piece: _Piece, source: int) -> Fetch:
        limit = piece.start + self._book.request_bytes(source)
        parts = self._spans[piece.span].parts
        stop = piece.first + 1
        while stop < piece.stop and parts[stop].stop <= limit:
            stop += 1
        if stop < piece.stop:
            rest = replace(piece, first=stop, start=parts[stop].start, origins=_NOBODY)
            self._todo.appendleft(rest)
            piece = replace(piece, stop=stop)
        attempt = self._book.begin(now, source, self._nbytes(piece), retry=piece.failures > 0)
        return self._fly(attempt, piece)

    def _hedge(self, now: float, flight: _Flight, source: int) -> Fetch:
        attempt = self._book.begin(now, source, flight.fetch.attempt.nbytes, hedge=True)
        flight.twin = attempt.number
        return self._fly(attempt, flight.piece, twin=flight.fetch.attempt.number)

    def _fly(self, attempt: Attempt, piece: _Piece, twin: int = 0) -> Fetch:
        fetch = Fetch(attempt, piece.span, piece.start, self._stop(piece))
        self._flights[attempt.number] = _Flight(fetch, piece, twin)
        return fetch

    def _times(self, now: float) -> Iterator[float]:
        for flight in self._flights.values():
            yield flight.fetch.attempt.late_at
            if not flight.twin:
                at = self._book.hedge_at(flight.fetch.attempt, flight.piece.avoid)
                yield at if at > now else math.inf  # due, but there is no room for it: that takes news
        if not self._flights:
            yield self._patient_until()

    # -- what goes wrong -----------------------------------------------------------------------------------

    def _give_up_late(self, now: float) -> None:
        for number, flight in list(self._flights.items()):
            attempt = flight.fetch.attempt
            if now >= attempt.late_at:
                name = self._book.sources[attempt.source].name
                error = SourceError(f"no answer within {now - attempt.began:.1f} s", source=name)
                self._book.outrun(now, attempt)
                self._book.failed(now, attempt, error)
                self._put_back_rest(flight, flight.fetch.start)
                del self._flights[number]
                if flight.twin:
                    self._flights[flight.twin].twin = 0

    def _end(self, now: float, fetch: Fetch, received: int, error: Exception | None) -> None:
        if error is None and received == fetch.stop - fetch.start:
            self._book.arrived(now, fetch.attempt)
        elif error is not None and not isinstance(error, MissingError):
            self._book.failed(now, fetch.attempt, error, received)
        else:
            span, name = self._spans[fetch.span], self._book.sources[fetch.attempt.source].name
            end = span.offset + fetch.start + received
            why = error or MissingError(f"{span.name} ends at byte {end}", source=name)
            self._book.lacked(now, fetch.attempt, why, received)

    def _drop_outrun(self, now: float) -> None:
        for number, flight in list(self._flights.items()):
            if not self._wanted(flight.piece):
                del self._flights[number]
                self._outrun[number] = flight.fetch
                self._book.outrun(now, flight.fetch.attempt)

    def _put_back_rest(self, flight: _Flight, reached: int, *, lacking: bool = False) -> None:
        """What did not come is asked for again, from where it broke off; unless the same piece is under way anyway.

        `lacking`: not of this source, which does not have it.
        """
        piece, source = flight.piece, flight.fetch.attempt.source
        parts = self._spans[piece.span].parts
        rest = [i for i in self._wanted(piece) if parts[i].stop > reached]
        if lacking:
            for i in rest:
                self._lacking.setdefault(parts[i].member, set()).add(source)
        if flight.twin:
            return
        origins = piece.origins if parts[rest[0]].start < piece.start else _NOBODY
        if reached > max(piece.start, parts[rest[0]].start):
            origins |= {source}
        self._put_back(piece, rest, start=reached, origins=origins, failures=piece.failures + (not lacking))

    def _put_back(
        self, piece: _Piece, indices: Sequence[int], *, failures: int, start: int = 0, origins: frozenset[int] = _NOBODY
    ) -> None:
        """Parts that are still wanted: neighbours together that must not come from the same sources.

        The first one is there up to `start`, thanks to `origins`.
        """
        parts = self._spans[piece.span].parts

        def kind(numbered: tuple[int, int]) -> tuple[int, frozenset[int]]:
            place, i = numbered
            return i - place, self._useless(parts[i].member)

        for (_, avoid), run in groupby(enumerate(indices), key=kind):
            numbers = [i for _, i in run]
            begin = max(parts[numbers[0]].start, start)
            resumed = origins if begin > parts[numbers[0]].start else _NOBODY
            self._todo.appendleft(_Piece(piece.span, numbers[0], numbers[-1] + 1, begin, avoid, resumed, failures))

    def _blame(self, attempt: Attempt, piece: _Piece, wrong: Mapping[int, IntegrityError]) -> None:
        """Accuse the source; but nobody over a part that was put together from several."""
        self._wrong.update(wrong)
        whole = set(wrong)
        if piece.origins - {attempt.source}:
            whole.discard(self._spans[piece.span].parts[piece.first].member)
        for member in whole:
            self._accused.setdefault(member, set()).add(attempt)
        if whole:
            self._book.suspect(attempt.source, next(iter(wrong.values())))

    def _convict(self, attempts: set[Attempt]) -> None:
        """One lie an attempt, however many parts it had wrong."""
        for attempt in attempts - self._convicted:
            self._convicted.add(attempt)
            self._book.convict(attempt.source)

    def _settle_lost(self, piece: _Piece, now: float) -> None:
        """Parts that somebody had wrong and nobody had right are corrupt, and so are, if that is to be skipped, those
        that no source has. Others say that no source is left.
        """
        for part in self._parts(piece):
            if part.member in self._good:
                continue
            why = self._wrong.get(part.member)
            if why is None and self._book.policy.skip_corrupted and self._is_nowhere(part.member):
                why = IntegrityError(f"{self._spans[piece.span].name} is missing or ends too early in every source")
            if why is None:
                raise self._book.no_healthy_source(self._what, now)
            self.corrupt[part.member] = why

    def _is_nowhere(self, member: int) -> bool:
        """Whether every source that may still be asked has said that it does not have it."""
        useless = self._useless(member)
        return all(i in useless or self._book.is_quarantined(s) for i, s in enumerate(self._book.sources))

    def _useless(self, member: int) -> frozenset[int]:
        """The sources that need not be asked for it again: what they have is wrong, or they do not have it."""
        return frozenset(a.source for a in self._accused.get(member, ())) | self._lacking.get(member, _NOBODY)

    def _is_out_of_patience(self, now: float) -> bool:
        return not self._flights and now >= self._patient_until()

    def _patient_until(self) -> float:
        return max(self._began, self._book.news_at) + self._book.policy.patience_s

    # -- small words ---------------------------------------------------------------------------------------

    def _parts(self, piece: _Piece) -> Sequence[Part]:
        return self._spans[piece.span].parts[piece.first : piece.stop]

    def _stop(self, piece: _Piece) -> int:
        return self._spans[piece.span].parts[piece.stop - 1].stop

    def _wanted(self, piece: _Piece) -> list[int]:
        parts = self._spans[piece.span].parts
        return [i for i in range(piece.first, piece.stop) if parts[i].member not in self._good]

    def _nbytes(self, piece: _Piece) -> int:
        return self._stop(piece) - piece.start

    def _least(self, piece: _Piece) -> int:
        return self._spans[piece.span].parts[piece.first].stop - piece.start
