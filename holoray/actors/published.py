"""Where a driver finds the weights of a generation: in its node's shared memory, or on the devices of the workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from holoray.actors.device_memory import device_layout, device_view
from holoray.actors.locks import Names
from holoray.actors.segment import attach_weights
from holoray.actors.worker import Member
from holoray.errors import SourceError, UsageError, WorkerLostError
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
    """A generation on the device of one worker, for a process that has the same device: see `open_weights`.

    `blocks`: positions of tensors that lie in one allocation, and what opens that. With placement `shard` these are
    the device's own tensors only.
    """

    worker: str
    node: str
    pid: int
    generation: int
    blocks: tuple[tuple[tuple[int, ...], bytes], ...]


class OnDevices:
    """On devices: copied to the host when asked for, each tensor from whichever device has it and answers."""

    def __init__(self, manifest: Manifest, members: Callable[[], list[Member]]) -> None:
        self._manifest, self._members = manifest, members
        self._generation = 0

    def take(self, generation: int) -> None:
        self._generation = generation

    def tensors(self) -> Iterator[tuple[str, Array]]:
        generation = self._generation
        homes = self._homes(generation)
        for number, entry in enumerate(self._manifest.tensors):
            content = _ask_anybody(homes.get(number, []), "fetch", generation, number)
            yield entry.name, content.view(entry.spec.numpy_dtype).reshape(entry.spec.shape)

    def handles(self) -> list[SharedWeights]:
        """The generation on each device that has it."""
        generation = self._generation
        return [
            SharedWeights(member.name, member.node.partition("@")[2], member.pid, generation, tuple(blocks))
            for member, blocks in self._ask_all("share", generation)
            if blocks
        ]

    def _homes(self, generation: int) -> dict[int, list[Member]]:
        """Who has each tensor."""
        homes: dict[int, list[Member]] = {}
        for member, tensors in self._ask_all("tensors", generation):
            for tensor in tensors:
                homes.setdefault(tensor, []).append(member)
        return homes

    def _ask_all(self, method: str, generation: int) -> Iterator[tuple[Member, Any]]:
        """Answers of those that have a generation. Raises UsageError where it is being refined in place."""
        for member in self._members():
            try:
                yield member, ray.get(getattr(member.handle, method).remote(generation))
            except RayError as error:  # it died, or came later and does not have this one yet
                _raise_misuse(error)


def _ask_anybody(members: Sequence[Member], method: str, *arguments: Any) -> Any:
    error: Exception = WorkerLostError(
        "no device is left that holds all of the weights", hint="wait for the next generation, or warm up again"
    )
    for member in members:
        try:
            return ray.get(getattr(member.handle, method).remote(*arguments))
        except RayTaskError as raised:
            _raise_misuse(raised)
            if not isinstance(raised.cause, SourceError):
                raise
            error = raised.cause
        except RayError as raised:
            error = WorkerLostError(f"worker {member.name} does not answer: {raised}")
    raise error


def _raise_misuse(error: RayError) -> None:
    """Another device would say the same, or worse, give what does not belong to the rest."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, UsageError):
        raise error.cause


def open_weights(manifest: Manifest, shared: SharedWeights, device: Device) -> dict[str, Any]:
    """What `device` has of a generation as its arrays, without a copy; it must be the device that shared it.

    BF16 is uint16 there. Let go of them before `on_generation` returns from the next generation: memory is freed
    then. With `in_place` it is refined instead: arrays change between calls of `on_generation`, and read within one
    they are of its generation. Raises SourceError where the generation is gone.
    """
    found: dict[str, Any] = {}
    for tensors, handle in shared.blocks:
        layout = device_layout(manifest, tensors)
        memory = device.attach(handle, layout.nbytes)
        specs = (manifest.tensors[t].spec for t in tensors)
        found |= {spec.name: device_view(memory[at], spec) for spec, at in zip(specs, layout.ranges, strict=True)}
    return found
