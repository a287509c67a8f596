"""Where a driver finds the weights of a generation: in its node's shared memory, or on the devices of the workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from holoray.actors.device_memory import device_layout, device_view
from holoray.actors.locks import Names
from holoray.actors.segment import attach_weights
from holoray.actors.worker import Member
from holoray.errors import SourceError, WorkerLostError
from holoray.kernels.device import Device
from holoray.manifest import Manifest
from holoray.tensor import Array


class Published(Protocol):
    """The newest generation that the driver has taken."""

    def take(self, generation: int) -> None:
        """From now on it is this one."""

    def tensors(self) -> Iterator[tuple[str, Array]]:
        """Name and content of every tensor, all of one generation, read-only."""


class OnNode:
    """In the segment of the driver's node: mapped, not copied."""

    def __init__(self, manifest: Manifest, names: Names) -> None:
        self._manifest, self._names = manifest, names
        self._weights: dict[str, Array] = {}

    def take(self, generation: int) -> None:
        self._weights = attach_weights(self._manifest, self._names, generation)

    def tensors(self) -> Iterator[tuple[str, Array]]:
        yield from self._weights.items()


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """A generation on the device of one worker, for a process that has the same device: see `open_weights`."""

    worker: str
    node: str
    pid: int
    generation: int
    handle: bytes


class OnDevices:
    """On every device: copied to the host when asked for, from whichever device answers."""

    def __init__(self, manifest: Manifest, members: Callable[[], list[Member]]) -> None:
        self._manifest, self._members = manifest, members
        self._generation = 0

    def take(self, generation: int) -> None:
        self._generation = generation

    def tensors(self) -> Iterator[tuple[str, Array]]:
        generation = self._generation
        for number, entry in enumerate(self._manifest.tensors):
            content = self._ask_anybody("fetch", generation, number)
            yield entry.name, content.view(entry.spec.numpy_dtype).reshape(entry.spec.shape)

    def handles(self) -> list[SharedWeights]:
        """The generation on each device that has it."""
        generation = self._generation
        found = []
        for member in self._members():
            try:
                handle = ray.get(member.handle.share.remote(generation))
            except RayError:  # it died, or came later and does not have this one yet
                continue
            found.append(SharedWeights(member.name, member.node.partition("@")[2], member.pid, generation, handle))
        return found

    def _ask_anybody(self, method: str, *arguments: Any) -> Any:
        error: Exception = WorkerLostError("no device is left that holds the weights")
        for member in self._members():
            try:
                return ray.get(getattr(member.handle, method).remote(*arguments))
            except RayTaskError as raised:
                if not isinstance(raised.cause, SourceError):
                    raise
                error = raised.cause
            except RayError as raised:
                error = WorkerLostError(f"worker {member.name} does not answer: {raised}")
        raise error


def open_weights(manifest: Manifest, shared: SharedWeights, device: Device) -> dict[str, Any]:
    """The tensors of a generation as arrays of `device`, which must be the one that they are on; nothing is copied.

    BF16 is uint16 there. Let go of them before `on_generation` returns from the next generation: memory is freed
    then. Raises SourceError where the generation is gone.
    """
    layout = device_layout(manifest)
    segment = device.attach(shared.handle, layout.nbytes)
    return {t.name: device_view(segment, layout, i, t.spec) for i, t in enumerate(manifest.tensors)}
