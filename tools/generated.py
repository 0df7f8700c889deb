"""The generated part of a document: what stands between two marks, written by the tool that the first one names."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
END = "<!-- end -->"


def parts(document: Path, tool: str) -> tuple[str, str, str]:
    """Return a document's text before, within and behind the part that a tool writes."""
    before, _, rest = document.read_text(encoding="utf-8").partition(f"<!-- written by tools/{tool} -->\n")
    within, _, after = rest.partition(END)
    return before, within, after


def write(document: Path, tool: str, text: str) -> None:
    """Put a tool's text in its place."""
    before, _, after = parts(document, tool)
    document.write_text(f"{before}<!-- written by tools/{tool} -->\n{text}\n{END}{after}", encoding="utf-8")
