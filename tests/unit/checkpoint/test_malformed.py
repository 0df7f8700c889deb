"""Malformed Hugging Face folders are refused by file and by tensor or key, with exit code 2, without a hang, without a pickle
or a custom class run, and with nothing left behind. The rows are in malformed.py and foreign.py."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from megatron_prism import cli
from megatron_prism.core.errors import InputError
from megatron_prism.jobs import convert

from .damages import (
    FIRST,
    QUERY,
    Bomb,
    Damage,
    custom_code,
    entry,
)
from .foreign import FOREIGN
from .malformed import TABLE as MALFORMED

Limit = Callable[[int], AbstractContextManager[None]]

TABLE = [*MALFORMED, *FOREIGN]


def tree(root: Path) -> dict[str, int]:
    """Return what lies under a folder, with its time of change, links not followed."""
    return {
        os.path.join(above, name): os.lstat(os.path.join(above, name)).st_mtime_ns
        for above, folders, files in os.walk(root)
        for name in folders + files
    }


def test_no_row_is_lost() -> None:
    assert len({found.name for found in TABLE}) == len(TABLE) == 57


@pytest.mark.parametrize(
    ("named", "damage"),
    [
        pytest.param(found.named, damage, id=f"{found.name} {number}" if len(found.damages) > 1 else found.name)
        for found in TABLE
        for number, damage in enumerate(found.damages)
    ],
)
def test_a_malformed_folder_is_refused(hf_root: Path, limit: Limit, named: tuple[str, ...], damage: Damage) -> None:
    wanted = damage(hf_root)
    before = tree(hf_root.parent)
    with limit(5), pytest.raises(InputError) as caught:
        convert.run_import(hf_root, hf_root.parent / "out", dry_run=False)
    text = str(caught.value)
    assert not [part for part in (*named, *([wanted] if isinstance(wanted, str) else [])) if part not in text], text
    assert all(problem.where.startswith(str(hf_root)) for problem in caught.value.problems), text
    lines = text.splitlines()
    assert len(lines) == len(caught.value.problems) and all(line.isprintable() and len(line) < 2500 for line in lines)
    assert caught.value.exit_code == 2
    assert tree(hf_root.parent) == before
    assert not (hf_root / "../../evil").exists()


def test_the_folder_that_is_damaged_was_whole(hf_root: Path) -> None:
    assert convert.run_import(hf_root, hf_root.parent / "out", dry_run=False)["tensors"] == 21


def test_the_command_line_refuses_with_2(hf_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    entry(QUERY, dtype="\x1b[2J\n")(hf_root)
    monkeypatch.setattr(sys, "argv", ["prism", "convert", "import", "--hf", str(hf_root), "--out", str(hf_root.parent / "out")])
    with pytest.raises(SystemExit) as left:
        cli.main()
    shown = capsys.readouterr()
    assert left.value.code == 2 and shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith(f"prism: {hf_root / FIRST}: {QUERY}: found dtype") and line.isprintable()


def test_neither_pickles_nor_custom_code_beside_good_weights_are_opened(hf_root: Path) -> None:
    custom_code("LlamaForCausalLM")(hf_root)
    pickles = [hf_root / name for name in ("pytorch_model.bin", "optimizer.pt", "consolidated.00.pth", "consolidated.safetensors")]
    for path in pickles:
        path.write_bytes(pickle.dumps(Bomb(hf_root)))
    seen: set[tuple[str, str]] = set()
    watching = [True]
    sys.addaudithook(
        lambda event, arguments: seen.add((event, str(arguments[0]))) if watching and event in ("open", "pickle.find_class") else None
    )
    try:
        convert.run_import(hf_root, hf_root.parent / "out", dry_run=False)
    finally:
        watching.clear()  # the hook itself stays until the process ends
    assert ("open", str(hf_root / FIRST)) in seen
    assert not seen & {("open", str(path)) for path in pickles} and "pickle.find_class" not in {event for event, _ in seen}
    assert not (hf_root.parent / "ran").exists()
