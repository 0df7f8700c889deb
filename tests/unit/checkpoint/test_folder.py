"""The checkpoint folder: found by any of its names, refused when it is not one, published whole or not at all."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.checkpoint import folder, integrity
from megatron_prism.core.errors import CheckpointError, InputError
from megatron_prism.jobs import convert


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


@pytest.mark.parametrize("mode", [0o700, 0o2770])
def test_a_folder_made_before_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(mode)
    with folder.create(tmp_path / "out") as temporary:
        (temporary / "file").write_text("x")
    assert (tmp_path / "out").stat().st_mode & 0o7777 == mode


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


KEPT = [
    "chat_template.jinja",
    "tokenizer.model",
    "LICENSE",
    "README.pt.md",
    "additional_chat_templates/tool_use.jinja",
    "additional_chat_templates/rag.jinja",
    "figures/deep/plot.svg",
    "code/modeling_custom.py",
]
OTHER_WEIGHTS = [
    *(
        f"weights.{suffix}"
        for suffix in ("bin", "pt", "PTH", "ckpt", "gguf", "h5", "msgpack", "onnx", "onnx_data", "npz", "pkl", "nemo", "ot")
    ),
    "consolidated.safetensors",
    "pytorch_model.bin.index.json",
    "consolidated.safetensors.index.json",
    "model.onnx.data",
    "consolidated.safetensors.incomplete",
]
HIDDEN = [".gitattributes", ".cache/huggingface/download/config.json.metadata", "figures/.DS_Store"]
OTHER_MODELS = ["original/params.json", "original/consolidated.00.pth", "lora/adapter_config.json", "lora/adapter_model.safetensors"]


def fill(root: Path) -> Path:
    for name in (*KEPT, *OTHER_WEIGHTS, *HIDDEN, *OTHER_MODELS):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def test_assets_are_all_files_but_weights(hf_root: Path, tmp_path: Path) -> None:
    fill(hf_root)
    with (hf_root / "corpus.txt").open("wb") as stream:
        stream.truncate(folder.MAX_ASSET_BYTES + 1)
    copied = {str(path.relative_to(hf_root)) for path in folder.copy_assets(hf_root, tmp_path / "assets")}
    assert copied == {str(path.relative_to(tmp_path / "assets")) for path in (tmp_path / "assets").rglob("*") if path.is_file()}
    assert copied == {*KEPT, "config.json", "tokenizer.json", "tokenizer_config.json"}
    templates = folder.copy_assets(hf_root, tmp_path / "of_a_tokenizer", subfolders=("additional_chat_templates",))
    assert {path.parent.name for path in templates} == {"hf", "additional_chat_templates"}
    left = folder.left_behind(hf_root)
    assert left == sorted([*OTHER_WEIGHTS, "corpus.txt", "lora/ (it holds weights)", "original/ (it holds weights)"])


def test_an_export_has_the_files_of_subfolders(hf_root: Path, tmp_path: Path) -> None:
    """And its checkpoint, its origin in a run, and a second import have them too."""
    weights = {path.name: path.read_bytes() for path in hf_root.iterdir()}
    fill(hf_root)
    convert.run_import(hf_root, tmp_path / "ckpt", dry_run=False)
    assert not integrity.check(tmp_path / "ckpt")
    convert.run_export(tmp_path / "ckpt", tmp_path / "out", dry_run=False)
    exported = {str(path.relative_to(tmp_path / "out")): path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert exported == {**weights, **{name: name.encode() for name in KEPT}}


def test_a_link_in_a_subfolder_is_looked_at_too(hf_root: Path, tmp_path: Path) -> None:
    (hf_root / "additional_chat_templates").mkdir()
    link = hf_root / "additional_chat_templates" / "tool_use.jinja"
    link.symlink_to("../tokenizer_config.json")
    convert.run_import(hf_root, tmp_path / "inside", dry_run=False)
    assert (tmp_path / "inside/hf/additional_chat_templates/tool_use.jinja").read_bytes() == (
        hf_root / "tokenizer_config.json"
    ).read_bytes()
    link.unlink()
    (tmp_path / "secret").write_text("secret")
    link.symlink_to(tmp_path / "secret")
    (hf_root / "generation_config.json").symlink_to("../../blobs/absent")  # as cp -r without -L leaves a snapshot
    with pytest.raises(InputError) as caught:
        convert.run_import(hf_root, tmp_path / "out", dry_run=False)
    assert {problem.where: problem.found for problem in caught.value.problems} == {
        str(hf_root / "generation_config.json"): "a link to ../../blobs/absent, which is not there",
        str(link): "a link out of the folder",
    }
    link.unlink()
    (hf_root / "elsewhere").symlink_to(tmp_path)  # a folder's link is not followed
    (hf_root / "generation_config.json").unlink()
    assert "elsewhere/ (a link)" in folder.left_behind(hf_root)
    convert.run_import(hf_root, tmp_path / "out", dry_run=False)
    assert not (tmp_path / "out/hf/elsewhere").exists()


@pytest.mark.parametrize("target", ["empty", "absent"])
def test_a_link_as_output_is_written_through(pristine: Path, tmp_path: Path, target: str) -> None:
    """And nothing lies beside the link meanwhile: its disk may be another."""
    (tmp_path / "here").mkdir()
    (tmp_path / "disk").mkdir()
    if target == "empty":
        (tmp_path / "disk/real").mkdir()
    (tmp_path / "here/out").symlink_to(tmp_path / "disk/real")
    with folder.create(tmp_path / "here/out") as temporary:
        (temporary / "file").write_text("x")
        assert temporary.parent == tmp_path / "disk" and [path.name for path in (tmp_path / "here").iterdir()] == ["out"]
    assert (tmp_path / "here/out").is_symlink() and (tmp_path / "disk/real/file").read_text() == "x"
    with pytest.raises(InputError, match="found an existing output"):
        convert.run_import(pristine / "hf", tmp_path / "here/out", dry_run=False)


def test_a_mount_point_as_output_is_refused_before_any_work(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "disk")
    for out in (tmp_path / "disk", tmp_path / "link"):
        with pytest.raises(InputError, match=f"{out}: found the mount point of a disk; .*choose a folder on it: {out}/out"):
            convert.run_import(pristine / "hf", out, dry_run=True)
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "link"}


def test_a_link_that_is_not_kept_is_no_reason_to_refuse(hf_root: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("state")
    (hf_root / ".#config.json").symlink_to("user@host.1:2")  # an editor's lock
    (hf_root / ".gitattributes").symlink_to(tmp_path / "state")
    (hf_root / "optimizer.pt").symlink_to(tmp_path / "state")
    (hf_root / "pytorch_model.bin").symlink_to("gone")
    convert.run_import(hf_root, tmp_path / "ckpt", dry_run=False)
    assert folder.left_behind(hf_root) == ["optimizer.pt", "pytorch_model.bin"]
    assert not any(path.is_symlink() for path in (tmp_path / "ckpt/hf").iterdir())


def test_a_picture_in_a_snapshot_is_no_web_page(hf_root: Path, tmp_path: Path) -> None:
    """In the hub's cache every file is a link."""
    pictures = {"logo.svg": b"<?xml version='1.0'?><svg/>", "README.html": b"<!doctype html>", "samples.zip": b"PK\3\4"}
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "0123abc"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name, content in ({path.name: path.read_bytes() for path in hf_root.iterdir()} | pictures).items():
        (cache / "blobs" / name).write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    convert.run_import(snapshot, tmp_path / "ckpt", dry_run=False)
    assert {name: (tmp_path / "ckpt/hf" / name).read_bytes() for name in pictures} == pictures


def test_a_pointer_in_a_checkpoint_does_not_hold_back_its_export(hf_root: Path, tmp_path: Path) -> None:
    convert.run_import(hf_root, tmp_path / "ckpt", dry_run=False)
    (tmp_path / "ckpt/hf/tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    integrity.seal(tmp_path / "ckpt")
    convert.run_export(tmp_path / "ckpt", tmp_path / "out", dry_run=False)
    assert (tmp_path / "out/tokenizer.model").is_file()


@pytest.mark.parametrize(("out", "found"), [("loop", "a link to itself"), ("n" * 300, "File name too long")])
def test_an_output_that_cannot_be_is_refused(tmp_path: Path, out: str, found: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match=f"{out}: found {found}; required a folder's path"):
        folder.refuse_existing(tmp_path / out)


CREATES = """
import pathlib, signal, sys, time
from megatron_prism.checkpoint import folder
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
with folder.create(pathlib.Path(sys.argv[1])) as temporary:
    (temporary / "weights").write_bytes(bytes(1000))
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_ends_a_conversion_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    """A conversion's hidden folder is as large as the model, and the next start has another name for its own."""
    number = signal.Signals[name]
    with subprocess.Popen([sys.executable, "-c", CREATES, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n" and len(list(tmp_path.iterdir())) == 1
        process.send_signal(number)
    assert process.returncode == 128 + number and list(tmp_path.iterdir()) == []


def test_a_handler_of_the_signals_stays_while_a_folder_is_created(tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with folder.create(tmp_path / "out"):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM] and (tmp_path / "out").is_dir()
