"""Quality curves as pictures: on a terminal of any width, without colour, or in a file."""

from __future__ import annotations

import io
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from plotille import Figure

from holoray.cli.output import decibel, human_bytes, printable
from holoray.errors import QualityError, SourceError, UsageError
from holoray.pipelines.curve import QualityCurve, store_curve
from holoray.pipelines.sealed_store import SealedStore

FORMATS: Final = (".png", ".svg", ".pdf")
CEILING_DB: Final = 60.0  # what is exact, or nearly, is drawn here: infinity has no place on an axis
MARKED_QUALITIES: Final = (0.9, 0.99, 0.999)
_MARKERS: Final = (None, "o", "x", "+", "*", "%")  # None: the first line is drawn, the others are dotted
_STYLES: Final = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
_BESIDE: Final = 22  # columns of the vertical axis and of the end of the horizontal one
_TICK: Final = 10  # columns from tick to tick of the horizontal one
_TITLE: Final = "SNR in dB (20: quality .99, 30: .999) by bytes read, % of the weights"


@dataclass(frozen=True, slots=True)
class Mark:
    """A point worth a name: how much must be read for a quality, or for everything."""

    label: str
    nbytes: int
    percent: float
    snr_db: float


@dataclass(frozen=True, slots=True)
class Line:
    """One curve to draw: percent of the weights' bytes (ascending), SNR in dB (clipped to 0..60), and its marks."""

    label: str
    percent: tuple[float, ...]
    snr_db: tuple[float, ...]
    marks: tuple[Mark, ...]

    def at(self, percent: float) -> float | None:
        """The SNR once so much is read; None before the first point."""
        place = bisect_right(self.percent, percent) - 1
        return self.snr_db[place] if place >= 0 else None


def lines_of(sealed: SealedStore, tensor: str | None = None) -> list[Line]:
    """The whole store, and each codec apart where it has several; or one tensor.

    Raises UsageError if there is no such tensor.
    """
    if tensor is not None:
        entry = sealed.entry(tensor)
        return [_line(f"{printable(tensor)} ({entry.codec})", sealed.curve(tensor), entry.spec.nbytes)]
    lines = [_line("whole store", sealed.curve(), sealed.manifest.bytes_in)]
    sizes: dict[str, int] = {}
    for entry in sealed.manifest.tensors:
        if not entry.mandatory:
            sizes[entry.codec] = sizes.get(entry.codec, 0) + entry.spec.nbytes
    if len(sizes) > 1:
        lines += [_line(f"{codec} alone", store_curve(sealed.manifest, codec), n) for codec, n in sizes.items()]
    return lines


def _line(label: str, curve: QualityCurve[Any], size: int) -> Line:
    scale = 100 / max(size, 1)
    percent = tuple(n * scale for n in curve.nbytes)
    snr_db = tuple(min(max(q.snr_db, 0.0), CEILING_DB) for q in curve.qualities)
    return Line(label, percent, snr_db, tuple(_marks(curve, scale)))


def _marks(curve: QualityCurve[Any], scale: float) -> Iterator[Mark]:
    for quality in MARKED_QUALITIES:
        try:
            nbytes = curve.bytes_for_quality(quality)
        except QualityError:
            continue
        if nbytes < curve.nbytes[-1]:
            yield Mark(_nines(quality), nbytes, nbytes * scale, -10 * math.log10(1 - quality))
    last = curve.qualities[-1].snr_db
    label = "exact" if math.isinf(last) else f"all ({decibel(last)})"
    yield Mark(label, curve.nbytes[-1], curve.nbytes[-1] * scale, min(last, CEILING_DB))


def on_terminal(lines: Sequence[Line], width: int) -> str:
    """A drawing about `width` columns wide (50 at least), and under it how much must be read for what is marked."""
    tens = max((width - _BESIDE) // _TICK, 4)
    step_db = 3 if width >= 80 else 6
    percent_a_tick = _round_step(max(line.percent[-1] for line in lines) * 1.06 / tens)
    columns, right = tens * _TICK, tens * percent_a_tick
    figure = Figure()
    figure.width, figure.height = columns, int(CEILING_DB) // step_db + 1
    figure.with_colors, figure.origin = False, False
    figure.set_x_limits(min_=0.0, max_=right)
    figure.set_y_limits(min_=0.0, max_=CEILING_DB + step_db)
    figure.x_label, figure.y_label = "%", "dB"
    figure.y_ticks_fkt = lambda low, high: f"{round(float(low))}"
    figure.x_ticks_fkt = lambda low, high: f"{float(low):g}"
    for line, marker in zip(lines, _MARKERS, strict=False):
        xs, ys = _sampled(line, right, columns if marker else 2 * columns, every=3 if marker else 1)
        if marker is None:
            figure.plot(xs, ys)
        else:
            figure.scatter(xs, ys, marker=marker)
    for mark in lines[0].marks:
        figure.text([mark.percent], [mark.snr_db], [f"◆ {mark.label}"])
    return "\n".join([_TITLE, figure.show(), "", *_legend(lines)])


def _legend(lines: Sequence[Line]) -> Iterator[str]:
    """How much must be read, in percent, a row a line and a column a quality."""
    wide = max(len(line.label) for line in lines)
    yield f"    {'to reach':{wide}}" + "".join(f"{_nines(q):>9}" for q in MARKED_QUALITIES) + f"{'the end':>9}"
    for line, marker in zip(lines, _MARKERS, strict=False):
        reached = {mark.label: f"{mark.percent:.1f} %" for mark in line.marks[:-1]}
        *_, end = line.marks
        cells = "".join(f"{reached.get(_nines(q), ''):>9}" for q in MARKED_QUALITIES)
        yield f"  {marker or '⠒'} {line.label:{wide}}{cells}{end.percent:7.1f} % {end.label}"


def _nines(quality: float) -> str:
    return f"{quality:g}"[1:]


def _round_step(least: float) -> float:
    """The smallest round number that is not less."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if step * power >= least)


def _sampled(line: Line, right: float, count: int, *, every: int) -> tuple[list[float], list[float]]:
    """What the line reaches at evenly spaced places: a curve may have a million points and a terminal has 80."""
    places = [min(right * i / count, line.percent[-1]) for i in range(0, count + 1, every)]
    known = [(x, y) for x in dict.fromkeys(places) if (y := line.at(x)) is not None]
    return [x for x, _ in known], [y for _, y in known]


def check_file(path: Path) -> None:
    """Raise UsageError for a file that cannot be drawn: an unknown format, or without matplotlib."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"cannot draw {path}", hint=f"choose a name that ends in {', '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            "drawing to a file needs matplotlib", hint="pip install 'holoray[plot]', or draw on the terminal"
        ) from None


def to_file(lines: Sequence[Line], path: Path, title: str) -> None:
    """Draw into a .png, .svg or .pdf; raises UsageError as `check_file` does, SourceError if it cannot be written."""
    check_file(path)
    drawn = io.BytesIO()  # first in memory: a drawing that fails leaves no half a file
    _figure(lines, title).savefig(drawn, format=path.suffix.lower().removeprefix("."), dpi=150)
    try:
        path.write_bytes(drawn.getvalue())
    except OSError as error:
        raise SourceError(f"cannot write {path}: {error.strerror}", hint="does its directory exist?") from None


def _figure(lines: Sequence[Line], title: str) -> Any:
    from matplotlib.figure import Figure as Canvas  # not pyplot: no global state, no display

    figure = Canvas(figsize=(9, 5.4), layout="constrained")
    axes = figure.subplots()
    for number, (line, style) in enumerate(zip(lines, _STYLES, strict=False)):
        (drawn,) = axes.plot(line.percent, line.snr_db, drawstyle="steps-post", label=line.label)
        drawn.set(linestyle=style, linewidth=1.5 if number else 2.2)
        for mark in line.marks:
            axes.plot(mark.percent, mark.snr_db, "D", color=drawn.get_color(), markersize=6, clip_on=False, zorder=3)
    for mark in lines[0].marks:
        axes.annotate(
            f"{mark.label}: {mark.percent:.1f} %\n{human_bytes(mark.nbytes)}",
            (mark.percent, mark.snr_db),
            xytext=(-8, 6),
            textcoords="offset points",
            horizontalalignment="right",
            fontsize=9,
        )
    axes.set_title(title, parse_math=False)  # a name may hold a `$`
    axes.set(xlabel="bytes read, % of the weights' own size", ylabel="signal-to-noise ratio of the weights, dB")
    axes.set_xlim(0, 1.04 * max(line.percent[-1] for line in lines))
    decades = range(0, int(CEILING_DB) + 1, 10)
    axes.set_ylim(0, CEILING_DB + 7)
    axes.set_yticks(decades, [*map(str, decades[:-1]), f"{decades[-1]}+"])
    axes.grid(alpha=0.3)
    nines = axes.secondary_yaxis("right")
    nines.set_yticks(decades, ["0", *("." + "9" * (db // 10) for db in decades[1:-1]), "exact"])
    nines.set_ylabel("quality")
    if len(lines) > 1:
        figure.legend(loc="outside lower center", ncols=3)
    return figure
