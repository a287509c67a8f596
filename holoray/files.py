"""Opening files that may not be what they should."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

from holoray.errors import SourceError

NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def open_for_reading(path: Path) -> int:
    """A descriptor of a regular file (the caller closes it); raises SourceError for everything else.

    Opened with O_NONBLOCK, so that a FIFO in the place of a file cannot hang us.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        missing = isinstance(error, OSError) and error.errno == errno.ENOENT
        reason = error.strerror if isinstance(error, OSError) else str(error)
        hint = "is the path right?" if missing else "check the path and its permissions"
        raise SourceError(f"{path}: {reason}", hint=hint, source=str(path)) from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise SourceError(f"{path} is not a regular file", hint="is the path right?", source=str(path))
    return file
