"""A document as one HTML page that needs no network: styles, the script that sorts tables, figures and their data all stand in it.

Names and texts may come from a model or a stranger: jinja2 escapes all of them, and the page's policy (CSP) runs no script but its own.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
from collections.abc import Sequence
from importlib.resources import files
from itertools import groupby
from typing import TYPE_CHECKING
from urllib.parse import quote

from megatron_prism.report.document import MARKS, Document, Figure, Measured, Table, Value, flat, is_number, number_of
from megatron_prism.report.draw import FAINT, INK, SERIES

if TYPE_CHECKING:
    from markupsafe import Markup

TEMPLATES = "templates"


def page(document: Document) -> str:
    """Return the page. The same document gives the same bytes."""
    import jinja2
    from markupsafe import Markup

    style, script = (_file(name) for name in ("report.css", "report.js"))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    values = {
        "document": document,
        "style": Markup(style),  # our own files
        "script": Markup(script),
        "policy": f"default-src 'none'; img-src data:; style-src-elem {_sum(style)}; style-src-attr 'unsafe-inline'; script-src {_sum(script)}; base-uri 'none'; form-action 'none'",
        "drawing": lambda figure: Markup(inline(figure)),
        "cell": lambda column, value: _breakable(column.shown(value)),
        "number": number_of,
        "mark": lambda value: MARKS.get(value, "") if isinstance(value, str) else "",
        "is_number": _is_number,
        "is_numeric": is_number,
        "is_figure": lambda block: isinstance(block, Figure),
        "count": lambda value: value.n if isinstance(value, Measured) else None,
        "download": lambda table: f"data:text/csv;charset=utf-8,{quote(as_csv(table))}",
    }
    environment.filters["groups"] = _groups
    return environment.from_string(_file("report.html.j2")).render(values)


def as_csv(table: Table) -> str:
    """Return a table as CSV."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(flat(table))
    return out.getvalue()


def inline(figure: Figure) -> str:
    """Return a figure's SVG as it stands in a page: with the page's colours for ink and grid, ids of its own, and no style of its own."""
    svg, own = figure.svg[figure.svg.index("<svg") :], f"figure-{figure.id}"
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w.-]+)", "".join(re.findall(r'(?:xlink:href="#[^"]+"|url\(#[^)]+\))', svg))))
    svg = re.sub(r' id="([^"]+)"', lambda match: f' id="{own}-{match[1]}"' if match[1] in used else "", svg)
    svg = re.sub(r'xlink:href="#', f'href="#{own}-', svg)
    svg = svg.replace("url(#", f"url(#{own}-")
    page_colours = {INK: "currentColor", FAINT: "var(--faint)", "fill: #ffffff": "fill: none"}  # the page's own, light or dark
    for colour, ours in (page_colours | {colour.lower(): f"var(--s{number})" for number, colour in enumerate(SERIES)}).items():
        svg = svg.replace(colour, ours)
    svg = re.sub(r' xmlns(:xlink)?="[^"]+"', "", svg)
    opened = re.sub(r' (width|height)="[^"]+"', "", svg[: svg.index(">")])
    width = re.search(r'viewBox="0 0 ([\d.]+)', opened)
    size = f' style="max-width:{float(width[1]) * 4 / 3:.0f}px"' if width else ""
    return f'{opened} role="img" aria-labelledby="{own}-title"{size}>{svg[svg.index(">") + 1 :]}'.strip()


def _breakable(text: str) -> Markup:
    """Return a text, escaped, that may break within a long word: at dots, colons, slashes and underscores."""
    from markupsafe import Markup, escape

    return (
        Markup("<wbr>").join(map(escape, re.split(r"(?<=[._:/])", text))) if max(map(len, text.split()), default=0) > 16 else escape(text)
    )


def _groups(blocks: Sequence[Table | Figure]) -> list[list[Table | Figure]]:
    """Return the blocks as runs of tables and of figures."""
    return [list(run) for _, run in groupby(blocks, key=lambda block: isinstance(block, Figure))]


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float | Measured)


def _file(name: str) -> str:
    return files("megatron_prism.report").joinpath(TEMPLATES, name).read_text(encoding="utf-8")


def _sum(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
