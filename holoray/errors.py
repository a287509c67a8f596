"""Every error holoray raises on purpose: a small tree whose leaves say what to do next.

All errors pickle (they cross process borders under Ray) and carry where the fault lies.
"""

from __future__ import annotations

from typing import ClassVar


class HolorayError(Exception):
    """Base of all holoray errors.

    `tensor`, `fragment`, `source` locate the fault where known; `hint` says what to do next;
    `exit_code` is what the command line returns.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        tensor: str | None = None,
        fragment: int | None = None,
        source: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.tensor = tensor
        self.fragment = fragment
        self.source = source

    def __reduce__(self) -> tuple[object, ...]:
        state = {k: getattr(self, k) for k in ("hint", "tensor", "fragment", "source")}
        return (type(self), (self.message,), state)


class UsageError(HolorayError, ValueError):
    """The caller asked for something that has no meaning."""

    exit_code = 2


class FormatError(HolorayError, ValueError):
    """Bytes that do not follow the format they claim."""

    exit_code = 3


class TruncatedError(FormatError):
    """A file or payload ends before what it promised."""


class LimitError(FormatError):
    """A stated size or count beyond what is accepted; refused before any allocation."""


class IntegrityError(HolorayError):
    """Bytes that do not match their digest; nothing of them was used."""

    exit_code = 3


class QualityError(HolorayError):
    """The quality asked for cannot be reached with what there is."""

    exit_code = 4


class DeadlineError(HolorayError, TimeoutError):
    """What was waited for did not come in time; it may still come."""

    exit_code = 4

    def __str__(self) -> str:
        return self.message


class CapacityError(HolorayError):
    """Memory, disk or a byte budget is too small for what was asked."""

    exit_code = 5


class SourceError(HolorayError, OSError):
    """A place that should hold bytes is missing or does not answer.

    `received`: how many bytes at the start of what was asked for came before it broke off.
    """

    exit_code = 6
    received: int = 0

    def __str__(self) -> str:
        return self.message


class MissingError(SourceError):
    """The place answers, and does not have what was asked for: asking it again is of no use."""


class WorkerLostError(HolorayError):
    """Workers died and no replacement could finish their part."""

    exit_code = 5


class DeviceError(HolorayError):
    """There is no usable accelerator, or what drives it is missing."""

    exit_code = 5
