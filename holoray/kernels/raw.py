"""`raw` on the CPU: cut, measure, copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from holoray.codecs.base import Codec
from holoray.codecs.raw import RUN_BYTES, RawCodec
from holoray.compression import MIN_FRAGMENT_SAVING, NONE, compress, decompress
from holoray.fragment import NO_PREREQUISITE, FragmentEntry
from holoray.kernels.accumulator import Accumulator
from holoray.kernels.encoder import EncodedFragment, EncodeOptions, Encoder
from holoray.kernels.scratch import Scratch
from holoray.quality import finite_energy
from holoray.tensor import Array, TensorSpec, as_bytes

_MAX_GAIN: Final = 1e290


class RawEncoder(Encoder):
    """One part a run of 1 MiB."""

    def __init__(self, spec: TensorSpec, array: Array, options: EncodeOptions) -> None:
        super().__init__(spec, array, options)
        self.codec = RawCodec()
        self.parts = max(1, -(-spec.nbytes // RUN_BYTES))

    def encode(self, part: int) -> list[EncodedFragment]:
        per_run = RUN_BYTES // self.array.itemsize
        run = self.array.reshape(-1)[part * per_run : (part + 1) * per_run]
        gain = finite_energy(run)
        name, payload = compress(self.options.compression, as_bytes(run), MIN_FRAGMENT_SAVING)
        # Squares of float64 values may overflow, in a run or in the sum of all: quality is then not measured.
        gain = gain if gain < _MAX_GAIN else 0.0
        return [EncodedFragment(part, 0, part, NO_PREREQUISITE, name, run.nbytes, gain, bytes(payload))]


class RawAccumulator(Accumulator):
    """Runs are copied to their place."""

    def __init__(self, spec: TensorSpec, codec: Codec, out: Array, memory: npt.NDArray[np.uint8] | None = None) -> None:
        super().__init__(spec, codec, out)
        self._held = np.zeros(max(1, -(-spec.nbytes // RUN_BYTES)), np.uint8)

    def slot_range(self, slot: int) -> tuple[int, int]:
        return slot * RUN_BYTES, min((slot + 1) * RUN_BYTES, self.spec.nbytes)

    def resume(self, slot: int, layers: int) -> None:
        self._held[slot] = min(layers, 1)

    def landing(self, entry: FragmentEntry) -> memoryview | None:
        if entry.compression != NONE:
            return None
        return self._out_bytes[slice(*self.slot_range(entry.slot))].data

    def discard(self, slot: int) -> None:
        self.read_slot(slot)[:] = 0
        self._held[slot] = 0

    def decompress(self, entries: Sequence[FragmentEntry], payloads: Sequence[Any], scratch: Scratch) -> Any:
        return decompress(entries[0].compression, payloads[0], entries[0].raw_bytes)

    def accumulate(self, slot: int, decompressed: Any, scratch: Scratch) -> None:
        data, place = np.frombuffer(decompressed, np.uint8), self.read_slot(slot)
        if data.ctypes.data != place.ctypes.data:  # else it landed here
            place[:] = data
        self._held[slot] = 1

    def finalize(self) -> None:
        """`out` is always up to date."""

    def state(self) -> dict[str, Array]:
        return {"held": self._held, "bytes": self._out_bytes}
