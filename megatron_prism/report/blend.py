"""A mixture as a figure: bars of its sources, beside a ring of the sources by domain. One colour a domain, one tint of it a source."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prism.core.errors import BackendMissing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Colours = dict[str, tuple[float, float, float]]
# Okabe and Ito's colours, told apart by colour-blind readers; a known domain has the same one in every figure.
COLOURS = {"math": "#0072B2", "code": "#E69F00", "science": "#009E73", "general": "#CC79A7", "other": "#999999"}
MORE_COLOURS = ("#56B4E9", "#D55E00", "#F0E442")
STYLE = {"font.family": "DejaVu Sans", "font.size": 8, "hatch.linewidth": 0.8, "svg.hashsalt": "blend", "text.parse_math": False}
WIDTH_INCHES, MIN_HEIGHT_INCHES, ROW_INCHES, ENDS_INCHES = 12, 3, 0.27, 1.2
MAX_NAME, MAX_TITLE = 32, 120  # characters shown
MIN_INSIDE = 0.095  # a smaller part of the ring cannot hold its percentage


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
            drawn.savefig(path, metadata=metadata, dpi=200)
    return paths


def figure(parts: Sequence[BlendPart], title: str) -> Figure:
    """Return the figure: bars, the largest share on top, beside the ring.

    Raises: BackendMissing without matplotlib.
    """
    assert parts and math.isclose(sum(part.share for part in parts), 1, abs_tol=1e-6), "shares sum to 1"
    with _style():
        from matplotlib.figure import Figure

        rows = sorted(parts, key=lambda part: -part.share)
        domains = domain_shares(rows)
        of_domain = _colours(domains)
        of_source = [colour for _, colour in sorted(_tints(rows, of_domain))]
        height = max(MIN_HEIGHT_INCHES, ENDS_INCHES + ROW_INCHES * len(rows))
        drawn = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        left, right = drawn.subplots(1, 2, width_ratios=(3, 2))
        _bars(left, rows, of_source)
        _ring(right, rows, of_source, domains, of_domain)
        drawn.suptitle(_shown(title, MAX_TITLE), fontsize=11)
        return drawn


def domain_shares(parts: Sequence[BlendPart]) -> dict[str, float]:
    """Return each domain's share, the largest first."""
    shares: dict[str, float] = {}
    for part in parts:
        shares[_domain(part)] = shares.get(_domain(part), 0.0) + part.share
    return dict(sorted(shares.items(), key=lambda item: (-item[1], item[0])))


def _domain(part: BlendPart) -> str:
    return part.domain or "other"


def _bars(axes: Axes, rows: Sequence[BlendPart], colours: Sequence[tuple[float, float, float]]) -> None:
    """Draw a bar a source, with its numbers at its end; one that is read more than once is hatched."""
    bars = axes.barh(range(len(rows)), [100 * part.share for part in rows], color=colours, edgecolor="white", height=0.74)
    for bar, part in zip(bars, rows, strict=True):
        bar.set_hatch("////" if (part.epochs or 0) > 1 else "")
    axes.bar_label(bars, [_numbers(part) for part in rows], padding=4)
    axes.set_yticks(range(len(rows)), [_shown(part.name, MAX_NAME) for part in rows])
    axes.invert_yaxis()
    is_hatched = any(bar.get_hatch() for bar in bars)
    axes.set_xlabel("% of the training tokens" + " (hatched: a source read more than once)" * is_hatched, loc="left")
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _ring(
    axes: Axes, rows: Sequence[BlendPart], colours: Sequence[tuple[float, float, float]], domains: Mapping[str, float], of_domain: Colours
) -> None:
    """Draw the sources around their domains, clockwise from the top."""
    around = sorted(range(len(rows)), key=lambda row: list(domains).index(_domain(rows[row])))  # stable: by share within a domain
    ring = {"startangle": 90, "counterclock": False}
    edge = {"edgecolor": "white", "linewidth": 0.8, "width": 0.3}
    axes.pie([rows[row].share for row in around], colors=[colours[row] for row in around], wedgeprops=edge, **ring)
    inside = [_percent(share) if share >= MIN_INSIDE else "" for share in domains.values()]
    wedges, _ = axes.pie(
        list(domains.values()),
        colors=[of_domain[name] for name in domains],
        labels=inside,
        labeldistance=0.78,
        textprops={"ha": "center", "va": "center", "weight": "bold"},
        radius=0.7,
        wedgeprops=edge,
        **ring,
    )
    named = [f"{_shown(name, MAX_NAME)}  {_percent(share)}" for name, share in domains.items()]
    axes.legend(wedges, named, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _colours(domains: Mapping[str, float]) -> Colours:
    """Return each domain's colour."""
    from matplotlib.colors import to_rgb

    unknown = zip(sorted(set(domains) - set(COLOURS)), cycle(MORE_COLOURS), strict=False)
    return {name: to_rgb(colour) for name, colour in {**COLOURS, **dict(unknown)}.items()}


def _tints(rows: Sequence[BlendPart], of_domain: Colours) -> Iterator[tuple[int, tuple[float, float, float]]]:
    """Yield each row with its colour: its domain's, the lighter the smaller it is among its domain's."""
    for name, (red, green, blue) in of_domain.items():
        own = [row for row, part in enumerate(rows) if _domain(part) == name]
        for index, row in enumerate(own):
            white = 0.55 * index / max(len(own) - 1, 3)
            yield row, (red + (1 - red) * white, green + (1 - green) * white, blue + (1 - blue) * white)


@contextmanager
def _style() -> Iterator[None]:
    """Draw by matplotlib's own defaults, whatever the user's matplotlibrc says, and give them back after."""
    try:
        import matplotlib
    except ImportError:
        raise BackendMissing("matplotlib", "the figure of a mixture", "pip install matplotlib") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def _shown(text: str, max_length: int) -> str:
    """Return a text in characters that the font has, cut in the middle where it is longer."""
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont("DejaVu Sans")).get_charmap()
    text = "".join(part if part.isprintable() and ord(part) in known else ascii(part)[1:-1] for part in text)
    return text if len(text) <= max_length else f"{text[: max_length * 2 // 3 - 3]}...{text[-(max_length // 3) :]}"


def _numbers(part: BlendPart) -> str:
    tokens = "" if part.tokens is None else f"  {_count(part.tokens)} tokens"
    return f"{_percent(part.share)}{tokens}" + ("" if part.epochs is None else f"  {part.epochs:.3g} epochs")


def _percent(share: float) -> str:
    return f"{share * 100:.2f}".rstrip("0").rstrip(".") + " %" if share >= 0.0001 else "< 0.01 %"


def _count(tokens: int) -> str:
    """Return a count in three digits: 7.21 B."""
    for unit, name in ((10**12, " T"), (10**9, " B"), (10**6, " M"), (10**3, " k")):
        if tokens >= unit:
            return f"{tokens / unit:.3g}{name}"
    return str(tokens)
