"""A device's weights in one place: each generation is refined in the memory of the one before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from holoray.actors.device_memory import DeviceGenerations, Generation
from holoray.actors.goals import first_layer
from holoray.actors.messages import Slot
from holoray.errors import UsageError
from holoray.kernels.accumulator import Accumulator
from holoray.pipelines.plan import Unit


class InPlaceGenerations(DeviceGenerations):
    """Takes the weights once, with what is kept to refine them, and what decoding takes for a moment.

    The marks of the last generation tell what of it is still there: a slot is not, once it begins to be written. Nobody
    is given the last generation once the next was turned to, nor that before it is whole.
    """

    _spare_states = 0
    _lack_hint = "ask for placement shard, or use larger or more devices"

    def begin(self, slot: Slot) -> None:
        if self._last is not None:
            self._last.marks.spoil(slot)
        super().begin(slot)

    def prepare(self, work: Iterable[Unit]) -> None:
        work = tuple(work)
        self._check_held((unit.tensor, unit.slot) for unit in work if first_layer(unit))
        super().prepare(work)

    def carry(self, slots: Mapping[Slot, int]) -> None:
        """Slots without new fragments are where they are."""
        self._check_held(slot for slot, count in slots.items() if count)
        for slot, count in slots.items():
            if count:
                self.hold(slot, count)
            else:
                self.clear(slot)

    def _check_held(self, slots: Iterable[Slot]) -> None:
        last = self._last
        if not all(last is not None and last.marks.holds(slot) for slot in slots):
            raise UsageError("this device is to go on from slots of the last generation that it does not hold any more")

    def _copy(self, slot: Slot) -> None:
        self._populate(slot)

    @property
    def _last(self) -> Generation | None:
        return self._generations.get(self._making - 1)

    def _make_generation(self, number: int) -> Generation:
        """In the memory of the last one, unless that holds what is another device's by now."""
        made, last = super()._make_generation(number), self._generations.pop(number - 1, None)
        if last is not None and last.places.keys() <= self._tensors:
            self._generations[number - 1] = last
            made.blocks, made.places = list(last.blocks), dict(last.places)
        return made

    def _take_over(self, before: Accumulator, tensor: int, out: Any) -> Accumulator:
        return before

    def _published(self, generation: int) -> Generation:
        if generation + 1 in self._generations:
            raise UsageError(
                f"generation {generation} is being refined in place: its weights change now",
                hint="use weights within on_generation, or wait() for the last generation; without in_place the last "
                "one stays while the next is made",
            )
        return super()._published(generation)
