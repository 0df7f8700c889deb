"""How all figures look: matplotlib's own defaults whatever the user's settings say, one palette, texts in characters that the font has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_prism.core.errors import BackendMissing

# Okabe and Ito's colours, which colour-blind readers can tell apart. A known domain has the same colour in every figure.
COLOURS = {"math": "#0072B2", "code": "#E69F00", "science": "#009E73", "general": "#CC79A7", "other": "#999999"}
MORE_COLOURS = ("#56B4E9", "#D55E00", "#F0E442")
STYLE: Any = {"font.family": "DejaVu Sans", "font.size": 8, "hatch.linewidth": 0.8, "text.parse_math": False}


@contextmanager
def style(salt: str, purpose: str, **more: Any) -> Iterator[None]:
    """Draw with matplotlib's own defaults and STYLE, and restore the settings afterwards. salt: of the ids in an SVG.

    Raises: BackendMissing without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise BackendMissing("matplotlib", purpose, "pip install matplotlib") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        settings: Any = STYLE | {"svg.hashsalt": salt} | more
        matplotlib.rcParams.update(settings)
        yield


def shown(text: str, max_length: int) -> str:
    """Return a text in characters that the font has, cut in the middle if longer than max_length."""
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont("DejaVu Sans")).get_charmap()
    text = "".join(part if part.isprintable() and ord(part) in known else ascii(part)[1:-1] for part in text)
    return text if len(text) <= max_length else f"{text[: max_length * 2 // 3 - 3]}...{text[-(max_length // 3) :]}"
