"""Load in one process, into its memory or a device's: to a target, and on from there."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from holoray.formats.safetensors import SafetensorsWriter
from holoray.kernels.accumulator import Accumulator
from holoray.kernels.device import Device
from holoray.kernels.frames import HOST, opens_on_device
from holoray.kernels.memory import zeros
from holoray.manifest import Manifest
from holoray.pipelines.curve import Key
from holoray.pipelines.dequantise import AsStored, Dequantised, Outlet, TensorSink
from holoray.pipelines.device_layers import DeviceLayers
from holoray.pipelines.fault_policy import FaultPolicy
from holoray.pipelines.fragment_pipeline import FragmentPipeline
from holoray.pipelines.ledger import QualityLedger
from holoray.pipelines.meter import Meter
from holoray.pipelines.plan import Target, Unit, check_mandatory, check_quality_reached, select, units
from holoray.pipelines.source_pool import SourcePool
from holoray.pipelines.verify import check_sizes
from holoray.pipelines.weights_memory import (
    DeviceWeights,
    HostMemory,
    SpillingMemory,
    WeightsMemory,
    check_device_bytes,
    check_room,
)
from holoray.quality import Quality
from holoray.stores.base import Store
from holoray.tensor import Array

OnFragment = Callable[[str, int, float], None]
"""Called with tensor name, fragment index and the model's quality after each fragment; from several threads."""


class Loader:
    """Weights of a sealed store in this process's memory, refined in place by every further `load`.

    With `device` they are arrays of that device, which together with all work in flight takes `device_bytes` at most
    (default: what is free now, less a reserve). When it lacks memory on the way, fewer threads decode at a time.
    `decompress`: where zstd frames are opened, see `opens_on_device`.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        *,
        strict: bool = False,
        meter: Meter | None = None,
        policy: FaultPolicy | None = None,
        device: Device | None = None,
        device_bytes: int | None = None,
        decompress: str = HOST,
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._policy = policy or FaultPolicy()
        opens_frames = _opens_frames(device, device_bytes, decompress)
        self._memory: WeightsMemory = (
            HostMemory() if device is None else DeviceWeights(device, device_bytes, opens_frames=opens_frames)
        )
        self._pipeline = _pipeline(store, manifest, strict, meter, self._policy, device, opens_frames)
        self._progress = Progress(manifest)
        self._accumulators: list[Accumulator] = []

    def load(self, target: Target | None = None, on_fragment: OnFragment | None = None) -> Quality:
        """Fetch what the target needs and is not there yet; returns the quality reached.

        Raises QualityError or CapacityError before anything is read if the target cannot be met, IntegrityError for
        a damaged fragment, SourceError if no source answers; what was loaded before stays usable. With a policy that
        skips what is corrupted, the quality reached may be below the target; QualityError below its `min_quality`, or
        where a mandatory tensor is corrupt.

        Whatever it raises, every slot holds whole fragments, those that `quality` counts: nothing is half written.
        """
        target = target or Target()
        wanted = select(self._manifest, target, skip_lost=self._policy.skip_corrupted)
        keys = [key for key in wanted if key not in self._progress]
        _check_store(self._store, self._manifest, self._policy)
        width = self._memory.prepare(self._manifest, self._pipeline.threads)
        self._make_room()
        self._pipeline.run(units(self._manifest, keys), self, self._progress.callback(on_fragment), width=width)
        _check_end(self._manifest, self._progress, target, self._policy)
        return self.quality

    @property
    def quality(self) -> Quality:
        return self._progress.quality

    @property
    def bytes_read(self) -> int:
        """Bytes fetched so far, manifest included."""
        return self._progress.bytes_read

    @property
    def fragments_read(self) -> int:
        return self._progress.fragments_read

    def state_dict(self) -> dict[str, Any]:
        """The weights as they are now (zeros where nothing is there yet); later loads refine them in place.

        On a device BF16 is uint16: `torch.from_dlpack(array).view(torch.bfloat16)` shares its memory.
        """
        self._make_room()
        return {
            t.name: accumulator.out for t, accumulator in zip(self._manifest.tensors, self._accumulators, strict=True)
        }

    def open(self, tensor: int) -> Accumulator:
        return self._accumulators[tensor]

    def close(self, tensor: int) -> None:
        """Weights stay with us."""

    def _make_room(self) -> None:
        """All tensors, or none, before the first byte is read."""
        if not self._accumulators:
            tensors = range(len(self._manifest.tensors))
            self._accumulators = [self._memory.accumulator(self._manifest, tensor) for tensor in tensors]


class Progress:
    """Which fragments are in, from several threads."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._ledger = QualityLedger(manifest.tensors)
        self._keys: set[Key] = set()
        self._lock = threading.Lock()
        self.bytes_read = len(manifest.encoded)
        self.spilled: tuple[str, ...] = ()
        """Tensors for which a device had no room, so that they were decoded on the host."""

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    @property
    def quality(self) -> Quality:
        return self._ledger.quality

    @property
    def fragments_read(self) -> int:
        return len(self._keys)

    def callback(self, on_fragment: OnFragment | None) -> Callable[[Unit], None]:
        def on_unit(unit: Unit) -> None:
            with self._lock:
                self.bytes_read += unit.stored_bytes
                for fragment in unit.fragments:
                    self._keys.add((unit.tensor, fragment.index))
                    self._ledger.add(unit.tensor, fragment.index)
                    if on_fragment is not None:
                        name = self._manifest.tensors[unit.tensor].name
                        on_fragment(name, fragment.index, self._ledger.quality.ratio)

        return on_unit


class FileDestination:
    """Tensors go to a file, or to whoever else takes them, as they are finished: the model need not fit into memory."""

    def __init__(self, manifest: Manifest, writer: TensorSink, memory: WeightsMemory) -> None:
        self._manifest = manifest
        self._writer = writer
        self._memory = memory
        self._open: dict[int, Accumulator] = {}

    def open(self, tensor: int) -> Accumulator:
        self._open[tensor] = self._memory.accumulator(self._manifest, tensor)
        return self._open[tensor]

    def close(self, tensor: int) -> None:
        accumulator = self._open.pop(tensor)
        self._writer.write(accumulator.spec.name, self._memory.take(accumulator))


def load_to_file(
    store: Store,
    manifest: Manifest,
    path: str | os.PathLike[str],
    target: Target,
    *,
    strict: bool = False,
    meter: Meter | None = None,
    on_fragment: OnFragment | None = None,
    policy: FaultPolicy | None = None,
    dequantise: str | None = None,
    device: Device | None = None,
    device_bytes: int | None = None,
    decompress: str = HOST,
) -> Progress:
    """Load to a target straight into a safetensors file (whole or not at all); tensors left out are zeros.

    `dequantise`: quantised layers become one weight each in this dtype, as `Dequantised` says. With `device` tensors
    are decoded there, within `device_bytes`; those that do not fit, on the host. `decompress`: see `opens_on_device`.
    """
    policy = policy or FaultPolicy()
    opens_frames = _opens_frames(device, device_bytes, decompress)
    outlet = _outlet(manifest, dequantise, policy)
    keys = select(manifest, target, skip_lost=policy.skip_corrupted)
    _check_store(store, manifest, policy)
    progress = Progress(manifest)
    memory = (
        HostMemory(resident=False)
        if device is None
        else SpillingMemory(device, device_bytes, opens_frames=opens_frames)
    )
    pipeline = _pipeline(store, manifest, strict, meter, policy, device, opens_frames)
    width = memory.prepare(manifest, pipeline.threads)
    with SafetensorsWriter(path, outlet.specs, outlet.metadata) as writer:
        # Bytes never written read as zeros: the writer allocates the file up front.
        destination = FileDestination(manifest, outlet.before(writer), memory)
        work = outlet.order(units(manifest, keys))
        pipeline.run(work, destination, progress.callback(on_fragment), width=width)
        _check_end(manifest, progress, target, policy)
    progress.spilled = tuple(memory.spilled) if isinstance(memory, SpillingMemory) else ()
    return progress


def load_dequantised(
    store: Store,
    manifest: Manifest,
    target: Target,
    dequantise: str,
    *,
    strict: bool = False,
    on_fragment: OnFragment | None = None,
    policy: FaultPolicy | None = None,
    device: Device | None = None,
    device_bytes: int | None = None,
    decompress: str = HOST,
) -> dict[str, Any]:
    """Load to a target into memory, quantised layers as weights; no more than a few layers are there in both forms.

    With `device` these are arrays of that device, made there within `device_bytes`, and what layers are made from is
    never more than `DeviceLayers` says.
    """
    policy = policy or FaultPolicy()
    opens_frames = _opens_frames(device, device_bytes, decompress)
    outlet = Dequantised(manifest, dequantise, check=policy.skip_corrupted)
    keys = select(manifest, target, skip_lost=policy.skip_corrupted)
    _check_store(store, manifest, policy)
    progress = Progress(manifest)
    pipeline = _pipeline(store, manifest, strict, None, policy, device, opens_frames)
    work, on_unit = outlet.order(units(manifest, keys)), progress.callback(on_fragment)
    if device is not None:
        layers = DeviceLayers(manifest, outlet, DeviceWeights(device, device_bytes, opens_frames=opens_frames))
        width = layers.prepare(pipeline.threads)
        for stage in layers.stages(work):
            pipeline.run(stage, layers, on_unit, width=width)
            layers.finish(progress)
        _check_end(manifest, progress, target, policy)
        return layers.weights
    check_room(sum(spec.nbytes for spec in outlet.specs))
    taken = _Tensors()
    destination = FileDestination(manifest, outlet.before(taken), HostMemory(resident=False))
    pipeline.run(work, destination, on_unit)
    _check_end(manifest, progress, target, policy)
    return {
        spec.name: taken.arrays[spec.name] if spec.name in taken.arrays else zeros(spec.shape, spec.numpy_dtype)
        for spec in outlet.specs
    }


class _Tensors:
    """A sink that keeps arrays."""

    def __init__(self) -> None:
        self.arrays: dict[str, Array] = {}

    def write(self, name: str, array: Array) -> None:
        self.arrays[name] = array


def _opens_frames(device: Device | None, device_bytes: int | None, decompress: str) -> bool:
    """Whether zstd frames are opened on the device; raises UsageError for options of a device that is not there."""
    check_device_bytes(device_bytes, has_device=device is not None)
    return opens_on_device(decompress, device)


def _outlet(manifest: Manifest, dequantise: str | None, policy: FaultPolicy) -> Outlet:
    return AsStored(manifest) if dequantise is None else Dequantised(manifest, dequantise, check=policy.skip_corrupted)


def _check_end(manifest: Manifest, progress: Progress, target: Target, policy: FaultPolicy) -> None:
    """Raise QualityError if what was skipped is more than may be."""
    check_mandatory(manifest, progress, "what cannot be skipped is corrupt or missing in every source")
    check_quality_reached(progress.quality, target, policy)


def _pipeline(
    store: Store,
    manifest: Manifest,
    strict: bool,
    meter: Meter | None,
    policy: FaultPolicy,
    device: Device | None,
    opens_frames: bool = False,
) -> FragmentPipeline:
    return FragmentPipeline(
        store,
        manifest,
        strict=strict,
        meter=meter,
        skip_corrupted=policy.skip_corrupted,
        device=device,
        opens_frames=opens_frames,
    )


def _check_store(store: Store, manifest: Manifest, policy: FaultPolicy) -> None:
    """Find a truncated store out before memory is allocated; but where others may have what it lacks, let it be."""
    if not policy.skip_corrupted and not isinstance(store, SourcePool):
        check_sizes(store, manifest)
