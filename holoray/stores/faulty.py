"""A source that misbehaves as it is told, by a seed: for tests of whoever reads from several."""

from __future__ import annotations

import math
import random
import threading
import time
from dataclasses import dataclass

from holoray.errors import SourceError, UsageError
from holoray.stores.base import Store, fragment_file
from holoray.stores.wrapped import WrappedStore


@dataclass(frozen=True, slots=True)
class Faults:
    """What is wrong with a source; raises UsageError for impossible values.

    Probabilities are per read of a fragment file. `ups` and `downs` let it flap: so many reads are answered, then
    so many refused, and again.
    """

    seed: int = 0
    latency_s: float = 0.0
    """Seconds before each answer, on average (exponential)."""
    bytes_per_s: float = math.inf
    """Speed of one read."""
    lies: float = 0.0
    """Probability of one flipped bit; the rest is true."""
    breaks: float = 0.0
    """Probability that the connection breaks, after a random part of the bytes."""
    truncates: float = 0.0
    """Probability that fewer bytes come than were asked for, as if the file ended there."""
    refuses: float = 0.0
    """Probability of an error instead of an answer."""
    dies_after: int | None = None
    """Reads of fragment files after which nothing is answered any more."""
    ups: int = 0
    downs: int = 0

    def __post_init__(self) -> None:
        for name in ("lies", "breaks", "truncates", "refuses"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UsageError(f"{name} must be a probability", hint="from 0 to 1")
        if self.latency_s < 0 or self.bytes_per_s <= 0 or self.ups < 0 or self.downs < 0:
            raise UsageError("a source is neither faster than at once nor negative")


class FaultySource(WrappedStore):
    """A store whose fragment files are read with faults; ROOT and the manifest are only affected by its death.

    The faults of the n-th read follow from seed and n alone. `reads` counts them; `revive` ends a death.
    """

    def __init__(self, inner: Store, faults: Faults) -> None:
        super().__init__(inner)
        self.faults = faults
        self.reads = 0
        self._revived = False
        self._counting = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.inner, self.faults)

    def revive(self) -> None:
        """Answer again, and for good."""
        self._revived = True

    def size(self, name: str) -> int:
        self._check_alive(self.reads)
        return super().size(name)

    def read(self, name: str, limit: int) -> bytes:
        self._check_alive(self.reads)
        return super().read(name, limit)

    def read_into(self, name: str, offset: int, out: memoryview) -> int:
        if not name.startswith(fragment_file(0)[:10]):
            self._check_alive(self.reads)
            return super().read_into(name, offset, out)
        with self._counting:
            number = self.reads
            self.reads += 1
        self._check_alive(number)
        return self._misread(random.Random(f"{self.faults.seed}:{number}"), name, offset, out)

    def _misread(self, chance: random.Random, name: str, offset: int, out: memoryview) -> int:
        faults = self.faults
        slow_s = chance.expovariate(1 / faults.latency_s) if faults.latency_s else 0.0
        time.sleep(slow_s + out.nbytes / faults.bytes_per_s)
        if chance.random() < faults.refuses:
            raise self._error("refuses, on purpose")
        broken = chance.random() < faults.breaks
        cut = broken or chance.random() < faults.truncates
        got = super().read_into(name, offset, out[: chance.randrange(out.nbytes)] if cut and out.nbytes else out)
        if got and chance.random() < faults.lies:
            bit = chance.randrange(8 * got)
            out[bit // 8] ^= 1 << bit % 8
        if broken:
            error = self._error("broke off, on purpose")
            error.received = got
            raise error
        return got

    def _check_alive(self, number: int) -> None:
        faults = self.faults
        if not self._revived and faults.dies_after is not None and number >= faults.dies_after:
            raise self._error("is dead, on purpose")
        if faults.downs and number % (faults.ups + faults.downs) >= faults.ups:
            raise self._error("is down, on purpose")

    def _error(self, what: str) -> SourceError:
        return SourceError(f"{self.uri} {what}", hint="FaultySource does what it was told", source=self.uri)
