"""Conversion: an export is the folder that was imported, every folder that does not hold is refused by name, and nothing stays behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prism.checkpoint import integrity, torch_dist
from megatron_prism.core.errors import EnvironmentFault, InputError
from megatron_prism.hf import as_torch, bits, safetensors
from megatron_prism.jobs import convert

SHARD = "model-00001-of-00002.safetensors"
QUERY, NORM = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.input_layernorm.weight"
PEAK = Path(__file__).with_name("peak.py")


def files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


def test_export_is_the_folder_that_was_imported(pristine: Path, tmp_path: Path) -> None:
    result = convert.run_export(pristine / "ckpt", tmp_path / "out", dry_run=False)
    assert files(tmp_path / "out") == files(pristine / "hf")
    assert result["tensors"] == 21 and result["files"] == [SHARD, SHARD.replace("1-of", "2-of")]


@pytest.mark.parametrize("piece_bytes", [1, 24, 100])
def test_pieces_of_a_tensor_come_to_their_places(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    """A tensor larger than a piece, in either direction: pieces that are a value, a part of a row, some rows."""
    monkeypatch.setattr(bits, "PIECE_BYTES", piece_bytes)
    convert.run_import(pristine / "hf", tmp_path / "ckpt", dry_run=False)
    assert (tmp_path / "ckpt/state/__0_0.distcp").read_bytes() == (pristine / "ckpt/state/__0_0.distcp").read_bytes()
    convert.run_export(tmp_path / "ckpt", tmp_path / "out", dry_run=False)
    assert files(tmp_path / "out") == files(pristine / "hf")


def tensors(root: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in root.glob("*.safetensors") for name, value in load_file(file).items()}


def test_without_the_kept_headers_export_lays_out_a_folder_of_its_own(pristine: Path, ckpt_root: Path, tmp_path: Path) -> None:
    (ckpt_root / "shards.json").unlink()
    (ckpt_root / "hf" / "model.safetensors.index.json").unlink()
    integrity.seal(ckpt_root)
    convert.run_export(ckpt_root, tmp_path / "out", dry_run=False)
    found, wanted = tensors(tmp_path / "out"), tensors(pristine / "hf")
    assert (tmp_path / "out" / safetensors.SINGLE).is_file() and found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_dry_run_checks_and_writes_nothing(hf_root: Path, ckpt_root: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    assert convert.run_import(hf_root, tmp_path / "out", dry_run=True)["written"] is False
    assert convert.run_export(ckpt_root, tmp_path / "out", dry_run=True)["parameters"] == 16_400
    assert sorted(tmp_path.iterdir()) == before


def edit_json(file: str, **changes: Any) -> Callable[[Path], None]:
    """Return a change to a JSON file; a value of None removes its key."""

    def edit(root: Path) -> None:
        values = json.loads((root / file).read_text()) | changes
        (root / file).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return edit


def edit_shard(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Return a change to the first shard's tensors, with the index kept in step."""

    def edit(root: Path) -> None:
        found, index = load_file(root / SHARD), json.loads((root / safetensors.INDEX).read_text())
        change(found)
        save_file(found, root / SHARD)
        others = {name: file for name, file in index["weight_map"].items() if file != SHARD}
        (root / safetensors.INDEX).write_text(json.dumps({"weight_map": others | dict.fromkeys(found, SHARD)}))

    return edit


def rewrite(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        path = root / file
        path.write_bytes(change(path.read_bytes() if path.is_file() else b""))

    return edit


def link_out(root: Path) -> None:
    (root.parent / "secret").write_text("secret")
    (root / "notes.txt").symlink_to(root.parent / "secret")


Edit = Callable[[Path], Any]
CONFIG_KEYS: dict[str, dict[str, Any]] = {
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "hidden_act": {"hidden_act": "gelu"},
    "rope_scaling.rope_type": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "rope_scaling.original_max_position_embeddings": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "rope_parameters.rope_theta": {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "default"}},
    "rope_scaling": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0}},
    "architectures": {"architectures": ["GemmaForCausalLM"]},
    "hidden_size": {"hidden_size": None},
    "vocab_size": {"vocab_size": "390"},
    "num_attention_heads": {"num_attention_heads": 0},
    "num_key_value_heads": {"num_key_value_heads": 3},
    "rope_": {"rope_parameters": "default"},
}
REFUSED: list[tuple[str, Edit, list[str]]] = [  # damage of every other kind is tests/unit/checkpoint/test_malformed.py's
    *((f"config {key}", edit_json("config.json", **change), [f"config.json:{key}"]) for key, change in CONFIG_KEYS.items()),
    (
        "all three",
        edit_shard(lambda found: (found.pop(QUERY), found.update({"x": torch.ones(1), NORM: torch.ones(2)}))),
        [QUERY, f"{SHARD}: x", NORM],
    ),
    ("a link out of the folder among the other files", link_out, ["notes.txt: found a link out of the folder"]),
]


@pytest.mark.parametrize(("edit", "named"), [(edit, named) for _, edit, named in REFUSED], ids=[name for name, _, _ in REFUSED])
def test_a_folder_that_does_not_hold_is_refused_by_name(hf_root: Path, edit: Edit, named: list[str]) -> None:
    edit(hf_root)
    before = sorted(hf_root.parent.iterdir())
    with pytest.raises(InputError) as caught:
        convert.run_import(hf_root, hf_root.parent / "out", dry_run=False)
    assert all(str(hf_root) in problem.where for problem in caught.value.problems)
    assert not [name for name in named if name not in str(caught.value)], str(caught.value)
    assert sorted(hf_root.parent.iterdir()) == before


def test_a_tokenizer_larger_than_the_model_is_refused(make_folder: Callable[..., Path], tiny_tokenizer: Path, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "hf", {"vocab_size": 383}, 1)
    shutil.copyfile(tiny_tokenizer / "tokenizer.json", root / "tokenizer.json")
    with pytest.raises(InputError, match=f"{root}/tokenizer.json: found token id 383 '.*'; required ids below .*383"):
        convert.run_import(root, tmp_path / "out", dry_run=False)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("kind", ["absent", "a file"])
def test_a_source_that_is_no_folder_is_refused(hf_root: Path, tmp_path: Path, kind: str) -> None:
    source = tmp_path / "absent" if kind == "absent" else hf_root / SHARD
    with pytest.raises(InputError, match=f"{source}"):
        convert.run_import(source, tmp_path / "out", dry_run=False)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def edit_state(change: Callable[[dict[str, torch.Tensor]], Any]) -> Edit:
    """Return a change to the tensors of a checkpoint's state."""

    def edit(root: Path) -> None:
        reader = torch_dist.TensorReader(root / "state")
        found = {key: reader.read(key, shape) for key, shape in reader.shapes().items()}
        change(found)
        for path in (root / "state").iterdir():
            path.unlink()
        specs = [torch_dist.TensorSpec(key, tuple(value.shape), value.dtype) for key, value in found.items()]
        torch_dist.write_tensors(root / "state", specs, lambda key: [as_torch.of_tensor(found[key])])
        integrity.seal(root)

    return edit


FINAL = "decoder.final_layernorm.weight"
DAMAGED: list[tuple[str, Edit, list[str]]] = [
    ("no prism.json", lambda root: (root / "prism.json").unlink(), ["no prism.json"]),
    ("no metadata", lambda root: (root / "state" / ".metadata").unlink(), ["state: found"]),
    ("missing tensor", edit_state(lambda found: found.pop(FINAL)), [f"state: {FINAL}: found no such tensor"]),
    ("extra tensor", edit_state(lambda found: found.update({"x": torch.ones(2)})), ["state: x: found a model tensor without a rule"]),
    ("wrong shape", edit_state(lambda found: found.update({FINAL: torch.ones(15)})), [f"state: {FINAL}: found shape [15]"]),
    ("padded, and no vocabulary", edit_state(lambda found: found.update({FINAL: torch.ones(17)})), [f"state: {FINAL}: found shape [17]"]),
    ("tensors cut off", rewrite("state/__0_0.distcp", lambda data: data[: len(data) // 2]), ["state: ", ": found"]),
    ("tensors absent", lambda root: (root / "state" / "__0_0.distcp").unlink(), ["state: ", "embedding.word_embeddings.weight"]),
    ("headers cut off", rewrite("shards.json", lambda data: data[:-9]), ["shards.json: found"]),
    ("headers of no list", rewrite("shards.json", lambda _: b"{}"), ["shards.json: "]),
    (
        "headers that leave the folder",
        lambda root: (root / "shards.json").write_text((root / "shards.json").read_text().replace(SHARD, "../a")),
        ["shards.json"],
    ),
    ("no files of Hugging Face", lambda root: shutil.rmtree(root / "hf"), ["hf"]),
]


@pytest.mark.parametrize(("edit", "named"), [(edit, named) for _, edit, named in DAMAGED], ids=[name for name, _, _ in DAMAGED])
def test_a_checkpoint_that_does_not_hold_is_refused_by_name(ckpt_root: Path, edit: Edit, named: list[str]) -> None:
    edit(ckpt_root)
    integrity.seal(ckpt_root)  # as if it had been written so: what the sums see is tests/unit/checkpoint/test_integrity.py's
    with pytest.raises(InputError) as caught:
        convert.run_export(ckpt_root, ckpt_root.parent / "out", dry_run=False)
    assert not [name for name in named if name not in str(caught.value)], str(caught.value)
    assert [path.name for path in ckpt_root.parent.iterdir()] == ["ckpt"]


def test_vocabulary_rows_that_only_pad_are_dropped(pristine: Path, ckpt_root: Path, tmp_path: Path) -> None:
    def pad(found: dict[str, torch.Tensor]) -> None:
        for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            found[key] = torch.cat([found[key], torch.ones(122, 16)])

    edit_state(pad)(ckpt_root)
    convert.run_export(ckpt_root, tmp_path / "out", dry_run=False)
    assert files(tmp_path / "out") == files(pristine / "hf")


def convert_one(job: str, source: Path, out: Path) -> None:
    if job == "import":
        convert.run_import(source / "hf", out, dry_run=False)
    else:
        convert.run_export(source / "ckpt", out, dry_run=False)


@pytest.mark.parametrize("job", ["import", "export"])
def test_an_output_that_is_there_stays_as_it_is(pristine: Path, tmp_path: Path, job: str) -> None:
    (tmp_path / "empty").mkdir()
    convert_one(job, pristine, tmp_path / "empty")
    assert any((tmp_path / "empty").iterdir())
    before = {path: path.read_bytes() for path in (tmp_path / "empty").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="found an existing output"):
        convert_one(job, pristine, tmp_path / "empty")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("job", ["import", "export"])
def test_a_conversion_that_dies_halfway_leaves_nothing(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str) -> None:
    calls = iter(range(100))

    def dies(*args: Any) -> Any:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return whole(*args)

    name = "read_values" if job == "import" else "write_values"
    whole = getattr(safetensors, name)
    monkeypatch.setattr(safetensors, name, dies)
    with pytest.raises(KeyboardInterrupt):
        convert_one(job, pristine, tmp_path / "out")
    assert next(calls) == 6
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("job", ["import", "export"])
def test_a_full_disk_is_an_environment_fault(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentFault, match="No space left on device"):
        convert_one(job, pristine, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def large(make_folder: Callable[..., Path], pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of six shards of 30 MB, a layer each, and its checkpoint."""
    root = tmp_path_factory.mktemp("large")
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 1280,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 500,
    }
    make_folder(root / "hf", sizes, 6)
    convert.run_import(root / "hf", root / "ckpt", dry_run=False)
    return root


def peak_bytes(job: str, source: Path, target: Path, tiny: Path) -> int:
    command = [sys.executable, str(PEAK), job, str(source), str(target), str(tiny)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"MALLOC_ARENA_MAX": "1"})
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("job", ["import", "export"])
def test_a_conversion_holds_less_than_two_shards(large: Path, pristine: Path, tmp_path: Path, job: str) -> None:
    source = "hf" if job == "import" else "ckpt"
    shard_bytes = max(path.stat().st_size for path in (large / "hf").glob("*.safetensors"))
    assert 25e6 < shard_bytes < 40e6
    assert peak_bytes(job, large / source, tmp_path / "out", pristine / source) < 2 * shard_bytes


def test_the_measure_sees_a_model_held_at_once(large: Path, pristine: Path, tmp_path: Path) -> None:
    whole_bytes = sum(path.stat().st_size for path in (large / "hf").glob("*.safetensors"))
    assert peak_bytes("control", large / "hf", tmp_path / "out", pristine / "hf") > 0.9 * whole_bytes
