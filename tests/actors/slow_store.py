"""A store whose reads take time, so that a test can do harm meanwhile. Workers import it by name."""

from __future__ import annotations

import os
import time
from pathlib import Path

from holoray.stores import LocalStore


class SlowStore(LocalStore):
    """Sleeps before each read of a fragment file."""

    def __init__(self, path: str | os.PathLike[str], delay_s: float) -> None:
        super().__init__(path)
        self.delay_s = delay_s

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "delay_s": self.delay_s}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(Path(str(state["path"])), float(str(state["delay_s"])))  # type: ignore[misc]

    def read_into(self, name: str, offset: int, out: memoryview) -> int:
        if name.startswith("fragments-"):
            time.sleep(self.delay_s)
        return super().read_into(name, offset, out)
