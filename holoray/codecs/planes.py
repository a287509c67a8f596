"""`planes`: embedded significance planes on the float bits, six layers from coarse to exact.

Every weight is seen as its *word*, the 16 bits of its truncation to bfloat16. With rel(w) = exponent field of the word
minus `threshold`, weights fall into three classes: outliers (rel >= `top`), stored as they are in layer 0;
significant ones, whose binary digits are sent plane by plane; and those below `tail_cut`, stored in the tail.

Layer l < 5 holds the digits down to an exponent `cuts[l]`, and the signs of the weights that become significant there;
layer 5 (the tail) completes the words; for F32, layer 6 holds the low 16 bits. F16 has words too: its exponents are
shifted to bfloat16's bias, and the three mantissa bits that do not fit ride in the tail.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from holoray.codecs.base import Codec, FragmentShape
from holoray.codecs.planes_layout import FIRST_CUTS, LAYERS, RUN, LayerLayout, layer_layout
from holoray.codecs.planes_oracle import decode_tensor
from holoray.codecs.registry import register_codec
from holoray.errors import FormatError
from holoray.fragment import NO_PREREQUISITE
from holoray.tensor import TRANSFORMABLE, Array, TensorSpec

MAX_PLANES: Final = 16
MIN_TAIL_CUT: Final = -10
MAX_TAIL_CUT: Final = FIRST_CUTS[-1]
MIN_TOP: Final = FIRST_CUTS[0] + 1


@dataclass(frozen=True, slots=True)
class WordRange:
    """What exponent fields words of a dtype have: `smallest` of a normal number, `special` of NaN and infinities."""

    smallest: int
    special: int
    thresholds: tuple[int, int]


_FULL_RANGE: Final = WordRange(1, 255, (8, 240))
WORD_RANGES: Final = {
    "F32": _FULL_RANGE,
    "BF16": _FULL_RANGE,
    "F16": WordRange(113, 143, (113 - MAX_TAIL_CUT, 143)),
}


@register_codec
@dataclass(frozen=True)
class PlanesCodec(Codec):
    """Planes of one tensor. `threshold` is an exponent field of words; `top` and `tail_cut` are relative to it."""

    name: ClassVar[str] = "planes"
    layered: ClassVar[bool] = True
    whole_fragment_compression: ClassVar[bool] = False

    threshold: int
    top: int
    tail_cut: int

    @property
    def cuts(self) -> tuple[int, ...]:
        """Exponents relative to the threshold down to which layers 0 to 4 reach."""
        return (*FIRST_CUTS, self.tail_cut)

    def check(self, spec: TensorSpec) -> None:
        """Refuse dtypes other than F32, F16 and BF16, empty tensors, and numbers that kernels do not expect."""
        if spec.dtype not in TRANSFORMABLE or spec.size == 0:
            raise FormatError(
                f"planes cannot hold tensor {spec.name!r} ({spec.dtype}, {spec.size} elements)",
                hint="encode it as raw",
                tensor=spec.name,
            )
        words = WORD_RANGES[spec.dtype]
        low, high = words.thresholds
        if not (
            low <= self.threshold <= high
            and MIN_TOP <= self.top <= words.special - self.threshold
            and max(MIN_TAIL_CUT, words.smallest - self.threshold) <= self.tail_cut <= MAX_TAIL_CUT
            and self.top - self.tail_cut <= MAX_PLANES
        ):
            raise FormatError(f"impossible planes configuration {self} for {spec.dtype}", tensor=spec.name)

    def layers(self, spec: TensorSpec) -> int:
        return LAYERS + 1 if spec.dtype == "F32" else LAYERS

    def runs(self, spec: TensorSpec) -> int:
        return -(-spec.size // RUN)

    def run_weights(self, spec: TensorSpec, slot: int) -> int:
        """How many weights run `slot` has: 2^19, the last one fewer."""
        return min(RUN, spec.size - slot * RUN)

    def layout(self, spec: TensorSpec, layer: int, slot: int) -> LayerLayout:
        """What the body of one fragment consists of."""
        return layer_layout(spec.dtype, self.top, self.tail_cut, layer, self.run_weights(spec, slot))

    def shapes(self, spec: TensorSpec) -> Iterator[FragmentShape]:
        runs = self.runs(spec)
        for layer in range(self.layers(spec)):
            for slot in range(runs):
                index = layer * runs + slot
                layout = self.layout(spec, layer, slot)
                requires = index - runs if layer else NO_PREREQUISITE
                yield FragmentShape(index, layer, slot, requires, layout.min_bytes, layout.max_bytes)

    def decode(self, spec: TensorSpec, payloads: Mapping[int, Any]) -> Array:
        self.check(spec)
        runs = self.runs(spec)
        bodies: list[list[tuple[LayerLayout, memoryview]]] = []
        for slot in range(runs):
            bodies.append([])
            for layer in range(self.layers(spec)):
                if layer * runs + slot not in payloads:
                    break
                body = memoryview(payloads[layer * runs + slot]).cast("B")
                bodies[-1].append((self.layout(spec, layer, slot), body))
        return decode_tensor(spec, self.threshold, self.top, self.tail_cut, bodies)

    def can_reconstruct(self, spec: TensorSpec, present: frozenset[int]) -> bool:
        """Whether every run has its first layer."""
        return all(slot in present for slot in range(self.runs(spec)))
