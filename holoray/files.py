"""Opening files that may not be what they should."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

from holoray.errors import MissingError, SourceError

NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def open_for_reading(path: Path) -> int:
    """A descriptor of a regular file (the caller closes it); raises SourceError for others, MissingError for none.

    Opened with O_NONBLOCK, so that a FIFO in the place of a file cannot hang us.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        missing = isinstance(error, OSError) and error.errno == errno.ENOENT
        reason = error.strerror if isinstance(error, OSError) else str(error)
        if missing:
            raise MissingError(f"{path}: {reason}", hint="is the path right?", source=str(path)) from None
        raise SourceError(f"{path}: {reason}", hint="check the path and its permissions", source=str(path)) from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise SourceError(f"{path} is not a regular file", hint="is the path right?", source=str(path))
    return file
