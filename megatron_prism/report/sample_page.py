"""A page with a few documents of a mixture, shortened, and fenced so that their text is not read as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_prism.core.errors import printable

MAX_CHARS = 800  # of a document


def write(texts: Mapping[str, Sequence[str]], out: Path) -> Path:
    """Write `out`/samples.md: one heading per source, with its documents below."""
    lines = ["# Samples"]
    for name, documents in texts.items():
        lines += ["", f"## {_code(name)}"]
        for number, text in enumerate(documents, 1):
            cut = f", its first {MAX_CHARS:,}" if len(text) > MAX_CHARS else ""
            shown = printable(text[:MAX_CHARS], keep="\n\t")
            fence = _fence(shown, shortest=3)
            lines += ["", f"Document {number}: {len(text):,} characters{cut}", "", f"{fence}text", shown, fence]
        if not documents:
            lines += ["", "No documents."]
    out.mkdir(parents=True, exist_ok=True)
    path = out / "samples.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _code(text: str) -> str:
    """Return a text as inline Markdown code."""
    shown = printable(text)
    fence = _fence(shown, shortest=1)
    return f"{fence} {shown} {fence}"


def _fence(text: str, shortest: int) -> str:
    """Return a fence of more backticks than any run of them in the text."""
    return "`" * max(shortest, 1 + max(map(len, re.findall("`+", text)), default=0))
