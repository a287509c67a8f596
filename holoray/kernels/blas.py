"""BLAS and LAPACK on one thread: what they compute must not depend on how many there are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy  # noqa: F401 - its BLAS must be loaded before it is looked for
import scipy.linalg  # noqa: F401
from threadpoolctl import OpenBLASController, ThreadpoolController

_lock = threading.Lock()
_users = 0
_limit: Any = None


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Within, every BLAS call of the process runs on the thread that makes it; any number of threads may be within.

    The limit is the whole process's, so it is set by the first who comes and lifted by the last who goes. These may be
    different threads, and threadpoolctl obeys only one until that is forgotten.
    """
    global _users, _limit
    with _lock:
        _users += 1
        if _users == 1:
            OpenBLASController.clear_controlling_thread(force=True)
            _limit = _controller().limit(limits=1, user_api="blas")
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                OpenBLASController.clear_controlling_thread(force=True)
                _limit.restore_original_limits()
                OpenBLASController.clear_controlling_thread(force=True)
