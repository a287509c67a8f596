"""Launching the kernels of `planes`: runs described by records, many in one launch; and the twin on the CPU.

A record (`RUN`) says where a run's weights and raw sections lie, what it holds and what it is to hold. Both `launch`
and `launch_on_cpu` bring every run from `held` to `layers` and return uint32[runs]: 0, or a stream + 1 that does not
have as many entries as the planes ask for. The weights of such a run are then undefined; nothing else was touched.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from holoray.codecs import planes_layout as lay
from holoray.errors import UsageError
from holoray.kernels.bits import HARDWARE
from holoray.kernels.device import Device, Geometry
from holoray.kernels.planes_groups import F32
from holoray.kernels.planes_runs import FUSED_PLANES, decode_run, refine_run
from holoray.kernels.planes_words import ROWS

RUN: Final = np.dtype(
    [
        ("out", "<u8"),
        ("sections", "<u8", lay.SECTIONS),
        ("lengths", "<u4", lay.SECTIONS),
        ("offsets", "<u4", (lay.STREAMS, lay.BLOCKS + 1)),
        ("count", "<u4"),
        ("kind", "<i4"),
        ("threshold", "<i4"),
        ("top", "<i4"),
        ("tail_cut", "<i4"),
        ("held", "<i4"),
        ("layers", "<i4"),
        ("unused", "<u4", 2),
    ]
)
"""`Run` of planes.cuh: addresses where the kernels run, lengths in bytes; `SLACK` readable bytes behind sections."""
SLACK: Final = 16
THREADS: Final = 256
_OUTLIER_BYTES: Final = 4 * (lay.BLOCK // 32)


def kernels_for(held: int, layers: int) -> list[tuple[str, str]]:
    """Module and kernel of each step that takes a run from `held` to `layers` layers, in order."""
    if not 0 <= held < layers <= lay.LOW + 1:
        raise UsageError(f"planes cannot go from {held} layers to {layers}")
    if held == 0:
        return [("planes", "planes_decode_tail" if layers > lay.TAIL else "planes_decode")]
    steps = []
    if held < lay.TAIL:
        steps.append(("planes_refine", "planes_refine"))
    if held <= lay.TAIL < layers:
        steps.append(("planes_refine", "planes_tail"))
    return steps or [("planes_refine", "planes_low")]


ORDER: Final = (
    ("planes", "planes_decode"),
    ("planes", "planes_decode_tail"),
    ("planes_refine", "planes_refine"),
    ("planes_refine", "planes_tail"),
    ("planes_refine", "planes_low"),
)


def launch(device: Device, runs: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """Decode `runs` (RUN[n], addresses of the device); waits. Each kernel sees all runs and leaves the others alone."""
    if runs.dtype != RUN or runs.ndim != 1 or runs.size == 0:
        raise UsageError("launch takes RUN records, one at least")
    if not (int(runs["count"].min()) >= 1 and int(runs["count"].max()) <= lay.RUN):
        raise UsageError(f"a run has 1 to {lay.RUN} weights")
    if np.any(runs["out"] % 16) or np.any(runs["sections"] % 16):
        raise UsageError("runs and sections on a device lie at multiples of 16 bytes")
    steps = {step for run in runs for step in kernels_for(int(run["held"]), int(run["layers"]))}
    records, bad = device.upload(runs.view(np.uint8)), device.zeros(runs.shape, np.uint32)
    blocks = lay.blocks(int(runs["count"].max()))
    arguments = (np.uint64(device.address(records)), np.uint64(device.address(bad)), np.uint32(blocks))
    for module, kernel in ORDER:
        if (module, kernel) in steps:
            shared = _OUTLIER_BYTES if kernel == "planes_decode_tail" else 0
            device.launch(module, kernel, Geometry(blocks * runs.size, THREADS, shared), arguments)
    return device.download(bad)


def launch_on_cpu(runs: npt.NDArray[Any], *, hardware: bool = HARDWARE) -> npt.NDArray[np.uint32]:
    """The same by the Numba kernels, with addresses of this process."""
    work = np.zeros((ROWS, 64), np.uint64)
    return np.array([_on_cpu(run, work, hardware) for run in runs], np.uint32)


def _on_cpu(run: Any, work: npt.NDArray[np.uint64], hardware: bool) -> int:
    count, kind, held, layers = (int(run[name]) for name in ("count", "kind", "held", "layers"))
    halves = ctypes.c_uint16 * (count * (2 if kind == F32 else 1))
    out = np.ctypeslib.as_array(halves.from_address(int(run["out"])))
    fixed = (out, count, kind, int(run["threshold"]), int(run["top"]), int(run["tail_cut"]))
    sections = (run["sections"].astype(np.int64), run["lengths"].astype(np.int64), run["offsets"], work, hardware)
    return decode_layers(fixed, held, layers, sections)


def decode_layers(fixed: tuple[Any, ...], held: int, layers: int, sections: tuple[Any, ...]) -> int:
    """Bring one run from `held` to `layers` layers with the Numba kernels; returns 0 or the bad stream + 1.

    `fixed` is (out, count, kind, threshold, top, tail_cut), `sections` (addresses, lengths, offsets, work, hardware).
    """
    bad = 0
    if held == 0:
        top, tail_cut = fixed[-2:]
        held = layers if top - tail_cut <= FUSED_PLANES or layers <= lay.TAIL else lay.TAIL
        bad = decode_run(*fixed, held, *sections)  # type: ignore[call-arg]
    if not bad and held < layers:
        bad = refine_run(*fixed, held, layers, *sections)  # type: ignore[call-arg]
    return int(bad)
