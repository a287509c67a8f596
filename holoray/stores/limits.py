"""How long, and how much of it, a server may keep us."""

from __future__ import annotations

from dataclasses import dataclass, fields

from holoray.errors import UsageError


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """What a store that reads from a server puts up with.

    An answer of n bytes has `answer_s + n / slowest_bytes_per_s` seconds, from the request to its last byte: a limit a
    read from the socket would let a server that sends a byte now and then hold us for ever. Reads are cut into
    requests of 8 MiB, so n is no more. For HTTP also: `stall_s` without a single byte, `connect_s` to a connection
    (TLS included), and `redirects` of one request.
    """

    connect_s: float = 10.0
    stall_s: float = 30.0
    answer_s: float = 30.0
    slowest_bytes_per_s: float = 100e3
    redirects: int = 3

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0 and not (field.name == "redirects" and value == 0):
                raise UsageError(f"{field.name} must be more than 0, not {value!r}")

    def deadline_s(self, nbytes: int) -> float:
        """Seconds that an answer of so many bytes may take."""
        return self.answer_s + nbytes / self.slowest_bytes_per_s
