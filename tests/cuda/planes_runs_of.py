"""Runs of `planes` with outliers, zeros and escapes, opened and laid out as kernels want them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from on_cpu import kernels_on_cpu

from holoray.codecs import get_codec
from holoray.codecs.planes import PlanesCodec
from holoray.kernels.device_accumulators import device_dtype, pack_sections
from holoray.kernels.planes_decode import RunLayers
from holoray.kernels.planes_groups import KINDS
from holoray.kernels.planes_launch import RUN
from holoray.kernels.scratch import Scratch
from holoray.pipelines.tensor_codec import encode_tensor
from holoray.tensor import DTYPES, TensorSpec

Launch = Callable[[npt.NDArray[Any]], npt.NDArray[np.uint32]]
Run = tuple[TensorSpec, PlanesCodec, npt.NDArray[np.uint8], list[int], npt.NDArray[np.uint64], RunLayers]


@cache
def layers_of(dtype: str, count: int) -> Run:
    """All layers of a run of `count` random weights; the sections lie packed."""
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
    return entry.spec, codec, kernels_on_cpu().upload(packed), places, starts, run


def records_of(
    runs: Sequence[Run], cases: Sequence[tuple[str, int, int]], *, run_to: Launch
) -> tuple[list[Any], npt.NDArray[Any], list[Any]]:
    """Outputs that hold the first `held` layers, put there by `run_to`; records to go on; and what to keep alive."""
    outs, records = [], np.zeros(len(runs), RUN)
    for (spec, codec, packed, places, starts, run), (_, held, layers), record in zip(runs, cases, records, strict=True):
        outs.append(kernels_on_cpu().zeros(spec.shape, device_dtype(spec)))
        record["out"] = outs[-1].ctypes.data
        record["sections"][places] = packed.ctypes.data + starts
        record["lengths"], record["offsets"] = run.lengths, run.offsets
        record["count"], record["kind"] = spec.size, KINDS[spec.dtype]
        record["threshold"], record["top"], record["tail_cut"] = codec.threshold, codec.top, codec.tail_cut
        record["held"], record["layers"] = 0, held
        if held:
            assert not run_to(record.reshape(1)).any()
        record["held"], record["layers"] = held, layers
    return outs, records, [run[2] for run in runs]
