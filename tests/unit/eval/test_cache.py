"""What is kept: whole or absent, by key, and never trusted where a line was changed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_prism.eval.cache import Kept


def test_what_is_kept_is_there_again_and_a_later_value_wins(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "samples")
    kept.write({"a": {"text": "1\n2\u2028"}, "b": [1.5, None]})
    kept.write({})
    kept.write({"b": "new"})
    for one in (kept, Kept(tmp_path / "samples")):
        assert dict(one) == {"a": {"text": "1\n2\u2028"}, "b": "new"} and one.num_damaged == 0
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["000000.jsonl", "000001.jsonl"]


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line.replace(b"one", b"two"),
        lambda line: line[:-9],
        lambda line: b"{}\n",
        lambda line: b"\xff\n",
        lambda line: line[:-1],
    ],
)
def test_a_damaged_line_is_not_there_and_the_others_are(tmp_path: Path, change: object, caplog: pytest.LogCaptureFixture) -> None:
    Kept(tmp_path).write({"a": "one", "b": "three"})
    path = tmp_path / "000000.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(second + change(first))  # type: ignore[operator]
    kept = Kept(tmp_path)
    assert dict(kept) == {"b": "three"} and kept.num_damaged == 1
    kept.write({"a": "again"})
    assert dict(Kept(tmp_path)) == {"a": "again", "b": "three"} and len(list(tmp_path.iterdir())) == 2


def test_a_file_is_opened_once_for_the_values_that_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cluster's disk an open takes a millisecond, and an evaluation has tens of thousands of responses."""
    kept, opened, opens = Kept(tmp_path), list[Path](), Path.open
    for number in range(3):
        kept.write({f"{number}/{sample}": {"text": f"{number} {sample}"} for sample in range(64)})

    def counted(path: Path, *given: str) -> object:
        opened.append(path)
        return opens(path, *given)

    monkeypatch.setattr(Path, "open", counted)
    with ThreadPoolExecutor(2) as pool:  # the loop's thread and the grader's
        values = list(pool.map(kept.__getitem__, kept))
    assert values == [{"text": key.replace("/", " ")} for key in kept] and len(opened) < 12


def test_what_a_killed_write_or_a_copy_leaves_is_not_read(tmp_path: Path) -> None:
    Kept(tmp_path).write({"a": 1})
    for name in (".000001.jsonl.7.tmp", "000000 (copy).jsonl", "._000000.jsonl"):
        (tmp_path / name).write_text("what a killed process, a person or another system left")
    kept = Kept(tmp_path)
    kept.write({"b": 2})
    assert dict(Kept(tmp_path)) == {"a": 1, "b": 2}
