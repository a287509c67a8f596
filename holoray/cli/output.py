"""What a command shows: one JSON object on stdout for machines, tables and bars on stderr for people at a terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from holoray.errors import HolorayError

_MAX_NAME = 60


@dataclass(frozen=True)
class Output:
    """Where results go. Off a terminal and without `--json` a command says one plain line."""

    json: bool
    quiet: bool

    @property
    def console(self) -> Console:
        return Console(stderr=True, highlight=False)

    @property
    def for_people(self) -> bool:
        return not self.json and not self.quiet and sys.stderr.isatty()

    def result(self, values: Mapping[str, Any], summary: str, *tables: Table) -> None:
        """Show a command's result: all `values` to a machine, `summary` and `tables` to a person."""
        if self.json:
            print(json.dumps(_finite(values), ensure_ascii=True, allow_nan=False))
        elif self.for_people:
            for table in tables:
                self.console.print(table)
            self.console.print(summary)
        elif not self.quiet:
            print(Console(no_color=True).render_str(summary).plain, file=sys.stderr)

    def drawing(self, draw: Callable[[int], str]) -> None:
        """Show what `draw` makes of a width in columns; off a terminal too, since it was asked for."""
        if not self.json and not self.quiet:
            self.console.print(draw(self.console.width), markup=False, soft_wrap=True)

    def warn(self, notes: Sequence[str]) -> None:
        """Lines for a person; a machine has them in the command's result."""
        if not self.json and not self.quiet:
            for note in notes:
                self.console.print(f"[bold yellow]warning:[/] {escape(printable(note))}", soft_wrap=True)

    @contextmanager
    def progress(self, what: str, total_bytes: int) -> Iterator[Callable[[int, str], None]]:
        """A bar of bytes; the callback takes the bytes done since and a note (e.g. the quality)."""
        if not self.for_people:
            yield lambda nbytes, note: None
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(what, total=max(total_bytes, 1), note="")
            yield lambda nbytes, note: bar.update(task, advance=nbytes, note=note)


def fail(error: HolorayError, output: Output) -> NoReturn:
    """One line that says what is wrong, one that says what to do; `--json` gets the same as an object."""
    if output.json:
        fields = {"type": type(error).__name__, "message": error.message, "hint": error.hint}
        where = {"tensor": error.tensor, "fragment": error.fragment, "source": error.source}
        print(json.dumps({"error": fields | where}))
    console = output.console
    console.print(f"[bold red]error:[/] {escape(printable(error.message))}", soft_wrap=True)
    if error.hint:
        console.print(f"[bold]hint:[/] {escape(printable(error.hint))}", soft_wrap=True)
    sys.exit(error.exit_code)


def table(title: str, *columns: str) -> Table:
    """An empty table; columns whose name starts with `>` are numbers."""
    out = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        out.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    return out


def printable(text: str) -> str:
    """Text from a file, safe for a terminal: control and bidi characters are escaped."""
    return "".join(c if c.isprintable() or c == " " else c.encode("unicode_escape").decode() for c in text)


def short(name: str) -> str:
    """A tensor name for a table: safe, and its middle left out where it is very long."""
    safe = printable(name)
    if len(safe) > _MAX_NAME:
        safe = f"{safe[: _MAX_NAME // 2]}…{safe[-_MAX_NAME // 2 :]}"
    return escape(safe)


def shown(path: object) -> str:
    """A path or other text of the user's for a summary: no markup, no control characters."""
    return escape(printable(str(path)))


def human_bytes(count: float) -> str:
    """1234567 -> '1.18 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def counted(count: int, noun: str) -> str:
    """'1 fault', '2 faults'."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def decibel(snr_db: float | None) -> str:
    return "exact" if snr_db is None or math.isinf(snr_db) else f"{snr_db:.1f} dB"


def _finite(value: Any) -> Any:
    """JSON has no infinity: an SNR without error becomes null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
