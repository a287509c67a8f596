"""Runs of `planes` with outliers, zeros and escapes, opened and laid out as kernels want them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from on_cpu import CpuDevice

from holoray.codecs import get_codec
from holoray.codecs.planes import PlanesCodec
from holoray.kernels.device import Device
from holoray.kernels.device_accumulators import device_dtype, pack_sections
from holoray.kernels.planes_decode import RunLayers
from holoray.kernels.planes_groups import KINDS
from holoray.kernels.planes_launch import RUN, launch_on_cpu
from holoray.kernels.scratch import Scratch
from holoray.pipelines.tensor_codec import encode_tensor
from holoray.tensor import DTYPES, TensorSpec

Run = tuple[TensorSpec, PlanesCodec, npt.NDArray[np.uint8], list[int], npt.NDArray[np.uint64], RunLayers]
HOST: Final = CpuDevice(None)


@cache
def layers_of(dtype: str, count: int) -> Run:
    """All layers of a run of `count` random weights; the sections lie packed, on the host."""
    rng = np.random.default_rng(count)
    values = 0.05 * rng.standard_normal(count)
    values[rng.random(count) < 0.02] = 0
    values[rng.integers(0, count, 3)] = (40.0, 1e-7, -0.0)
    entry, fragments = encode_tensor(values.astype(DTYPES[dtype]), codec="planes")
    codec = get_codec(entry.codec, entry.config)
    assert isinstance(codec, PlanesCodec)
    run, scratch = RunLayers(0), Scratch()
    run.add(codec, entry.spec, {f.layer: fragments[f.index].payload for f in entry.fragments}, scratch)
    places = [p for layer in range(codec.layers(entry.spec)) for p in codec.layout(entry.spec, layer, 0).sections]
    packed, starts = pack_sections(run, places, scratch)
    return entry.spec, codec, packed.copy(), places, starts, run


class Laid:
    """Runs on a device: `outs` hold what each case has already, put there by the twin; `records` say how to go on."""

    def __init__(self, device: Device, runs: Sequence[Run], cases: Sequence[tuple[str, int, int]]) -> None:
        self.records = np.zeros(len(runs), RUN)
        self.outs, self._sections = [], [device.upload(run[2]) for run in runs]
        for run, (_, held, layers), record, sections in zip(runs, cases, self.records, self._sections, strict=True):
            self.outs.append(device.upload(_held(run, held)))
            record["out"] = device.address(self.outs[-1])
            record["sections"][run[3]] = device.address(sections) + run[4]
            _describe(record, run, held, layers)


def _held(run: Run, layers: int) -> Any:
    """The run's weights on the host, with its first `layers` layers."""
    spec, _, packed, places, starts, _ = run
    out = HOST.zeros(spec.shape, device_dtype(spec))
    if layers:
        record, sections = np.zeros(1, RUN), HOST.upload(packed)
        record["out"] = HOST.address(out)
        record[0]["sections"][places] = HOST.address(sections) + starts
        _describe(record[0], run, 0, layers)
        assert not launch_on_cpu(record).any()
    return out


def _describe(record: Any, run: Run, held: int, layers: int) -> None:
    spec, codec, *_, opened = run
    record["lengths"], record["offsets"] = opened.lengths, opened.offsets
    record["count"], record["kind"] = spec.size, KINDS[spec.dtype]
    record["threshold"], record["top"], record["tail_cut"] = codec.threshold, codec.top, codec.tail_cut
    record["held"], record["layers"] = held, layers
