"""`holoray warmup`: a warm-up on Ray, followed from the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holoray.cli.output import Output
from holoray.errors import SourceError, UsageError
from holoray.pipelines.fault_policy import FaultPolicy
from holoray.pipelines.open_sources import Place, open_places
from holoray.pipelines.plan import Target, select

if TYPE_CHECKING:
    from holoray.actors.coordinator import Generation
    from holoray.actors.warm_model import WarmModel

DEFAULT_QUALITIES = (0.99, 0.9995, 1.0)


def run_warmup(
    out: Output,
    places: Sequence[Place],
    *,
    workers: int | None,
    qualities: Sequence[float],
    out_dir: Path | None,
    address: str | None,
    metrics_port: int | None,
    patience_s: float | None,
    expect: str | None,
    device: str = "cpu",
    device_bytes: int | None = None,
    decompress: str = "host",
    placement: str = "replicate",
    place: Sequence[str] = (),
    in_place: bool = False,
    fault_policy: FaultPolicy | None = None,
) -> dict[str, Any]:
    """Warm up to the last quality; returns what `holoray warmup --json` prints.

    `device`: cpu or cuda. `placement`: replicate or shard; `place`: GLOB=NUMBER texts for shard. Raises UsageError for
    what is for devices (`device_bytes`, a place to decompress, `in_place`, shards) where none is asked for.
    """
    _quiet_ray()
    from holoray.actors.accelerator import Accelerator
    from holoray.actors.placement import Placement
    from holoray.actors.roster import Policy
    from holoray.actors.warm_model import warm_up
    from holoray.kernels.frames import opens_on_device
    from holoray.pipelines.weights_memory import check_device_bytes

    accelerator = None
    if device == "cuda":
        accelerator = Accelerator(device_bytes=device_bytes, decompress=decompress, in_place=in_place)
    else:
        check_device_bytes(device_bytes, has_device=False)
        opens_on_device(decompress, None)
        if in_place:
            raise UsageError("--in-place is for GPUs: readers on a CPU keep each generation", hint="add --device cuda")
    places_of_tensors = Placement.parse(placement, place)
    policy = Policy() if patience_s is None else Policy(patience_s=patience_s)
    target = _model_file(out_dir)
    seen: list[Generation] = []
    qualities = qualities or DEFAULT_QUALITIES
    sealed = open_places(places, expect, fault_policy)
    planned = select(sealed.manifest, Target(quality=max(qualities)), skip_lost=sealed.policy.skip_corrupted)
    nbytes = sum(sealed.manifest.tensors[t].fragments[i].stored_bytes for t, i in planned)
    with out.progress("warming up", nbytes) as advance:

        def on_generation(model: WarmModel, generation: Generation) -> None:
            if target is not None:
                model.save(target)
            before = seen[-1].bytes_read if seen else 0
            seen.append(generation)
            advance(generation.bytes_read - before, f"generation {generation.generation}: {generation.quality:.5f}")

        # Ray prints what happens to its nodes to stdout, which is for our JSON.
        with (
            redirect_stdout(sys.stderr),
            warm_up(
                sealed.store,
                workers=workers,
                qualities=qualities,
                address=address,
                expect=expect,
                metrics_port=metrics_port,
                on_generation=on_generation,
                policy=policy,
                accelerator=accelerator,
                placement=places_of_tensors,
            ) as model,
        ):
            if metrics_port is not None and not out.json and not out.quiet and model.metrics_url:
                print(f"metrics at {model.metrics_url}", file=sys.stderr)
            last = model.wait(max(qualities))
            generations, root = model.generations, model.root
    return {
        "root": root,
        "tensors": len(sealed.manifest.tensors),
        "fragments": len(planned) - len(last.lost),
        "bytes_read": last.bytes_read,
        "quality": last.quality,
        "relative_error": last.relative_error,
        "snr_db": last.snr_db,
        "seconds": last.seconds,
        "generations": [{k: g[k] for k in ("generation", "quality", "bytes_read", "seconds")} for g in generations],
        "notes": list(sealed.store.notes()),
    } | ({"skipped": len(last.lost)} if sealed.policy.skip_corrupted else {})


def _quiet_ray() -> None:
    """A worker that died is replaced and counted; Ray need not print its obituary. Ray reads this when imported."""
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")


def _model_file(directory: Path | None) -> Path | None:
    if directory is None:
        return None
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(f"cannot write to {directory}: {error.strerror}", hint="choose another --out") from None
    return directory / "model.safetensors"
