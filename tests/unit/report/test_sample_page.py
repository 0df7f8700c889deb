"""The page of sample documents: cut, and no document leaves its fence."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prism.report import sample_page


def test_samples_are_cut_and_fenced(tmp_path: Path) -> None:
    long = "x" * (sample_page.MAX_CHARS + 5)
    path = sample_page.write({"math": ["one\n\ttwo", long], "code": [], "c": [""]}, tmp_path / "out")
    text = path.read_text()
    assert path == tmp_path / "out" / "samples.md"
    assert "## ` math `" in text and "```text\none\n\ttwo\n```" in text
    assert f"Document 2: {len(long):,} characters, its first {sample_page.MAX_CHARS:,}" in text
    assert "x" * sample_page.MAX_CHARS in text and "x" * (sample_page.MAX_CHARS + 1) not in text
    assert "No documents." in text


@pytest.mark.parametrize(
    "document", ["```\n# out\n```", "`" * 50, "``` a\n````\n", "a ` b", "\x1b[2J\x00\r\n\u202e\u2028\ud800", "~~~\n<script>"]
)
def test_no_document_leaves_its_fence(tmp_path: Path, document: str) -> None:
    text = sample_page.write({"`` name\n# x": [document]}, tmp_path).read_text()
    lines = text.split("\n")
    assert lines[2] == r"## ``` `` name\n# x ```"
    fence = lines[6].removesuffix("text")
    assert set(fence) == {"`"} and len(fence) >= 3 and lines[-2] == fence
    inside = "\n".join(lines[7:-2])
    assert fence not in inside
    assert all(part.isprintable() or part in "\n\t" for part in text)
    if document.isprintable():
        assert inside == document
