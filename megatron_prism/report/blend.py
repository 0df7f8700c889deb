"""A mixture as a reader sees it: bars of its sources, a ring of its domains, and a few of its documents."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prism.core.errors import BackendMissing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers; a known domain has the same one in every figure.
COLOURS = {"math": "#0072B2", "code": "#E69F00", "science": "#009E73", "general": "#CC79A7", "other": "#999999"}
MORE_COLOURS = ("#56B4E9", "#D55E00", "#F0E442")
MAX_CHARS = 800  # of a document in samples.md
FONT_POINTS, SMALL_POINTS, DPI = 8, 7, 200
MAX_SHOWN = 400  # characters of a name or a title that are looked at
# The figure in inches: its width; names, bars and their numbers; names at the ring; a row; the ring's radius; a line of the legend; the title.
WIDTH, NAMES, BARS, NUMBERS, RING_NAMES, ROW, RADIUS, LEGEND, TOP = 13.8, 2.5, 1.6, 2.5, 1.3, 0.27, 1.3, 0.18, 0.5
LEGEND_COLUMNS, LEGEND_NAMES = 4, 0.7
RING_MIDDLE, RING_INNER = 0.7, 0.36  # in radii: sources outside the first, domains between the two
MIN_INSIDE, MIN_NAMED = 0.095, 0.01  # a smaller wedge cannot hold its percentage; cannot be seen


@dataclass(frozen=True)
class BlendPart:
    """A source's part of a mixture: its share of the training tokens (all of them sum to 1); None is not known."""

    name: str
    domain: str | None
    share: float
    tokens: int | None
    epochs: float | None


def draw(parts: Sequence[BlendPart], title: str, out: Path) -> list[Path]:
    """Write `out`/blend.png and `out`/blend.svg, the same bytes for the same parts and matplotlib.

    Raises: BackendMissing without matplotlib.
    """
    paths = [out / "blend.png", out / "blend.svg"]
    with _style():
        drawn = figure(parts, title)
        out.mkdir(parents=True, exist_ok=True)
        for path, metadata in zip(paths, ({"Software": None}, {"Date": None, "Creator": None}), strict=True):
            drawn.savefig(path, metadata=metadata)
    return paths


def figure(parts: Sequence[BlendPart], title: str) -> Figure:
    """Return the figure: bars, the largest share on top, beside a ring of the sources by domain.

    Raises: BackendMissing without matplotlib.
    """
    with _style():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        assert parts and math.isclose(sum(part.share for part in parts), 1, abs_tol=1e-6), "shares sum to 1"
        rows = sorted(parts, key=lambda part: -part.share)
        domains = domain_shares(rows)
        colours = _colours(rows, domains)
        content = max(ROW * len(rows), 2.5 * RADIUS)
        bottom = 0.6 + LEGEND * (len(domains) // LEGEND_COLUMNS)
        height = TOP + content + bottom
        drawn = Figure(figsize=(WIDTH, height))
        FigureCanvasAgg(drawn)
        bars = (NAMES, bottom + (content - ROW * len(rows)) / 2, BARS + NUMBERS, ROW * len(rows))
        ring = (NAMES + BARS + NUMBERS, bottom, WIDTH - NAMES - BARS - NUMBERS, content)
        left, right = (drawn.add_axes((x / WIDTH, y / height, wide / WIDTH, high / height)) for x, y, wide, high in (bars, ring))
        _bars(left, rows, colours)
        _ring(right, rows, domains, colours)
        right.set(xlim=(-ring[2] / RADIUS / 2, ring[2] / RADIUS / 2), ylim=(-content / RADIUS / 2, content / RADIUS / 2))
        drawn.suptitle(_shown(title, WIDTH - 1, FONT_POINTS + 3), y=1 - 0.12 / height, va="top", fontsize=FONT_POINTS + 3, parse_math=False)
        return drawn


def domain_shares(parts: Sequence[BlendPart]) -> dict[str, float]:
    """Return each domain's share, the largest first."""
    shares: dict[str, float] = {}
    for part in parts:
        shares[part.domain or "other"] = shares.get(part.domain or "other", 0.0) + part.share
    return dict(sorted(shares.items(), key=lambda item: (-item[1], item[0])))


def sample_documents(texts: Mapping[str, Sequence[str]], out: Path) -> Path:
    """Write `out`/samples.md: a few documents of each source, cut to MAX_CHARS, fenced so that nothing in them is Markdown."""
    lines = ["# Samples"]
    for name, documents in texts.items():
        lines += ["", f"## {_code(name)}"]
        for number, text in enumerate(documents, 1):
            cut = f", its first {MAX_CHARS:,}" if len(text) > MAX_CHARS else ""
            shown = _escaped(text[:MAX_CHARS], keep="\n\t")
            fence = "`" * max(3, _longest_run(shown) + 1)
            lines += ["", f"Document {number}: {len(text):,} characters{cut}", "", f"{fence}text", shown, fence]
        if not documents:
            lines += ["", "No documents."]
    out.mkdir(parents=True, exist_ok=True)
    path = out / "samples.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _bars(axes: Axes, rows: Sequence[BlendPart], colours: Mapping[Any, Any]) -> None:
    """Draw a bar a source, with its numbers at its end; one that is read more than once is hatched, its epochs bold."""
    places, widest = range(len(rows)), 100 * rows[0].share
    bars = axes.barh(places, [part.share * 100 for part in rows], color=[colours[part.name] for part in rows], height=0.74)
    for place, part, bar in zip(places, rows, bars, strict=True):
        tokens = "" if part.tokens is None else f"  {_count(part.tokens)} tokens"
        note = axes.annotate(f"{_percent(part.share)}{tokens}", (bar.get_width(), place), (4, 0), textcoords="offset points", va="center")
        if part.epochs is not None:
            again = part.epochs > 1
            axes.annotate(
                f"{part.epochs:.3g} epochs",
                (1, 0.5),
                (6, 0),
                xycoords=note,
                textcoords="offset points",
                va="center",
                weight="bold" if again else "normal",
            )
            bar.set(hatch="////" if again else None, edgecolor="white")
    axes.set_yticks(places, [_shown(part.name, NAMES - 0.15) for part in rows], parse_math=False)
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, widest * (BARS + NUMBERS) / BARS))
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= widest * 1.05])
    legend = " (hatched: a source read more than once)" if any((part.epochs or 0) > 1 for part in rows) else ""
    axes.set_xlabel(f"% of the training tokens{legend}", loc="left")
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _ring(axes: Axes, rows: Sequence[BlendPart], domains: Mapping[str, float], colours: Mapping[Any, Any]) -> None:
    """Draw the sources around their domains, clockwise from the top, and name them in columns at both sides."""
    order = list(domains)
    around = sorted(rows, key=lambda part: order.index(part.domain or "other"))  # stable: by share within a domain
    kind: dict[str, Any] = {"startangle": 90, "counterclock": False}
    edge = {"edgecolor": "white", "linewidth": 0.8}
    outer = axes.pie(
        [part.share for part in around],
        colors=[colours[part.name] for part in around],
        wedgeprops=edge | {"width": 1 - RING_MIDDLE},
        **kind,
    )[0]
    inner = axes.pie(
        list(domains.values()),
        radius=RING_MIDDLE,
        colors=[colours[_domain(name)] for name in order],
        wedgeprops=edge | {"width": RING_MIDDLE - RING_INNER},
        **kind,
    )[0]
    for wedge, share in zip(inner, domains.values(), strict=True):
        if share >= MIN_INSIDE:
            dark = sum(weight * value for weight, value in zip((0.3, 0.6, 0.1), wedge.get_facecolor(), strict=False)) < 0.45
            axes.text(
                *_point(wedge, (RING_MIDDLE + RING_INNER) / 2),
                _percent(share),
                ha="center",
                va="center",
                weight="bold",
                fontsize=SMALL_POINTS,
                color="white" if dark else "black",
            )
    _name_wedges(axes, [(wedge, part) for wedge, part in zip(outer, around, strict=True) if part.share >= MIN_NAMED])
    labels = [f"{_shown(name, LEGEND_NAMES)}  {_percent(share)}" for name, share in domains.items()]
    legend = axes.legend(
        inner, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=min(LEGEND_COLUMNS, len(labels)), frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _name_wedges(axes: Axes, named: Sequence[tuple[Any, BlendPart]]) -> None:
    """Name each wedge at its side of the ring, the names of a side a line apart, each tied to its wedge."""
    line = SMALL_POINTS * 1.35 / 72 / RADIUS
    for side in (-1, 1):
        beside = sorted(
            ((*_point(wedge, 1.0)[::-1], part) for wedge, part in named if (_point(wedge, 1.0)[0] >= 0) == (side > 0)),
            key=lambda found: -found[0],
        )
        places = spread([y for y, _, _ in beside], line, 1.2)
        for (y, x, part), place in zip(beside, places, strict=True):
            axes.plot([x, 1.1 * x, side * 1.25], [y, 1.1 * y, place], color="0.6", linewidth=0.6)
            axes.text(
                side * 1.28,
                place,
                f"{_shown(part.name, RING_NAMES, SMALL_POINTS)}  {_percent(part.share)}",
                fontsize=SMALL_POINTS,
                va="center",
                ha="left" if side > 0 else "right",
                parse_math=False,
            )


def spread(heights: Sequence[float], gap: float, limit: float) -> list[float]:
    """Return falling heights moved as little as it takes (least squares) to be `gap` apart and within -limit and limit."""
    pools: list[list[float]] = []  # each: the wanted top of its first height, one value a member
    for index, height in enumerate(heights):
        pools.append([height + index * gap])
        while len(pools) > 1 and sum(pools[-2]) / len(pools[-2]) < sum(pools[-1]) / len(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    lowest = gap * (len(heights) - 1) - limit
    tops = [min(max(sum(pool) / len(pool), lowest), limit) for pool in pools for _ in pool]
    return [top - index * gap for index, top in enumerate(tops)]


def _domain(name: str) -> tuple[str, str]:
    """Return a domain's key among the colours, which no source's name is."""
    return "domain", name


def _point(wedge: Any, radius: float) -> tuple[float, float]:
    angle = math.radians((wedge.theta1 + wedge.theta2) / 2)
    return radius * math.cos(angle), radius * math.sin(angle)


def _colours(rows: Sequence[BlendPart], domains: Mapping[str, float]) -> dict[Any, Any]:
    """Return a colour a domain, under its key, and under each source's name a tint of its domain's."""
    from matplotlib.colors import to_rgb

    unknown = sorted(set(domains) - set(COLOURS))
    base = COLOURS | {name: MORE_COLOURS[index % len(MORE_COLOURS)] for index, name in enumerate(unknown)}
    colours: dict[Any, Any] = {_domain(name): to_rgb(base[name]) for name in domains}
    for name in domains:
        own = [part for part in rows if (part.domain or "other") == name]
        for index, part in enumerate(own):
            white = 0.55 * index / max(len(own) - 1, 3)
            colours[part.name] = tuple(value + (1 - value) * white for value in colours[_domain(name)])
    return colours


@contextmanager
def _style() -> Iterator[None]:
    """Draw by matplotlib's own defaults, whatever the user's matplotlibrc says, and give them back after."""
    try:
        import matplotlib
    except ImportError:
        raise BackendMissing("matplotlib", "the figure of a mixture", "pip install matplotlib") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {"svg.hashsalt": "blend", "font.family": "DejaVu Sans", "font.size": FONT_POINTS, "figure.dpi": DPI, "hatch.linewidth": 0.8}
        )
        yield


def _shown(text: str, inches: float, points: int = FONT_POINTS) -> str:
    """Return a text in one line of characters that the font has, cut in the middle where it is wider."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties(family="DejaVu Sans")))
    known = font.get_charmap()
    text = "".join(part if part.isprintable() and ord(part) in known else ascii(part)[1:-1] for part in text)
    font.set_size(points, DPI)

    def is_wider(shown: str) -> bool:
        font.set_text(shown)
        return font.get_width_height()[0] / 64 > inches * DPI

    def cut(kept: int) -> str:
        return f"{text[: kept - kept // 3]}...{text[len(text) - kept // 3 :]}"

    if len(text) <= MAX_SHOWN and not is_wider(text):
        return text
    return cut(bisect_left(range(min(len(text), MAX_SHOWN)), True, key=lambda kept: is_wider(cut(kept))) - 1)


def _escaped(text: str, keep: str = "") -> str:
    return "".join(part if part.isprintable() or part in keep else ascii(part)[1:-1] for part in text)


def _code(text: str) -> str:
    """Return a text as an inline piece of Markdown code."""
    shown = _escaped(text)
    fence = "`" * (_longest_run(shown) + 1)
    return f"{fence} {shown} {fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _percent(share: float) -> str:
    return f"{share * 100:.2f}".rstrip("0").rstrip(".") + " %" if share >= 0.0001 else "< 0.01 %"


def _count(tokens: int) -> str:
    """Return a count in three digits: 7.21 B."""
    for unit, name in ((10**12, " T"), (10**9, " B"), (10**6, " M"), (10**3, " k")):
        if tokens >= unit:
            return f"{tokens / unit:.3g}{name}"
    return str(tokens)
