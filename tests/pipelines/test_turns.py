"""Turns: fewer work when memory runs out, nobody fails who could have done it alone, and nobody waits for ever."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

from holoray.errors import CapacityError
from holoray.pipelines.turns import Turns


class Memory:
    """Room for `room` at once; counts who is in."""

    def __init__(self, room: int) -> None:
        self.room, self.inside, self.most = room, 0, 0
        self._lock = threading.Lock()

    def use(self, barrier: threading.Barrier | None = None) -> None:
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
            fits = self.inside <= self.room
        try:
            if barrier is not None:
                barrier.wait(60)
            if not fits:
                raise CapacityError("full")
        finally:
            with self._lock:
                self.inside -= 1


def test_those_that_lack_memory_together_get_by_one_by_one() -> None:
    turns, memory, done = Turns(4), Memory(room=1), []
    barrier, first = threading.Barrier(4), threading.local()

    def work() -> None:
        # All four are inside at once at first, so that three of them must fail.
        together = None if getattr(first, "over", False) else barrier
        first.over = True
        memory.use(together)

    def run() -> None:
        turns.take(work)
        done.append(1)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 4
    assert memory.most == 4
    assert turns.width < 4


def test_whoever_fails_alone_is_told() -> None:
    turns, calls = Turns(8), []

    def work() -> None:
        calls.append(turns.width)
        raise CapacityError("full")

    with pytest.raises(CapacityError, match="full"):
        turns.take(work)
    assert calls == [8, 4, 2, 1]
    assert turns.take(lambda: 3) == 3


def test_other_errors_pass_and_free_the_turn() -> None:
    turns = Turns(1)
    with pytest.raises(ZeroDivisionError):
        turns.take(lambda: 1 // 0)
    assert turns.take(lambda: 3) == 3


def test_a_failed_attempt_holds_nothing_while_it_waits() -> None:
    """What its frames held is free before the next attempt: that is the memory that lacked."""

    class Held:
        pass

    turns, held = Turns(2), list[weakref.ref[Held]]()

    def work() -> None:
        if held:
            gc.collect()
            assert held[0]() is None
            return
        something = Held()
        held.append(weakref.ref(something))
        raise CapacityError("full")

    turns.take(work)
    assert len(held) == 1
