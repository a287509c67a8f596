"""Results as values for machines and tables for people."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.table import Table

from holoray.cli.output import counted, human_bytes, short, shown, table
from holoray.formats.quantised import find_quantisation
from holoray.manifest import Manifest
from holoray.pipelines.curve import minimum_fragments
from holoray.pipelines.sealed_store import SealedStore
from holoray.stores import ShareSet, Store

_CURVE_ROWS: Final = 12
_TENSOR_ROWS: Final = 40


def inspection(sealed: SealedStore, tensor: str | None = None) -> dict[str, Any]:
    """What `holoray inspect --json` prints; with `tensor`, its `per_tensor` and its curve are of that tensor alone.

    Raises UsageError if there is no such tensor.
    """
    start = time.perf_counter()
    manifest = sealed.manifest
    entries = manifest.tensors if tensor is None else [sealed.entry(tensor)]
    curve = sealed.curve(tensor)
    per_tensor = [
        {
            "name": t.name,
            "dtype": t.spec.dtype,
            "shape": list(t.spec.shape),
            "codec": t.codec,
            "fragments": len(t.fragments),
            "minimum_fragments": minimum_fragments(t),
            "bytes": t.stored_bytes,
            "mandatory": t.mandatory,
        }
        for t in entries
    ]
    return {
        "root": sealed.root,
        "tensors": len(manifest.tensors),
        "fragments": manifest.fragment_count,
        "bytes_in": manifest.bytes_in,
        "bytes_stored": manifest.bytes_stored,
        "options": dict(manifest.options),
        "quantised": quantised_of(manifest),
        "shares": shares_of(sealed.store),
        "per_tensor": per_tensor,
        "minimum_fragments": curve.minimum_fragments,
        "sufficient_fragments": curve.sufficient_fragments,
        "quality_curve": [point._asdict() for point in curve.points],
        "seconds": time.perf_counter() - start,
    }


def shares_of(store: Store) -> dict[str, Any] | None:
    """Which shares of a store are there, and the bytes of its parts in all places; None if it is in one piece."""
    if not isinstance(store, ShareSet):
        return None
    return {
        "total": store.table.total,
        "there": sorted(store.places),
        "needed": {file.stripes.name: file.stripes.needed for file in store.table.files},
        "bytes": store.table.total * sum(file.part_bytes for file in store.table.files),
        "missing": {str(index): why for index, why in store.missing.items()},
    }


def quantised_of(manifest: Manifest) -> dict[str, Any] | None:
    """The quantised layers: how many are packed in which way, and why some load only as they are stored.

    None for a checkpoint that neither says that it is quantised nor looks like it.
    """
    found = find_quantisation((t.spec for t in manifest.tensors), manifest.metadata)
    if not (found.method or found.layers or found.faults):
        return None
    ways = Counter((layer.packing.method, layer.packing.bits, layer.packing.group) for layer in found.layers)
    return {
        "method": found.method,
        "layers": [
            {"packing": packing, "bits": bits, "group": group, "count": count}
            for (packing, bits, group), count in ways.items()
        ],
        "faults": [{"tensor": fault.tensor, "why": fault.message} for fault in found.faults],
    }


def quantised_lines(values: Mapping[str, Any]) -> str:
    """The same for people: a line each way, one for all that is not understood; empty where nothing is quantised."""
    found = values["quantised"]
    if found is None:
        return ""
    lines = [
        f"{counted(way['count'], 'layer')} of {way['packing']}, {way['bits']} bits, a scale for {way['group']} inputs"
        for way in found["layers"]
    ]
    if not lines:
        lines = [f"by {found['method'] or 'nobody knows whom'}, tensors load only as they are stored"]
    if found["faults"]:
        lines.append(f"{counted(len(found['faults']), 'layer')} not understood: {found['faults'][0]['why']}")
    return "".join(f"\nquantised: {shown(line)}" for line in lines)


def tensor_table(values: Mapping[str, Any]) -> Table:
    """The tensors, largest first where there are many."""
    rows = values["per_tensor"]
    shown = sorted(rows, key=lambda row: -row["bytes"])[:_TENSOR_ROWS] if len(rows) > _TENSOR_ROWS else rows
    title = "tensors" if len(shown) == len(rows) else f"the {len(shown)} largest of {len(rows)} tensors"
    out = table(title, "name", "dtype", ">shape", "codec", ">fragments", ">stored")
    for row in shown:
        shape = " x ".join(map(str, row["shape"])) or "scalar"
        size = human_bytes(row["bytes"])
        out.add_row(short(row["name"]), row["dtype"], shape, row["codec"], str(row["fragments"]), size)
    return out


def curve_table(values: Mapping[str, Any]) -> Table:
    """The quality curve at evenly spaced numbers of bytes."""
    curve = values["quality_curve"]
    out = table("quality by bytes read", ">read", ">of the checkpoint", ">quality", ">relative error")
    total = curve[-1]["bytes"]
    for step in range(1, _CURVE_ROWS + 1):
        point = [p for p in curve if p["bytes"] <= total * step / _CURVE_ROWS][-1:]
        for p in point:
            share = p["bytes"] / max(values["bytes_in"], 1)
            error = math.sqrt(max(0.0, 1 - p["quality"]))
            out.add_row(human_bytes(p["bytes"]), f"{share:.1%}", f"{p['quality']:.6f}", f"{error:.2e}")
    return out


def generation_table(generations: Sequence[Mapping[str, Any]]) -> Table:
    """The generations that a warm-up published."""
    out = table("generations", ">generation", ">quality", ">read", ">seconds")
    for row in generations:
        out.add_row(
            str(row["generation"]), f"{row['quality']:.6f}", human_bytes(row["bytes_read"]), f"{row['seconds']:.2f}"
        )
    return out
