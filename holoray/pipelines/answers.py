"""Answers of several sources to one question, as they come."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from holoray.errors import SourceError

T = TypeVar("T")


def ask_each(
    ask: Callable[[int], T], order: Sequence[int], *, grace_s: float, deadline_s: float
) -> Iterator[tuple[int, T | Exception]]:
    """What the sources, by number, answer or raise; whoever has heard enough stops listening.

    They are asked one after the other: the next as soon as an answer was not enough, or all so far have been silent
    for `grace_s` seconds. After `deadline_s` more, those that are still silent have a SourceError. A single source is
    asked by the calling thread, and has all the time that it takes.
    """
    if len(order) == 1:
        yield order[0], _answer(ask, order[0])
        return
    came: queue.SimpleQueue[tuple[int, T | Exception]] = queue.SimpleQueue()

    def listen(number: int) -> None:
        came.put((number, _answer(ask, number)))

    left, silent, expires = list(reversed(order)), set[int](), 0.0
    while left or silent:
        if left:
            number = left.pop()
            silent.add(number)
            expires = time.monotonic() + (grace_s if left else deadline_s)
            # Nobody waits for a thread that has been outrun: its source may be silent for a minute.
            threading.Thread(target=listen, args=(number,), name="holoray-ask", daemon=True).start()
        try:
            number, answer = came.get(timeout=max(expires - time.monotonic(), 0.0))
        except queue.Empty:
            if left:
                continue
            for number in sorted(silent):
                yield number, SourceError(f"no answer within {deadline_s:.0f} s")
            return
        silent.discard(number)
        yield number, answer


def _answer(ask: Callable[[int], T], number: int) -> T | Exception:
    try:
        return ask(number)
    except Exception as error:  # raised by whoever asked, if no source is to blame
        return error
