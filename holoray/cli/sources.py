"""Several sources on the command line: where they are named, and what became of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from holoray.cli.output import Output, human_bytes, short, shown, table
from holoray.cli.shares import all_shares
from holoray.errors import UsageError
from holoray.pipelines.fault_policy import FaultPolicy
from holoray.pipelines.open_sources import Place, read_sources
from holoray.pipelines.source_pool import SourceStats


def places(stores: Sequence[str] | None, file: Path | None, shares: Sequence[str] | None = None) -> tuple[Place, ...]:
    """The sources that are named (the first one may be a share, with others in `shares`), then those of a file.

    Raises UsageError for none, or for shares that nothing is said to be a share of.
    """
    if shares and not stores:
        raise UsageError("--share is about STORE, and none is named", hint="name one of the shares as STORE")
    first: list[Place] = [all_shares(store, shares) for store in (stores or ())[:1]]
    found = (*first, *(stores or ())[1:], *(read_sources(file) if file is not None else ()))
    if not found:
        raise UsageError("Missing argument 'STORE...'", hint="name a store, or a file with --sources; see --help")
    return found


def policy_of(skip_corrupted: bool, min_quality: float) -> FaultPolicy | None:
    """The policy that the options ask for, None for the usual one."""
    if min_quality and not skip_corrupted:
        raise UsageError("--min-quality is about what --skip-corrupted leaves", hint="or did you mean --quality?")
    return FaultPolicy(skip_corrupted=True, min_quality=min_quality) if skip_corrupted else None


def warn_of_skipped(out: Output, count: int) -> None:
    """Say that fragments were skipped, if any were."""
    if count:
        out.warn([f"{count} fragments are missing: they, or what they require, are corrupt or missing everywhere"])


def source_table(stats: Sequence[SourceStats]) -> Table:
    """What each source did."""
    rows = table("sources", "source", "state", ">received", ">errors", ">retries", ">hedged", ">wrong", "last error")
    for source in stats:
        rows.add_row(
            short(source.source),
            source.state,
            human_bytes(source.received_bytes),
            str(source.errors),
            str(source.retries),
            human_bytes(source.hedged_bytes),
            str(source.mismatches),
            shown(source.last_error or ""),
        )
    return rows
