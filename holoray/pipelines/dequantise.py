"""What a load hands over: tensors as they are stored, or the weights that quantised layers stand for.

An outlet says which tensors come out, in which order their parts should come in, and what stands between finished
tensors and whoever takes them. A quantised layer becomes its weight as soon as the last of its tensors is there, and
the units of a layer come one after another: no more than a few layers are in memory at a time.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from holoray.errors import HolorayError, UsageError
from holoray.formats.quantised import CONFIG_KEY, INT8, QuantisedLayer, find_quantisation
from holoray.kernels import dequant
from holoray.kernels.memory import zeros
from holoray.manifest import Manifest
from holoray.pipelines.plan import Unit
from holoray.pipelines.policy import CASTS
from holoray.tensor import Array, TensorSpec, as_bytes


class TensorSink(Protocol):
    """Who takes finished tensors, from several threads."""

    def write(self, name: str, array: Array) -> None: ...


class Outlet(Protocol):
    """What a load gives: see the module."""

    specs: Sequence[TensorSpec]
    metadata: Mapping[str, str]

    def order(self, work: Sequence[Unit]) -> Sequence[Unit]:
        """All planned units in the order in which they should come."""
        ...

    def before(self, sink: TensorSink) -> TensorSink:
        """What to hand finished tensors of the store, for the sink to get those of the outlet."""
        ...


class AsStored:
    """The tensors of the store."""

    def __init__(self, manifest: Manifest) -> None:
        self.specs: Sequence[TensorSpec] = [t.spec for t in manifest.tensors]
        self.metadata: Mapping[str, str] = manifest.metadata

    def order(self, work: Sequence[Unit]) -> Sequence[Unit]:
        return work

    def before(self, sink: TensorSink) -> TensorSink:
        return sink


class Dequantised:
    """Quantised layers as one weight each in `dtype` ("bf16", "f16" or "f32"), everything else as it is stored.

    A layer is all or nothing: where one of its tensors is not whole (left out of the plan, or skipped as corrupt, which
    `check` finds out by the digests of whole tensors) nothing is written, so that its weight is what the sink began
    with. Raises UsageError for an unknown dtype or a store without quantised layers, and the first fault of a layer.
    """

    def __init__(self, manifest: Manifest, dtype: str, *, check: bool) -> None:
        if dtype not in CASTS:
            raise UsageError(f"unknown dtype {dtype!r}", hint=f"choose one of {', '.join(CASTS)}")
        self._manifest = manifest
        self._check = check
        self.dtype = CASTS[dtype]
        found = find_quantisation((t.spec for t in manifest.tensors), manifest.metadata)
        for fault in found.faults:
            raise fault
        if not found.layers:
            of = f" that are known ({found.method})" if found.method else ""
            raise UsageError(f"the store has no quantised layers{of}", hint="load it without --dequantise")
        self._layers = {name: layer for layer in found.layers for name in layer.tensors}
        self.metadata: Mapping[str, str] = {key: value for key, value in manifest.metadata.items() if key != CONFIG_KEY}
        self.specs: Sequence[TensorSpec] = [
            self.weight_spec(self._layers[t.name]) if t.name in self._layers else t.spec
            for t in manifest.tensors
            if t.name not in self._layers or t.name == self._layers[t.name].q
        ]
        self._planned: Counter[int] = Counter()

    def order(self, work: Sequence[Unit]) -> Sequence[Unit]:
        """Mandatory tensors first as ever; a layer, which is all or nothing, where the first of its tensors stands."""
        tensors = self._manifest.tensors
        for unit in work:
            self._planned[unit.tensor] += len(unit.fragments)
        first: dict[str, int] = {}
        for t, tensor in enumerate(tensors):
            if tensor.name in self._layers:
                first.setdefault(self._layers[tensor.name].weight, t)

        def place(unit: Unit) -> tuple[bool, int]:
            layer = self._layers.get(tensors[unit.tensor].name)
            at = unit.tensor if layer is None else first[layer.weight]
            return not tensors[at].mandatory, at

        return sorted(work, key=place)  # stable: tensors of a layer and slots stay in their order

    def before(self, sink: TensorSink) -> TensorSink:
        return _LayerSink(self, sink)

    def layer_of(self, name: str) -> QuantisedLayer | None:
        return self._layers.get(name)

    def weight_of(self, layer: QuantisedLayer, tensors: Mapping[str, Array]) -> Array | None:
        """The weight of a layer from its tensors, None where one is not whole; raises FormatError for a bad one."""
        if not all(self._is_whole(name, tensors[name]) for name in layer.tensors):
            return None
        spec = self.weight_spec(layer)
        out = zeros(spec.shape, spec.numpy_dtype)
        with named(layer):
            dequant.dequantise(layer.packing, *operands(layer, tensors), out)
        return out

    def weight_spec(self, layer: QuantisedLayer) -> TensorSpec:
        """The weight that a layer becomes."""
        return TensorSpec(layer.weight, self.dtype, (layer.packing.rows, layer.packing.columns))

    def _is_whole(self, name: str, array: Array) -> bool:
        index = self._manifest.by_name[name]
        entry = self._manifest.tensors[index]
        if self._planned[index] < len(entry.fragments):
            return False
        return not self._check or hashlib.sha256(as_bytes(array).data).digest() == entry.sha256


@dataclass(slots=True)
class _LayerSink:
    """Keeps tensors of a layer until all are there; passes the others on."""

    outlet: Dequantised
    sink: TensorSink
    _waiting: dict[str, dict[str, Array]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, name: str, array: Array) -> None:
        layer = self.outlet.layer_of(name)
        if layer is None:
            self.sink.write(name, array)
            return
        with self._lock:
            tensors = self._waiting.setdefault(layer.weight, {})
            tensors[name] = array
            if len(tensors) < len(layer.tensors):
                return
            del self._waiting[layer.weight]
        weight = self.outlet.weight_of(layer, tensors)
        if weight is not None:
            self.sink.write(layer.weight, weight)


@contextmanager
def named(layer: QuantisedLayer) -> Iterator[None]:
    """Say in an error which layer it is about."""
    try:
        yield
    except HolorayError as error:
        error.tensor = error.tensor or layer.order or layer.q
        raise


def operands(layer: QuantisedLayer, tensors: Mapping[str, Any]) -> tuple[Any, Any, Any, npt.NDArray[Any] | None]:
    """Integers, scales, zeros and order as `dequantise` takes them; a number that stands for many must be NumPy's."""
    scales, zero = tensors[layer.scales], None if layer.zeros is None else tensors[layer.zeros]
    if layer.packing.method == INT8:  # one number for all, for each output, or for each of its groups
        shape = (layer.packing.rows, layer.packing.groups)
        scales, zero = _spread(scales, shape), None if zero is None else _spread(zero, shape)
    return tensors[layer.q], scales, zero, None if layer.order is None else tensors[layer.order]


def _spread(array: Any, shape: tuple[int, int]) -> Any:
    return array.reshape(shape) if array.size > 1 else np.full(shape, array)
