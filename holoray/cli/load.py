"""`holoray load`: a load into a file, followed from the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from holoray.cli.output import Output, counted, decibel, human_bytes, shown
from holoray.cli.sources import source_table, warn_of_skipped
from holoray.kernels.devices import open_device
from holoray.pipelines.fault_policy import FaultPolicy
from holoray.pipelines.open_sources import Place, open_places
from holoray.pipelines.plan import Target


def run_load(
    out: Output,
    places: Sequence[Place],
    target: Path,
    goal: Target,
    *,
    expect: str | None,
    policy: FaultPolicy | None,
    dequantise: str | None,
    device: str,
    device_bytes: int | None,
    decompress: str,
) -> None:
    """Load to a goal into the file `target`, and show what `holoray load --json` prints."""
    where = open_device(device)  # first: without the device nothing else matters
    sealed = open_places(places, expect, policy)
    manifest = sealed.manifest
    from holoray.pipelines.api import load_file  # the kernels: a wrong path is told without waiting for them

    with out.progress("loading", sealed.planned_bytes(goal)) as advance:

        def on_fragment(tensor: str, index: int, reached: float) -> None:
            entry = manifest.tensors[manifest.by_name[tensor]].fragments[index]
            advance(entry.stored_bytes, f"quality {reached:.5f}")

        report = load_file(
            sealed,
            target,
            goal,
            on_fragment,
            dequantise=dequantise,
            device=where or "cpu",
            device_bytes=device_bytes,
            decompress=decompress,
        )
    values, stats, notes = asdict(report), sealed.stats(), list(sealed.store.notes())
    skipped, spilled = values.pop("skipped"), values.pop("spilled")
    of_sources = {"skipped": skipped, "sources": [asdict(source) for source in stats]} if stats else {}
    of_device = {"device": device, "spilled": spilled} if where else {}
    out.result(
        values | of_device | of_sources | {"notes": notes},
        f"{shown(target)}: quality {values['quality']:.6f} ({decibel(values['snr_db'])}) from "
        f"{human_bytes(values['bytes_read'])} in {values['seconds']:.2f} s",
        *([source_table(stats)] if stats else []),
    )
    warn_of_skipped(out, skipped)
    if spilled:
        out.warn([f"{counted(spilled, 'tensor')} did not fit on {device} and went to the host, with the same weights"])
    out.warn(notes)
