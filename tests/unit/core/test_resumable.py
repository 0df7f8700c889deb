"""A folder that a command fills over several starts: written once, found again, and nothing else is taken for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prism.core import resumable
from megatron_prism.core.errors import InputError
from megatron_prism.eval import folder


def test_a_folder_is_described_once(tmp_path: Path) -> None:
    root = tmp_path / "out"
    assert resumable.begun(root, "passes", "prism rl filter") is None
    for step in (1, 2):  # a second start finds the first one's manifest
        with resumable.held(root, "passes", "prism rl filter", lambda step=step: {"kind": "passes", "step": step}) as described:
            assert described["step"] == 1
    assert resumable.begun(root, "passes", "prism rl filter") == {"kind": "passes", "step": 1}


@pytest.mark.parametrize(
    ("name", "text"),
    [("notes.txt", "mine"), ("manifest.json", '{"kind": "evaluation"}'), ("manifest.json", "no JSON"), ("manifest.json", '"kind"')],
)
def test_what_the_command_did_not_write_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with (
        pytest.raises(InputError, match="files that prism rl filter did not write"),
        resumable.held(tmp_path, "passes", "prism rl filter", lambda: {"kind": "passes"}),
    ):
        pass
    assert (tmp_path / name).read_text() == text


def test_an_evaluations_folder_is_one_models(tmp_path: Path) -> None:
    described = {"kind": folder.KIND, "model": {"sha256": "a", "path": "first"}}
    for _ in range(2):
        with folder.held(tmp_path, lambda: described):
            pass
    other = {**described, "model": {"sha256": "b", "path": "second"}}
    with pytest.raises(InputError, match="the evaluation of first"), folder.held(tmp_path, lambda: other):
        pass
    (tmp_path / folder.MANIFEST).write_text('{"kind": "evaluation", "model": ["a"]}')
    with pytest.raises(InputError, match="a manifest without the sum of a model"):
        folder.begun(tmp_path)
