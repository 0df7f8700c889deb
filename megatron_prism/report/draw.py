"""The report's charts: lines, dots with intervals, bars, and a plane of cells, each as SVG and PNG, each beside the table of its numbers.

A chart is as wide as a phone can show. Colours come with a shape or a label, since not every reader sees them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_prism.report.document import Column, Figure, Measured, Table, Value, number_of
from megatron_prism.report.style import shown, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

INK, FAINT = "#22262b", "#9aa3ad"  # of text and axes, of grid lines: a page replaces both by its own
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8a6d00", "#56B4E9", "#7a7f87")
SHAPES, DASHES = "osD^vPX", ("-", "--", "-.", ":", (0, (6, 1.5)), (0, (1, 2)), (0, (4, 1, 1, 1, 1, 1)))
WIDTH_INCHES, HEIGHT_INCHES, ROW_INCHES, ENDS_INCHES = 4.6, 2.5, 0.23, 0.95
MAX_LABEL, LABEL_POINTS = 26, 8.5
INKED: Any = {
    key: INK for key in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor", "hatch.color")
}


@dataclass(frozen=True)
class Series:
    """One line, or the dots of one kind. y: a figure for each x, None where it is not known. is_null: drawn faint, as what chance gives."""

    name: str
    x: tuple[float, ...]
    y: tuple[Value, ...]
    is_null: bool = False


def lines(id: str, title: str, x: Column, y: Column, series: Sequence[Series], log: bool = False) -> Figure:
    """Return a chart of lines, each with its name at its end and its interval as a band."""
    places = sorted({place for one in series for place in one.x})
    by_x = [dict(zip(one.x, one.y, strict=True)) for one in series]
    columns = (x, *(Column(one.name, y.unit, y.form) for one in series))
    rows = tuple((place, *(of.get(place) for of in by_x)) for place in places)

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        ends = []
        for number, one in enumerate(series):
            points = [(at, value) for at, value in zip(one.x, one.y, strict=True) if number_of(value) is not None]
            if not points:
                continue
            look: Any = {
                "color": FAINT if one.is_null else SERIES[number % len(SERIES)],
                "linestyle": DASHES[(number + number // len(SERIES)) % len(DASHES)],
            }
            shape = _shape(number)
            xs, ys = [at for at, _ in points], [number_of(value) or 0.0 for _, value in points]
            axes.plot(
                xs,
                ys,
                linewidth=1.4,
                marker=shape,
                markevery=max(len(points) // 12, 1),
                markersize=3.5,
                label=shown(one.name, MAX_LABEL),
                **look,
            )
            bands = [(at, v.low, v.high) for at, v in points if isinstance(v, Measured) and v.low is not None and v.high is not None]
            if bands:
                at, low, high = zip(*bands, strict=True)
                axes.fill_between(at, low, high, color=look["color"], alpha=0.18 if len(series) < 5 else 0.07, linewidth=0)
            ends.append((xs[-1], ys[-1], one.name, look["color"], shape))
        if log:
            axes.set_yscale("log")
        _frame(axes, "y")
        if all(place.is_integer() for place in places):
            axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
        axes.set_xlabel(x.title)
        axes.set_title(shown(y.title, 60), loc="left", fontsize=8)
        if len({round(end[0], 9) for end in ends}) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=7, handlelength=2.6, borderaxespad=0.2)
        elif len(ends) > 1:
            label_ends(canvas, axes, ends)

    return _figure(id, title, Table(f"{id}_data", title, columns, rows), HEIGHT_INCHES, draw)


def dots(id: str, title: str, x: Column, names: Sequence[str], series: Sequence[Series], what: str) -> Figure:
    """Return a chart with a row a name: a dot and its interval for each series. what: the names are of. Each series' y are by name."""
    columns = (Column(what), *(Column(one.name, x.unit, x.form, x.signed) for one in series))
    rows = tuple((name, *(one.y[place] for one in series)) for place, name in enumerate(names))

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for number, one in enumerate(series):
            spread = (number - (len(series) - 1) / 2) * min(0.16, 0.6 / len(series))
            points = [(place + spread, value) for place, value in enumerate(one.y) if number_of(value) is not None]
            colour = SERIES[number % len(SERIES)]
            for at, value in points:
                if isinstance(value, Measured) and value.low is not None and value.high is not None:
                    axes.plot([value.low, value.high], [at, at], color=colour, linewidth=1.1)
            hollow: dict[str, Any] = {"facecolors": "none"} if one.is_null else {"facecolors": colour}
            centres = [number_of(value) or 0.0 for _, value in points]
            axes.scatter(
                centres,
                [at for at, _ in points],
                s=20,
                marker=_shape(number),
                edgecolors=colour,
                zorder=3,
                label=shown(one.name, 40),
                **hollow,
            )
        axes.set_yticks(range(len(names)), [shown(name, MAX_LABEL) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        _frame(axes, "x")
        axes.set_xlabel(shown(x.title, 60))
        if len(series) > 1:
            canvas.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=7, handletextpad=0.2, columnspacing=1)

    height = ENDS_INCHES + ROW_INCHES * max(len(names), 3) * (1 if len(series) < 4 else 1.5) + 0.18 * ((len(series) + 1) // 2)
    return _figure(id, title, Table(f"{id}_data", title, columns, rows), height, draw)


def bars(id: str, title: str, x: Column, names: Sequence[str], values: Sequence[float], colours: Sequence[Any], table: Table) -> Figure:
    """Return a chart with a bar a name and its number at the end."""

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        drawn = axes.barh(range(len(names)), values, color=list(colours), height=0.72)
        axes.bar_label(drawn, [x.shown(value) for value in values], padding=3)
        axes.set_yticks(range(len(names)), [shown(name, MAX_LABEL) for name in names])
        axes.set_ylim(max(len(names), 3) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.set_xticks([])
        axes.margins(x=0.14)
        axes.set_xlabel(shown(x.title, 60), loc="left")

    return _figure(id, title, table, 0.55 + ROW_INCHES * max(len(names), 3), draw)


def plane(
    id: str, title: str, x: Column, y: Column, z: Column, xs: Sequence[float], ys: Sequence[float], cells: Sequence[Sequence[Value]]
) -> Figure:
    """Return a plane of cells, each with its number. cells: a row for each of ys."""
    rows = tuple((at_y, at_x, cells[row][place]) for row, at_y in enumerate(ys) for place, at_x in enumerate(xs))

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        numbers: Any = [[number_of(value) if number_of(value) is not None else float("nan") for value in row] for row in cells]
        image: Any = axes.pcolormesh(numbers, cmap="cividis", edgecolors=FAINT, linewidth=0.3)
        for row, values in enumerate(cells):
            for place, value in enumerate(values):
                number = number_of(value)
                if number is not None:
                    red, green, blue, _ = image.cmap(image.norm(number))
                    is_dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
                    axes.text(
                        place + 0.5,
                        row + 0.5,
                        format(number, z.form),
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="#fefefe" if is_dark else "black",
                    )
        axes.set_xticks([place + 0.5 for place in range(len(xs))], [f"{value:.3g}" for value in xs])
        axes.set_yticks([row + 0.5 for row in range(len(ys))], [f"{value:.3g}" for value in ys])
        axes.set_xlabel(x.title)
        axes.set_ylabel(y.title)
        axes.set_title(shown(z.title, 60), loc="left", fontsize=8)

    return _figure(id, title, Table(f"{id}_data", title, (y, x, z), rows, num_keys=2), HEIGHT_INCHES + 0.5, draw)


def _shape(number: int) -> str:
    """Return the shape of a series: where colours begin again, shapes do not."""
    return SHAPES[(number + number // len(SERIES)) % len(SHAPES)]


def _frame(axes: Axes, grid: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=FAINT, linewidth=0.5, alpha=0.5)
    axes.set_axisbelow(True)


def label_ends(canvas: Canvas, axes: Axes, ends: Sequence[tuple[float, float, str, str, str]]) -> None:
    """Write each line's name beside its end, behind its own shape, moved apart where they would overlap. ends: x, y, name, colour, shape."""
    canvas.draw_without_rendering()
    box = axes.get_window_extent()
    gap = LABEL_POINTS * canvas.dpi / 72
    wanted = sorted(((axes.transData.transform((x, y))[1] - box.y0, *look) for x, y, *look in ends), key=lambda end: end[:2])
    heights: list[float] = []
    for height, *_ in wanted:
        heights.append(max(height, heights[-1] + gap) if heights else max(height, 0.0))
    for place in range(len(heights) - 1, -1, -1):  # back below the top, and push the next one down as far as it must
        ceiling = heights[place + 1] - gap if place + 1 < len(heights) else box.height
        heights[place] = min(heights[place], ceiling)
    for height, (_, name, colour, shape) in zip(heights, wanted, strict=True):
        at = (1.035, height / box.height)
        axes.plot(*([end] for end in at), marker=shape, color=colour, markersize=4, transform=axes.transAxes, clip_on=False)
        axes.annotate(shown(name, MAX_LABEL), at, (6, 0), "axes fraction", "offset points", va="center", fontsize=7, annotation_clip=False)


def _figure(id: str, title: str, table: Table, height: float, draw: Callable[[Canvas], None]) -> Figure:
    """Draw twice, for SVG and PNG. The same numbers and matplotlib give the same bytes: no date, ids by the figure's name."""
    with style(id, "a report's figures", **INKED):
        from matplotlib.figure import Figure as Canvas

        canvas = Canvas(figsize=(WIDTH_INCHES, height), layout="constrained")
        draw(canvas)
        svg, png = io.StringIO(), io.BytesIO()
        canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        canvas.savefig(png, format="png", dpi=160, metadata={"Software": None})
    return Figure(id, title, table, svg.getvalue(), png.getvalue())
