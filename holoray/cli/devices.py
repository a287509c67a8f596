"""What options about a device mean where none is asked for."""

from __future__ import annotations

from holoray.errors import UsageError
from holoray.kernels.frames import opens_on_device


def check_no_device(device_bytes: int | None, decompress: str) -> None:
    """Raise UsageError for options that would be ignored without a device."""
    if device_bytes is not None:
        raise UsageError("--device-bytes without a device", hint="name one (--device cuda), or leave this out")
    opens_on_device(decompress, None)
