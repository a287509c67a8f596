"""Shares on the command line: how many, where the others are, what is wrong with them, and repairing them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table

from holoray.cli.output import Output, counted, shown, table
from holoray.errors import UsageError
from holoray.pipelines.repair import RepairReport, repair
from holoray.pipelines.share_check import BadPart, bytes_to_check, check_shares
from holoray.stores import Shares, ShareSet, Store, open_shares, open_store
from holoray.stores.base import GROUPS

_USABLE_LAYERS = 2.25


def spread(
    total: int | None,
    usable_from: int | None,
    exact_from: int | None,
    usable_layers: float | None,
    layer_shares: str | None,
) -> Shares | None:
    """What the options of `holoray encode` say; None for a store in one piece."""
    usable = (usable_from, exact_from, usable_layers)
    if total is None:
        if layer_shares is not None or any(option is not None for option in usable):
            raise UsageError("how many shares?", hint="add --shares N")
        return None
    if layer_shares is None:
        layers = _USABLE_LAYERS if usable_layers is None else usable_layers
        if not layers < GROUPS:  # NaN too; there are no more layers than groups of files
            raise UsageError(f"--usable-layers {layers} is too much", hint=f"it must be below {GROUPS}, e.g. 2.25")
        return Shares.usable(
            total,
            (total + 1) // 2 if usable_from is None else usable_from,
            max(total - 1, 1) if exact_from is None else exact_from,
            layers,
        )
    if any(option is not None for option in usable):
        raise UsageError("--layer-shares says it all", hint="leave the other options about layers out")
    try:
        needed = tuple(int(part) for part in layer_shares.split(","))
    except ValueError:
        raise UsageError(f"--layer-shares {layer_shares!r} is no list of numbers", hint="e.g. 4,4,7") from None
    return Shares(total, needed)


def all_shares(store: str, others: Sequence[str] | None) -> Store | str:
    """The store, or, where other places are given, the shares in all of them."""
    return open_shares([store, *others]) if others else store


def share_faults(out: Output, store: Store) -> list[BadPart]:
    """What is wrong with the shares of a store; nothing if it is in one piece."""
    if not isinstance(store, ShareSet):
        return []
    with out.progress("verifying shares", bytes_to_check(store)) as advance:
        return check_shares(store, lambda nbytes: advance(nbytes, ""))


def share_faults_table(faults: Sequence[BadPart]) -> Table:
    rows = table("shares", ">share", "place", "file", ">chunk", "why")
    for bad in faults:
        chunk = "" if bad.chunk is None else str(bad.chunk)
        rows.add_row(str(bad.share), shown(bad.place or ""), bad.file or "", chunk, shown(bad.why))
    return rows


def run_repair(out: Output, places: Sequence[str]) -> bool:
    """Repair and show what was done; returns whether all shares are whole now."""
    with out.progress("repairing", 0) as advance:
        report = repair([open_store(place) for place in places], lambda nbytes: advance(nbytes, ""))
    left = homeless(report)
    faults = len(report.failed) + len(left)
    done = f"{counted(len(report.repaired), 'file')} of shares rebuilt, {counted(faults, 'fault')} left"
    out.result(
        asdict(report) | {"ok": not faults},
        f"{done}, root {report.root}" if report.found else f"all {report.shares} shares are whole, root {report.root}",
        *([share_faults_table(report.found)] if report.found else []),
    )
    notes = [f"{bad.file}: {bad.why}" for bad in report.failed]
    out.warn(notes + [f"share {share} has no place: give one that is empty" for share in left])
    return not faults


def homeless(report: RepairReport) -> list[int]:
    """The shares that are missing and for which no place was given."""
    rebuilt = {part.share for part in report.repaired}
    return sorted({bad.share for bad in report.found if bad.file is None} - rebuilt)
