"""The checkpoint folder: found by any of its names, refused when it is not one, published whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.checkpoint import folder
from megatron_prism.core.errors import CheckpointError, InputError


@pytest.fixture
def run(ckpt_root: Path, tmp_path: Path) -> Path:
    """Return a run folder with two checkpoints, the second the latest."""
    for step in (1, 2):
        target = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
        shutil.copytree(ckpt_root, target)
        facts = json.loads((target / folder.META).read_text())
        folder.write_meta(target, facts | {"step": step, "tokens": step * 10})
        folder.point_latest(target.parent, target.name)
    return tmp_path / "run"


def test_a_run_its_checkpoints_and_one_of_them_all_name_a_checkpoint(run: Path) -> None:
    first = folder.read(run / "checkpoints" / "step_00000001")
    assert (first.step, first.tokens) == (1, 10)
    for path in (run, run / "checkpoints", run / "checkpoints" / "step_00000002"):
        assert folder.read(path) == folder.read(run)
    assert (folder.read(run).step, folder.read(run).root.name) == (2, "step_00000002")


@pytest.mark.parametrize("latest", ["step_00000001\n", "step_00000003\n", ""])
def test_the_newest_whole_checkpoint_is_the_latest_whatever_the_pointer_says(run: Path, latest: str) -> None:
    """A crash may leave the pointer behind, or a folder without its prism.json."""
    (run / "checkpoints" / "latest").write_text(latest)
    (run / "checkpoints" / "step_00000003" / "state").mkdir(parents=True)
    assert folder.read(run).root.name == "step_00000002"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"format": 2}, "prism.json:format"),
        ({"model": {"family": "llama"}}, "prism.json:model.num_layers"),
        ({"step": "x"}, "prism.json"),
        ({"model": None}, "prism.json"),
        ({"tokens": None}, "prism.json"),
        (None, "prism.json"),
        ("{", "prism.json"),
        ("[]", "prism.json"),
    ],
)
def test_a_prism_json_that_does_not_hold_is_refused(ckpt_root: Path, change: Any, key: str) -> None:
    facts = json.loads((ckpt_root / folder.META).read_text())
    content = change if isinstance(change, str) else json.dumps({} if change is None else facts | change)
    (ckpt_root / folder.META).write_text(content)
    with pytest.raises(InputError, match=f"{key}.*: found"):
        folder.read(ckpt_root)


def test_an_unknown_family_is_refused(ckpt_root: Path) -> None:
    path = ckpt_root / folder.META
    path.write_text(path.read_text().replace('"family": "llama"', '"family": "gpt"'))
    with pytest.raises(InputError, match=r"prism.json:model.family: found 'gpt'; required one of llama"):
        folder.read(ckpt_root)


def test_no_checkpoint_is_refused(tmp_path: Path) -> None:
    for path, found in ((tmp_path, "no prism.json"), (tmp_path / "absent", "no such folder"), (Path("x" * 5000), "File name too long")):
        with pytest.raises(CheckpointError, match=f"found {found}"):
            folder.read(path)


@pytest.mark.parametrize("before", ["absent", "empty", "deep"])
def test_a_folder_appears_when_it_is_whole(tmp_path: Path, before: str) -> None:
    out = tmp_path / ("a/b/out" if before == "deep" else "out")
    if before == "empty":
        out.mkdir()
    with folder.create(out) as temporary:
        (temporary / "file").write_text("x")
        assert not (out / "file").exists()
    assert (out / "file").read_text() == "x" and [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_that_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), folder.create(tmp_path / "out") as temporary:
        (temporary / "file").write_text("x")
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_there_already_stays(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    kept = out / "kept" if kind == "folder" else out
    kept.write_text("kept")
    with pytest.raises(InputError, match=f"{out}: found an existing output"), folder.create(out):
        pytest.fail("the body must not run")
    assert kept.read_text() == "kept" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_assets_are_all_files_but_weights(hf_root: Path, tmp_path: Path) -> None:
    for name in (
        "chat_template.jinja",
        "tokenizer.model",
        "LICENSE",
        "pytorch_model.bin",
        "consolidated.pth",
        "model.gguf",
        ".gitattributes",
    ):
        (hf_root / name).write_text(name)
    (hf_root / "original").mkdir()
    copied = {path.name for path in folder.copy_assets(hf_root, tmp_path / "assets")}
    assert copied == {path.name for path in (tmp_path / "assets").iterdir()}
    assert copied == {
        "chat_template.jinja",
        "tokenizer.model",
        "LICENSE",
        "config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
