"""Draw a mixture: bars of its sources beside a ring of its domains. Each domain has a colour, and its sources have tints of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prism.report.style import COLOURS, MORE_COLOURS, shown, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Colour = tuple[float, float, float]  # red, green, blue
SALT, PURPOSE = "blend", "the figure of a mixture"
WIDTH_INCHES, ROW_INCHES, ENDS_INCHES, MIN_ROWS = 12, 0.27, 1.2, 7
MAX_NAME, MAX_TITLE = 32, 120  # characters shown


@dataclass(frozen=True)
class BlendPart:
    """A source's part of a mixture: its share of the training tokens (shares sum to 1). None: not known."""

    name: str
    domain: str | None
    share: float
    tokens: int | None
    epochs: float | None


def draw(parts: Sequence[BlendPart], title: str, out: Path) -> list[Path]:
    """Write `out`/blend.png and `out`/blend.svg. The same parts and matplotlib give the same bytes.

    Raises: BackendMissing without matplotlib.
    """
    paths = [out / "blend.png", out / "blend.svg"]
    with style(SALT, PURPOSE):
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
    with style(SALT, PURPOSE):
        from matplotlib.figure import Figure

        rows = sorted(parts, key=lambda part: -part.share)
        colours = _colours(rows)
        height = ENDS_INCHES + ROW_INCHES * max(len(rows), MIN_ROWS)
        drawn = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        left, right = drawn.subplots(1, 2, width_ratios=(3, 2))
        _bars(left, rows, _tints(rows, colours))
        _ring(right, rows, colours)
        drawn.suptitle(shown(title, MAX_TITLE), fontsize=11)
        return drawn


def domain_shares(parts: Sequence[BlendPart]) -> dict[str, float]:
    """Return each domain's share, the largest first."""
    shares: dict[str, float] = {}
    for part in parts:
        shares[_domain(part)] = shares.get(_domain(part), 0.0) + part.share
    return dict(sorted(shares.items(), key=lambda item: (-item[1], item[0])))


def colours_of(parts: Sequence[BlendPart]) -> list[Colour]:
    """Return one colour per source, in their order: its domain's, in tints."""
    return _tints(parts, _colours(parts))


def _domain(part: BlendPart) -> str:
    return part.domain or "other"


def _bars(axes: Axes, rows: Sequence[BlendPart], colours: Sequence[Colour]) -> None:
    """Draw one bar per source, with its numbers at the end. A source read more than once is hatched."""
    bars = axes.barh(range(len(rows)), [100 * part.share for part in rows], color=colours, edgecolor="white", linewidth=0, height=0.74)
    for bar, part in zip(bars, rows, strict=True):
        bar.set_hatch("////" if (part.epochs or 0) > 1 else "")
    axes.bar_label(bars, [_numbers(part) for part in rows], padding=4)
    axes.set_yticks(range(len(rows)), [shown(part.name, MAX_NAME) for part in rows])
    axes.set_ylim(max(len(rows), MIN_ROWS) - 0.5, -0.5)
    is_hatched = any(bar.get_hatch() for bar in bars)
    axes.set_xlabel("% of the training tokens" + " (hatched: a source read more than once)" * is_hatched, loc="left")
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _ring(axes: Axes, rows: Sequence[BlendPart], colours: Mapping[str, Colour]) -> None:
    """Draw the sources around their domains, clockwise from the top, the largest domain first."""
    domains = domain_shares(rows)
    tinted = zip(rows, _tints(rows, colours), strict=True)
    around = sorted(tinted, key=lambda row: list(domains).index(_domain(row[0])))  # stable: within a domain by share
    style: dict[str, Any] = {"startangle": 90, "counterclock": False, "wedgeprops": {"edgecolor": "white", "linewidth": 0.8, "width": 0.3}}
    axes.pie([part.share for part, _ in around], colors=[tint for _, tint in around], **style)
    wedges = axes.pie(list(domains.values()), colors=[colours[name] for name in domains], radius=0.7, **style)[0]
    named = [f"{shown(name, MAX_NAME)}  {_percent(share)}" for name, share in domains.items()]
    axes.legend(wedges, named, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _colours(rows: Sequence[BlendPart]) -> dict[str, Colour]:
    """Return the domains' colours."""
    from matplotlib.colors import to_rgb

    unknown = sorted({_domain(part) for part in rows} - set(COLOURS))
    return {name: to_rgb(colour) for name, colour in {**COLOURS, **dict(zip(unknown, cycle(MORE_COLOURS), strict=False))}.items()}


def _tints(rows: Sequence[BlendPart], colours: Mapping[str, Colour]) -> list[Colour]:
    """Return one colour per source: the domain's colour for its largest source, lighter tints for the others."""
    tints = []
    for row, part in enumerate(rows):
        is_own = [_domain(other) == _domain(part) for other in rows]
        white = 0.55 * sum(is_own[:row]) / max(sum(is_own) - 1, 3)
        red, green, blue = (value + (1 - value) * white for value in colours[_domain(part)])
        tints.append((red, green, blue))
    return tints


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
