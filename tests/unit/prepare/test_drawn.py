"""A few texts of files: the same whatever the order of the records, each once, long enough, and refused where there are too few."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_prism.core.config import PartConfig
from megatron_prism.core.errors import InputError
from megatron_prism.prepare import drawn


def draw(path: Path, num: int, seed: int = 0, min_characters: int = 1, text: str = "{text}") -> tuple[list[str], int]:
    return drawn.draw(PartConfig(path=(str(path),), text=text, split="paragraph"), num, seed, "a", min_characters, "distributions.a.path")


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_the_draw_follows_from_the_seed_and_not_from_the_order(tmp_path: Path) -> None:
    texts = [f"text {n}" for n in range(50)]
    first, count = draw(write(tmp_path / "a.jsonl", texts), 9)
    assert draw(write(tmp_path / "b.jsonl", texts[::-1]), 9) == (first, 50) and count == 50
    assert len(set(first)) == 9 and set(first) <= set(texts)
    assert draw(tmp_path / "a.jsonl", 9, seed=1)[0] != first
    twice, count = draw(write(tmp_path / "c.jsonl", texts * 2), 9)
    assert (twice, count) == (first, 100)


def test_empty_and_short_texts_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["", "  ", "= Title =", "a whole sentence of some length"] * 2)
    assert draw(path, 1, min_characters=20) == (["a whole sentence of some length"], 2)
    with pytest.raises(InputError, match=r"distributions.a.path: found 2 distinct texts of at least 1 characters; required 3"):
        draw(path, 3)


def test_a_text_file_is_split_at_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\nline\n\ntwo\n\n\nthree\n")
    assert sorted(draw(tmp_path / "a.txt", 3)[0]) == ["one\nline", "three", "two"]


def test_a_record_without_the_field_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.jsonl.*question"):
        draw(write(tmp_path / "a.jsonl", ["x"]), 1, text="{question}")
