"""Accumulating `planes` on the CPU: layers of a run go straight into the tensor, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from holoray.codecs import planes_layout as lay
from holoray.codecs.planes import PlanesCodec
from holoray.compression import NONE, decompress
from holoray.errors import CapacityError, FormatError, UsageError
from holoray.fragment import FragmentEntry
from holoray.kernels import planes_density
from holoray.kernels.accumulator import Accumulator
from holoray.kernels.bits import HARDWARE
from holoray.kernels.planes_bodies import open_bodies, run_tables
from holoray.kernels.planes_groups import KINDS
from holoray.kernels.planes_launch import decode_layers
from holoray.kernels.planes_runs import decode_run, refine_run
from holoray.kernels.planes_words import ROWS
from holoray.kernels.scratch import Scratch
from holoray.tensor import Array, TensorSpec


@dataclass(slots=True)
class RunLayers:
    """Some layers of one run, decompressed: where their raw sections lie, and what keeps them alive there.

    Planes lie in the scratch memory that was passed to `add`, the rest in the payloads.
    """

    slot: int
    addresses: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(lay.SECTIONS, np.int64))
    lengths: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(lay.SECTIONS, np.int64))
    offsets: npt.NDArray[np.uint32] = field(default_factory=lambda: np.zeros((lay.STREAMS, lay.BLOCKS + 1), np.uint32))
    bodies: dict[int, Any] = field(default_factory=dict)
    """Stored payloads by layer."""
    alive: list[Any] = field(default_factory=list)

    def add(self, codec: PlanesCodec, spec: TensorSpec, payloads: Mapping[int, Any], scratch: Scratch) -> None:
        """Parse and decompress more layers, by number; raises FormatError where one is malformed."""
        buffers = {layer: pa.py_buffer(data) for layer, data in payloads.items() if layer not in self.bodies}
        layers = codec.layers(spec)
        tables = run_tables(spec.dtype, codec.top, codec.tail_cut, layers, codec.run_weights(spec, self.slot))
        planes = scratch.bytes("planes.raw", tables.buffer_bytes)
        bodies = np.array([(layer, b.address, b.size) for layer, b in buffers.items()], np.int64).reshape(-1, 3)
        pending = np.empty((lay.SECTIONS, 5), np.int64)
        count = open_bodies(
            bodies, tables.sections, tables.heads, self.addresses, self.lengths, self.offsets,
            planes.ctypes.data, pending, *planes_density.tables(),
        )  # fmt: skip
        if count < 0:
            layer = int(bodies[-1 - count, 0])
            fault = _fault(codec.layout(spec, layer, self.slot), payloads[layer])
            raise _located(fault, codec, spec, layer, self.slot)
        numbers = list(buffers)
        for place, n, start, end, compression in pending[:count].tolist():
            stored = memoryview(buffers[numbers[n]])[start:end]
            try:
                raw = pa.py_buffer(decompress(lay.COMPRESSIONS[compression], stored, int(self.lengths[place])))
            except FormatError as error:
                raise _located(error, codec, spec, numbers[n], self.slot) from None
            self.addresses[place] = raw.address
            self.alive.append(raw)
        self.alive += (*buffers.values(), planes)
        self.bodies |= {layer: payloads[layer] for layer in buffers}


def _fault(layout: lay.LayerLayout, payload: Any) -> FormatError:
    """What is wrong with a layer that could not be opened."""
    try:
        lay.parse_body(layout, memoryview(payload).cast("B"))
    except FormatError as error:
        return error
    return FormatError("the density code of a plane is malformed")


def _located(error: FormatError, codec: PlanesCodec, spec: TensorSpec, layer: int, slot: int) -> FormatError:
    error.tensor, error.fragment = spec.name, layer * codec.runs(spec) + slot
    return error


class PlanesAccumulator(Accumulator):
    """Refines `out` run by run. `reached` (uint8[runs]) counts the layers that a run of `out` holds.

    A layer whose prerequisites are missing waits as a copy of its stored payload, so at most one payload per fragment.
    `resume` tells that `out` already holds layers, e.g. in memory shared with a process that died.
    """

    codec: PlanesCodec

    def __init__(
        self,
        spec: TensorSpec,
        codec: PlanesCodec,
        out: Array,
        memory: npt.NDArray[np.uint8] | None = None,
        *,
        hardware: bool = HARDWARE,
    ) -> None:
        codec.check(spec)
        if out.dtype != self._out_dtype(spec) or out.shape != spec.shape or not out.flags.c_contiguous:
            raise UsageError(f"output of {spec.name!r} must be a contiguous {spec.dtype} array of {spec.shape}")
        super().__init__(spec, codec, out, memory)
        self.runs = codec.runs(spec)
        self.reached = np.zeros(self.runs, np.uint8)
        self.waiting: dict[int, dict[int, bytes]] = {}
        self._hardware = hardware
        self._halves = out.reshape(-1).view(np.uint16)
        self._stride = lay.RUN * spec.numpy_dtype.itemsize // 2

    @staticmethod
    def _out_dtype(spec: TensorSpec) -> np.dtype[Any]:
        return spec.numpy_dtype

    def slot_range(self, slot: int) -> tuple[int, int]:
        """A run is contiguous in `out`."""
        start = 2 * slot * self._stride
        return start, min(start + 2 * self._stride, self.spec.nbytes)

    def resume(self, slot: int, layers: int) -> None:
        """Declare that run `slot` of `out` holds layers 0..layers-1 and nothing else."""
        if not 0 <= layers <= self.codec.layers(self.spec):
            raise UsageError(f"{self.spec.name!r} has no {layers} layers", tensor=self.spec.name)
        self.reached[slot] = layers

    def decompress(self, entries: Sequence[FragmentEntry], payloads: Sequence[Any], scratch: Scratch) -> RunLayers:
        """Parse and decompress layers of one run. The result refers to payloads and scratch: keep them unchanged."""
        run = RunLayers(entries[0].slot)
        if not 0 <= run.slot < self.runs or any(entry.slot != run.slot for entry in entries):
            raise UsageError("fragments of several runs, or of none, in one call", tensor=self.spec.name)
        layers = {entry.layer: payload for entry, payload in zip(entries, payloads, strict=True)}
        run.add(self.codec, self.spec, layers, scratch)
        return run

    def accumulate(self, slot: int, decompressed: RunLayers, scratch: Scratch) -> None:
        """Add layers of a run. After a FormatError the run holds what it held before, and nothing waits for it.

        After a CapacityError (there was no room to work) all is as it was before.
        """
        run, waiting = decompressed, self.waiting.pop(slot, {})
        held = int(self.reached[slot])
        target = self._contiguous(held, run.bodies.keys() | waiting.keys())
        if target > held:
            try:
                self._apply(run, waiting, held, target, scratch)
            except CapacityError:
                if waiting:
                    self.waiting[slot] = waiting
                raise
        left = {layer: bytes(body) for layer, body in (run.bodies | waiting).items() if layer >= target}
        if left:
            self.waiting[slot] = left

    def finalize(self) -> None:
        """Nothing to do: `out` is always up to date."""

    def state(self) -> dict[str, Array]:
        unsigned = np.uint32 if self.spec.dtype == "F32" else np.uint16
        return {"held": self.reached, "weights": self.out.reshape(-1).view(unsigned)}

    def combine(self, other: Accumulator) -> None:
        """Take over the runs that `other` holds, and the layers that wait there."""
        super().combine(other)
        if isinstance(other, PlanesAccumulator):
            scratch = Scratch()
            for slot, layers in other.waiting.items():
                mine = self.waiting.setdefault(slot, {})
                for layer, body in layers.items():
                    mine.setdefault(layer, body)
            for slot in list(self.waiting):
                self.accumulate(slot, RunLayers(slot), scratch)

    def _contiguous(self, held: int, layers: Iterable[int]) -> int:
        """The number of layers that a run can hold once `layers` are added to the `held` it has."""
        present = set(layers)
        while held in present:
            held += 1
        return held

    def _apply(self, run: RunLayers, waiting: Mapping[int, bytes], held: int, target: int, scratch: Scratch) -> None:
        """Add layers held..target-1 to the run's weights; they are all there, or FormatError and none is."""
        weights = self._weights(run.slot)
        before = self._copy(weights, scratch) if held else None
        self.reached[run.slot] = 0  # while the kernels work
        try:
            waited = {layer: waiting[layer] for layer in range(held, target) if layer not in run.bodies}
            if waited:
                run.add(self.codec, self.spec, waited, scratch)
            bad = self._decode(run, held, target, scratch)
            if bad:
                error = FormatError("planes: a stream is longer or shorter than its planes ask for")
                raise _located(error, self.codec, self.spec, _stream_layer(bad - 1), run.slot)
        except BaseException:
            if held:
                self._restore(weights, before)
            else:
                weights[:] = 0
            self.reached[run.slot] = held
            raise
        self.reached[run.slot] = target

    def _copy(self, weights: Any, scratch: Scratch) -> Any:
        """A copy of a run's weights, where they lie."""
        before = scratch.array("planes.before", weights.size, np.uint16)
        before[:] = weights
        return before

    def _restore(self, weights: Any, before: Any) -> None:
        """Put back what `_copy` gave."""
        weights[:] = before

    def _decode(self, run: RunLayers, held: int, target: int, scratch: Scratch) -> int:
        """Run the kernels; returns 0 or the bad stream + 1."""
        codec = self.codec
        work = scratch.array("planes.work", ROWS * 64, np.uint64).reshape(ROWS, 64)
        count = codec.run_weights(self.spec, run.slot)
        fixed = (self._weights(run.slot), count, KINDS[self.spec.dtype], codec.threshold, codec.top, codec.tail_cut)
        sections = (run.addresses, run.lengths, run.offsets, work, self._hardware)
        return decode_layers(fixed, held, target, sections)

    def _weights(self, slot: int) -> npt.NDArray[np.uint16]:
        """The run's part of `out` as uint16."""
        return self._halves[slot * self._stride : (slot + 1) * self._stride]


def _stream_layer(stream: int) -> int:
    if stream >= lay.STREAM_TAIL:
        return lay.TAIL
    return max(stream - 1, 0)


@cache
def warm() -> None:
    """Compile the kernels, or load them from numba's cache, before threads do."""
    _warm_bodies()
    work = np.zeros((ROWS, 64), np.uint64)
    out = np.zeros(1, np.uint16)
    tables = (np.zeros(lay.SECTIONS, np.int64), np.zeros(lay.SECTIONS, np.int64))
    offsets = np.zeros((lay.STREAMS, lay.BLOCKS + 1), np.uint32)
    fixed: Final = (out, 0, 0, 127, 3, -6)
    decode_run(*fixed, 1, *tables, offsets, work, HARDWARE)
    refine_run(*fixed, 1, 2, *tables, offsets, work, HARDWARE)


def _warm_bodies() -> None:
    codec, spec = PlanesCodec(127, 3, -6), TensorSpec("warm", "BF16", (1,))
    layout = codec.layout(spec, 0, 0)
    raw = [bytes(0 if step else most) for most, step in zip(layout.largest, layout.steps, strict=True)]
    sections = [lay.PackedSection(NONE, data, len(data)) for data in raw]
    body = lay.pack_body(layout, sections, np.zeros((lay.STREAMS, lay.BLOCKS + 1), np.uint32))
    RunLayers(0).add(codec, spec, {0: body}, Scratch())
