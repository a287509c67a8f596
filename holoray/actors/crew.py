"""The processes of a warm-up, kept by its driver: the workers that are wanted, and a coordinator.

Ray ends an actor when the process that started it ends. The driver starts all of them, so that none outlives it, and
all but the dead one outlive a coordinator: the next is told who is there, and asks them what their nodes hold.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from holoray.actors import remote
from holoray.actors.roster import Policy
from holoray.actors.worker import Hello, Member
from holoray.errors import WorkerLostError

_LOOK_S: Final = 0.5
_POLL_S: Final = 1.0
_HOME_S: Final = 5.0
_BIRTH_S: Final = 120.0
"""How long a coordinator may take for its first answer: it starts a process, and parses the manifest."""


class StartWorker(Protocol):
    """How a worker is started: `remote.start_worker` for one job."""

    def __call__(self, name: str, *, node: str, required: bool) -> Any: ...


class EndWorker(Protocol):
    """How a worker is ended whose process may be stopped: `remote.end_process` for one job."""

    def __call__(self, member: Member) -> None: ...


class StartCoordinator(Protocol):
    """How a coordinator is started: with its number, who is there already, and who died on which node."""

    def __call__(self, reign: int, members: list[Member], fallen: dict[str, list[str]]) -> Any: ...


@dataclass(slots=True)
class _Seat:
    """A worker's place: who sits or will sit there, and where it must or may be."""

    handle: Any
    hello: Any
    receiver: bool
    wanted_node: str = ""
    member: Member | None = None
    failed: bool = False

    @property
    def pending(self) -> bool:
        return self.member is None and not self.failed


class Crew:
    """Starts workers and coordinators, replaces those that were lost, and follows a cluster that grows and shrinks.

    All in a thread of its own, until `close`, or until an error ends it, which every use of the coordinator raises.
    """

    def __init__(
        self,
        session: remote.Session,
        start_worker: StartWorker,
        end_worker: EndWorker,
        start_coordinator: StartCoordinator,
        *,
        home: str | None,
        workers: Callable[[], int],
        policy: Policy,
    ) -> None:
        self._session, self._home, self._wanted, self._policy = session, home, workers, policy
        self._start_worker, self._end_worker, self._start_coordinator = start_worker, end_worker, start_coordinator
        self._seats: dict[str, _Seat] = {}
        self._fallen: dict[str, list[str]] = {}
        self._names = 0
        self._began = time.monotonic()
        self._filled = 0.0
        self._closing = threading.Event()
        self._changed = threading.Condition()
        self._error: Exception | None = None
        self._reign = 1
        self._heard = False
        """Whether the coordinator has answered yet."""
        self._beats: dict[Any, str] = {}
        """Answers to the last roll call, with the names of the workers."""
        self._fill()
        self._coordinator: Any = start_coordinator(1, [], {})
        self._listen()
        self._thread = threading.Thread(target=self._keep, name="holoray-crew", daemon=True)
        self._thread.start()

    # -- what the driver calls ---------------------------------------------------------------------------

    @property
    def coordinator(self) -> Any:
        """The handle of the coordinator of now. Raises what ended the crew."""
        with self._changed:
            if self._error is not None:
                raise self._error
            return self._coordinator

    def await_successor(self, dead: Any) -> None:
        """Return once there is another coordinator than this one, or the crew is closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._coordinator is not dead or self._error or self._closing.is_set())

    def members(self) -> list[Member]:
        """The workers that are there."""
        return [seat.member for seat in list(self._seats.values()) if seat.member is not None]

    def close(self) -> None:
        """End the coordinator and all workers."""
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        with suppress(WorkerLostError), self._session.use():
            ray.kill(self._coordinator)
        self._thread.join()
        with suppress(WorkerLostError), self._session.use():
            for handle in [self._coordinator, *(seat.handle for seat in self._seats.values())]:
                ray.kill(handle)

    # -- the loop ---------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        try:
            while not self._closing.is_set():
                with self._session.use():
                    self._step()
        except Exception as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _step(self) -> None:
        hellos = {seat.hello: name for name, seat in self._seats.items() if seat.pending}
        awaited = [self._dismissals, *hellos, *self._beats]
        ready, _ = ray.wait(awaited, num_returns=1, timeout=_LOOK_S, fetch_local=False)
        for reference in ready:
            if reference in hellos:
                self._welcome(hellos[reference])
            if reference in self._beats:
                self._hear_beat(reference)
        with self._succeeding():
            if self._dismissals in ready:
                for dismissal in ray.get(self._dismissals):
                    self._dismiss(dismissal.worker, silent=dismissal.silent)
                self._heard = True
                self._listen()
            elif time.monotonic() > self._asked + (_POLL_S + self._policy.silence_s if self._heard else _BIRTH_S):
                raise GetTimeoutError
        if time.monotonic() > self._filled + _LOOK_S:
            self._fill()

    def _listen(self) -> None:
        """Ask who is to be replaced; the answer comes when there is somebody, or after some time.

        The first at once: it tells that the coordinator is born, and that from then on silence means something.
        """
        self._dismissals = self._coordinator.dismissals.remote(_POLL_S if self._heard else 0.0)
        self._asked = time.monotonic()

    @contextmanager
    def _succeeding(self) -> Iterator[None]:
        """A coordinator that dies, or does not answer, is followed by another."""
        try:
            yield
        except (RayActorError, GetTimeoutError) as error:
            if not self._closing.is_set():
                self._succeed(error)

    def _succeed(self, cause: Exception) -> None:
        ray.kill(self._coordinator)
        if self._reign > self._policy.max_restarts:
            raise WorkerLostError(f"the coordinator died {self._reign} times: {cause}")
        for name in [name for name, seat in self._seats.items() if seat.failed]:
            self._dismiss(name)
        self._reign += 1
        with self._changed:
            self._coordinator = self._start_coordinator(self._reign, self.members(), self._fallen)
            self._changed.notify_all()
        self._heard = False
        self._listen()
        self._call_roll()

    # -- workers ------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """As many workers as are wanted, less or more when the cluster changes; who is at work is left in peace."""
        self._filled = time.monotonic()
        wanted = self._wanted()
        working = [name for name, seat in self._seats.items() if not seat.receiver]
        for _ in range(wanted - len(working)):
            self._seat()
        surplus = [name for name in working if self._seats[name].pending][: max(0, len(working) - wanted)]
        for name in surplus:
            ray.kill(self._seats.pop(name).handle)
        self._guard_home()

    def _guard_home(self) -> None:
        """The consumer's node needs somebody who fills its segment: a receiver, if workers go to other nodes."""
        nodes = {seat.member.node if seat.member else seat.wanted_node for seat in self._seats.values()}
        if self._home is None or self._home in nodes:
            return
        starting = any(seat.pending for seat in self._seats.values())
        overdue = time.monotonic() > self._began + _HOME_S and len(remote.living_nodes()) > 1
        if overdue or not starting:
            self._seat(self._home, receiver=True)

    def _seat(self, node: str = "", *, receiver: bool = False) -> None:
        name = f"w{self._names}"
        self._names += 1
        handle = self._start_worker(name, node=node, required=receiver)
        self._seats[name] = _Seat(handle, handle.hello.remote(), receiver, wanted_node=node)

    def _welcome(self, name: str) -> None:
        seat = self._seats[name]
        try:
            hello: Hello = ray.get(seat.hello)
        except RayError as error:
            hello = Hello("", 0, WorkerLostError(f"worker {name} does not start: {error}"))
        if hello.error is not None:
            seat.failed = True
            self._coordinator.failed.remote(name, hello.error)
            return
        seat.member = Member(name, seat.handle, hello.node, hello.pid, not seat.receiver)
        self._coordinator.introduce.remote(seat.member)

    def _call_roll(self) -> None:
        """Who died with the last coordinator is replaced while the next one is being born."""
        self._beats = {member.handle.beat.remote(): member.name for member in self.members()}

    def _hear_beat(self, reference: Any) -> None:
        name = self._beats.pop(reference)
        try:
            ray.get(reference)
        except RayActorError:
            self._dismiss(name)

    def _dismiss(self, name: str, *, silent: bool = False) -> None:
        """Kill what may be left of a worker, and start another, on the same node where that still lives."""
        seat = self._seats.pop(name, None)
        if seat is None:
            return
        ray.kill(seat.handle)
        node = seat.wanted_node
        if seat.member is not None:
            node = seat.member.node
            if silent:
                self._end_worker(seat.member)
            self._fallen.setdefault(node, []).append(name)
        working = sum(not seat.receiver for seat in self._seats.values())
        if not seat.receiver and working < self._wanted():
            self._seat(node if node in remote.living_nodes() else "")
