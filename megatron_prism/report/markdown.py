"""A document as Markdown, with its figures and CSV files beside it."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_prism.core.errors import printable
from megatron_prism.report.document import Document, Figure, Table, is_number

ESCAPED = str.maketrans({of: f"\\{of}" for of in "\\`*_{}[]#|~!$"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\n": " "})


def markdown(document: Document) -> str:
    """Return the text. What names and texts hold is escaped: none of it becomes a link, a heading or HTML."""
    lines = [f"# {text(document.title)}", "", *(f"{text(line)}  " for line in document.lead)]
    for section in document.sections:
        lines += ["", f"## {text(section.title)}", ""]
        lines += [text(section.absent or " ".join(section.text))]
        for block in section.blocks:
            lines += ["", *(_figure(block) if isinstance(block, Figure) else _table(block))]
    return "\n".join(lines).rstrip() + "\n"


def text(value: str) -> str:
    """Return a text in which nothing is Markdown or HTML."""
    return printable(value).translate(ESCAPED)


def _figure(figure: Figure) -> Iterator[str]:
    yield f"![{text(figure.title)}](figures/{figure.id}.png)"
    yield ""
    yield f"{text(figure.title)} ([SVG](figures/{figure.id}.svg), [CSV](tables/{figure.table.id}.csv))"


def _table(table: Table) -> Iterator[str]:
    yield f"**{text(table.caption)}** ([CSV](tables/{table.id}.csv))"
    yield ""
    yield "| " + " | ".join(text(column.title) for column in table.columns) + " |"
    yield "|" + "|".join("---:" if is_number(table, place) else "---" for place in range(len(table.columns))) + "|"
    for row in table.rows:
        yield "| " + " | ".join(text(column.shown(value)) for column, value in zip(table.columns, row, strict=True)) + " |"
    if table.note:
        yield ""
        yield text(table.note)
