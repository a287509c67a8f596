"""Quantised layers that become weights on a device, where their integers, scales and zeros lie for a stage only.

A stage is as many layers as take no more than the largest one or, where there is room, a small share of the weights.
When all of their tensors are in, kernels make the weights, and what these were made from is let go of before the next
stage begins. Everything else is to stay.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, Final

from holoray.formats.quantised import INT8, QuantisedLayer
from holoray.fragment import TensorEntry
from holoray.kernels import launchers
from holoray.kernels.accumulator import Accumulator
from holoray.kernels.device_accumulators import device_dtype
from holoray.manifest import Manifest
from holoray.pipelines.curve import Key
from holoray.pipelines.dequantise import Dequantised, named, operands
from holoray.pipelines.plan import Unit
from holoray.pipelines.weights_memory import DeviceWeights, HostMemory, tensor_nbytes
from holoray.tensor import TensorSpec

_STAGE_SHARE: Final = 32
"""Of the weights in bytes: at the end of a stage threads wait for each other, and for a model that is some 30 times."""


class DeviceLayers:
    """The destination of a load that dequantises: `prepare`, then for each of the `stages` a run, and `finish`.

    All arrays, and what decoding takes for a moment, are within the bytes of `memory`.
    """

    def __init__(self, manifest: Manifest, outlet: Dequantised, memory: DeviceWeights) -> None:
        self._manifest, self._outlet, self._memory = manifest, outlet, memory
        self._host = HostMemory(resident=False)
        self._staying: dict[int, Accumulator] = {}
        self._parts: dict[str, Any] = {}
        """Tensors of the stage's layers, as they are stored."""
        self.weights: dict[str, Any] = {}
        """What the outlet gives, by name: zeros where nothing is there."""

    def prepare(self, threads: int) -> int:
        """Make room for all that stays; of so many threads, how many may decode at a time.

        Raises CapacityError where that and the largest layer do not fit, UsageError for codecs that no device has.
        """
        manifest, device = self._manifest, self._memory.device
        layers = {t: self._outlet.layer_of(entry.name) for t, entry in enumerate(manifest.tensors)}
        states = sum(tensor_nbytes(manifest, t) - manifest.tensors[t].spec.nbytes for t, of in layers.items() if not of)
        largest = max(self._layer_nbytes(layer) for layer in layers.values() if layer)
        staying = sum(spec.nbytes for spec in self._outlet.specs) + states
        spare = self._memory.spare_bytes(staying, manifest, threads)
        self._stage_bytes = max(largest, min(staying // _STAGE_SHARE, spare))
        width = self._memory.width_beside(staying + self._stage_bytes, manifest, threads)
        for t, layer in layers.items():
            if layer is None:
                self._staying[t] = self._memory.accumulator(manifest, t)
                self.weights[manifest.tensors[t].name] = self._staying[t].out
            elif layer.q == manifest.tensors[t].name:
                spec = self._outlet.weight_spec(layer)
                with device.shared():
                    self.weights[spec.name] = device.zeros(spec.shape, device_dtype(spec))
        return width

    def stages(self, work: Sequence[Unit]) -> Iterator[Sequence[Unit]]:
        """Units in the outlet's order, cut before a layer for which there is no room beside those before it."""
        stage: list[Unit] = []
        layers: set[str] = set()
        nbytes = 0
        for unit in work:
            layer = self._layer_of(unit.tensor)
            if layer is not None and layer.weight not in layers:
                more = self._layer_nbytes(layer)
                if nbytes + more > self._stage_bytes:
                    yield stage
                    stage, layers, nbytes = [], set(), 0
                layers.add(layer.weight)
                nbytes += more
            stage.append(unit)
        yield stage

    def open(self, tensor: int) -> Accumulator:
        layer = self._layer_of(tensor)
        if layer is None:
            return self._staying[tensor]
        by_host = _is_read_by_host(layer, self._manifest.tensors[tensor].spec)
        accumulator = (self._host if by_host else self._memory).accumulator(self._manifest, tensor)
        self._parts[accumulator.spec.name] = accumulator.out
        return accumulator

    def close(self, tensor: int) -> None:
        self._staying.pop(tensor, None)  # its state; the weights are with us

    def finish(self, held: Container[Key]) -> None:
        """Make the weights of the stage's layers and let go of their tensors; `held`: fragments that are in.

        A layer that is not whole stays zeros. Raises the error of a bad layer.
        """
        parts, self._parts = self._parts, {}
        layers = {layer.weight: layer for layer in map(self._outlet.layer_of, parts) if layer is not None}
        with self._memory.device.shared():  # as all arrays were made: dropped when this has waited for the kernels
            for layer in layers.values():
                if all(self._is_whole(name, held) for name in layer.tensors):
                    with named(layer):
                        self._dequantise(layer, parts)

    def _dequantise(self, layer: QuantisedLayer, parts: Mapping[str, Any]) -> None:
        q, scales, zeros, order = operands(layer, parts)
        scales = self._there(layer, layer.scales, scales)
        zeros = None if layer.zeros is None else self._there(layer, layer.zeros, zeros)
        launchers.dequantise(self._memory.device, layer.packing, q, scales, zeros, order, self.weights[layer.weight])

    def _there(self, layer: QuantisedLayer, name: str, operand: Any) -> Any:
        """Scales or zeros on the device."""
        spec = self._entry(name).spec
        return self._memory.device.upload(operand.view(device_dtype(spec))) if _is_spread(layer, spec) else operand

    def _is_whole(self, name: str, held: Container[Key]) -> bool:
        tensor = self._manifest.by_name[name]
        return all((tensor, fragment.index) in held for fragment in self._entry(name).fragments)

    def _layer_of(self, tensor: int) -> QuantisedLayer | None:
        return self._outlet.layer_of(self._manifest.tensors[tensor].name)

    def _entry(self, name: str) -> TensorEntry:
        return self._manifest.tensors[self._manifest.by_name[name]]

    def _layer_nbytes(self, layer: QuantisedLayer) -> int:
        """Bytes of the device for the tensors of a layer, those that the host reads as they are uploaded."""
        packing = layer.packing
        spread = [spec for spec in (self._entry(name).spec for name in layer.tensors) if _is_spread(layer, spec)]
        nbytes = sum(tensor_nbytes(self._manifest, self._manifest.by_name[name]) for name in layer.tensors)
        return nbytes + sum(spec.numpy_dtype.itemsize * packing.rows * packing.groups for spec in spread)


def _is_read_by_host(layer: QuantisedLayer, spec: TensorSpec) -> bool:
    """Groups are checked there before a kernel reads them, and a number that stands for many is spread there."""
    return spec.name == layer.order or _is_spread(layer, spec)


def _is_spread(layer: QuantisedLayer, spec: TensorSpec) -> bool:
    return layer.packing.method == INT8 and spec.name != layer.q and spec.size == 1
