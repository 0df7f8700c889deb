"""What people give in place of a model folder is named for what it is, in one line, with the way out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_prism.checkpoint.plan import plan_import
from megatron_prism.core.errors import CheckpointError, InputError
from megatron_prism.data import tokenizer
from megatron_prism.hf import files, recognise, safetensors

FOLDERS: dict[str, tuple[list[str], str]] = {  # what it holds, and what its refusal says
    "adapter": (["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"], "an adapter alone .*merge_and_unload"),
    "Meta's": (["params.json", "consolidated.00.pth", "tokenizer.model"], "Meta's own layout .*convert_llama_weights_to_hf"),
    "Mistral's": (["params.json", "consolidated.safetensors", "tekken.json"], "Mistral's own layout"),
    "GGUF": (["model-Q4_K_M.GGUF", "README.md"], "a GGUF model .*safetensors release"),
    "NeMo 1": (["model_config.yaml", "model_weights/"], "a checkpoint of NeMo"),
    "NeMo 2": (["context/model.yaml", "weights/common.pt"], "a checkpoint of NeMo"),
    "a file of NeMo": (["llama.nemo"], "a checkpoint of NeMo"),
    "Megatron": (["latest_checkpointed_iteration.txt", "iter_0000010/"], "a distributed checkpoint"),
    "torch's own": (["__0_0.distcp", ".metadata"], "a distributed checkpoint"),
    "DeepSpeed": (["zero_to_fp32.py", "latest", "global_step10/"], "a checkpoint of DeepSpeed; .*zero_to_fp32"),
    "prism": (["prism.json", "state/", "hf/config.json"], "a Megatron checkpoint of prism.*prism convert export"),
    "a run of prism": (["checkpoints/step_00000010/hf/config.json", "run.json"], "a Megatron checkpoint of prism.*prism convert export"),
    "MLX": (["weights.00.npz"], "a model of MLX"),
    "Flax": (["flax_model.msgpack"], "weights of Flax"),
    "diffusers": (["model_index.json", "unet/config.json"], "a folder of model folders"),
    "the hub's cache of a model": (["snapshots/0123abc/config.json", "blobs/", "refs/main"], "the hub's cache .*snapshots/0123abc"),
    "the hub's cache": (["models--org--name/snapshots/", "version.txt"], "the hub's cache; .*snapshots/HASH"),
    "its home": (["hub/models--org--name/", "token"], "the hub's cache; .*snapshots/HASH"),
    "a trainer's run": (["checkpoint-500/config.json", "checkpoint-1000/config.json"], "a folder of model folders .*give one of them"),
    "nothing": ([], "an empty folder"),
    "a tokenizer": (["tokenizer.json"], "config.json: found no such file"),
}
BESIDE_CONFIG: dict[str, tuple[list[str], str]] = {
    "adapter": (["adapter_config.json", "adapter_model.safetensors"], "an adapter alone .*merge_and_unload"),
    "shards without an index": (
        ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"],
        "2 of 3 shards.* fetch the index",
    ),
    "GGUF": (["model.gguf"], "a GGUF model"),
    "Mistral's": (["consolidated.safetensors", "params.json"], "Mistral's own layout"),
    "Meta's": (["consolidated.00.pth", "params.json"], "Meta's own layout"),
    "pickles": (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "only pytorch_model-00001.* save the model anew"),
    "TensorFlow": (["tf_model.h5"], "weights of Flax, TensorFlow"),
    "other names": (
        ["weights.safetensors"],
        "no safetensors weights of these names, only weights.safetensors; .*rename weights.safetensors to model.safetensors",
    ),
    "nothing": ([], "no safetensors weights; required model.safetensors"),
}


def fill(root: Path, names: list[str]) -> Path:
    root.mkdir()
    for name in names:
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
    return root


def refused(root: Path) -> str:
    with pytest.raises(InputError) as caught:
        plan_import(root)
    text = str(caught.value)
    assert str(root) in text and len(text.splitlines()) == 1
    return text.replace(f"{root.parent}/", "", 1)


@pytest.mark.parametrize("kind", FOLDERS)
def test_what_has_no_config_is_named(tmp_path: Path, kind: str) -> None:
    names, said = FOLDERS[kind]
    assert re.search(said, refused(fill(tmp_path / "given", names)))


@pytest.mark.parametrize("kind", BESIDE_CONFIG)
def test_what_lies_in_place_of_the_weights_is_named(tmp_path: Path, kind: str) -> None:
    names, said = BESIDE_CONFIG[kind]
    root = fill(tmp_path / "given", names)
    sizes = '"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9'
    (root / "config.json").write_text(f'{{"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 8, {sizes}}}')
    assert re.search(said, refused(root))


@pytest.mark.parametrize("dtype", ["int32", "uint8", "int8", "float8_e4m3fn"])
def test_quantised_weights_are_one_line_whatever_their_number(tmp_path: Path, dtype: str) -> None:
    names = {f"model-0000{file}-of-00002.safetensors": [f"model.layers.{file}.{part}.qweight" for part in range(20)] for file in (1, 2)}
    for file, tensors in names.items():
        save_file({name: torch.ones(4).to(getattr(torch, dtype)) for name in tensors}, tmp_path / file)
    listed = {name: file for file, tensors in names.items() for name in tensors}
    (tmp_path / safetensors.INDEX).write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(CheckpointError, match=r"found dtype '.*' \(and 39 more\); .*are its weights quantised") as caught:
        safetensors.open_shards(tmp_path)
    assert len(caught.value.problems) == 1


def test_thirty_pointers_are_one_line(tmp_path: Path) -> None:
    listed = {f"tensor{number}": f"model-{number:05d}-of-00030.safetensors" for number in range(1, 31)}
    for file in listed.values():
        (tmp_path / file).write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / safetensors.INDEX).write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(CheckpointError, match=r"found a Git-LFS pointer, not the file \(and 29 more\)") as caught:
        safetensors.open_shards(tmp_path)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("meta-llama/Llama-3.1-8B", "no such folder.*hf download meta-llama/Llama-3.1-8B --local-dir"),
        ("absent", "no such folder"),
        ("/absent/folder", "no such folder"),
        ("https://huggingface.co/org/name", "no such folder.* an address.* Download what is there"),
        ("s3://bucket/name", "no such folder.* an address.* Download what is there"),
    ],
)
def test_a_name_on_the_hub_is_to_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    text = refused(Path(given))
    assert re.search(said, text) and ("hf download" in text) == (given.count("/") == 1)


def test_a_file_of_a_folder_is_not_the_folder(tmp_path: Path) -> None:
    root = fill(tmp_path / "given", ["config.json", "model.safetensors"])
    assert refused(root / "model.safetensors").endswith(
        f"found a file; required {recognise.FOLDER}; give the folder that it is in: {root}\n".strip()
    )


def test_a_folder_with_another_tokenizer_alone_names_it(tmp_path: Path) -> None:
    for name in ("tekken.json", "tokenizer.model"):
        root = fill(tmp_path / name, [name, "config.json"])
        with pytest.raises(InputError, match=f"tokenizer: found no file {root}/tokenizer.json, only {name}; .*save_pretrained"):
            tokenizer.load(root)


def test_the_tokenizer_of_such_a_folder_is_not_merely_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = fill(tmp_path / "models--org--name", ["snapshots/0123abc/config.json"])
    for given, said in ((Path("org/name"), "hf download org/name"), (cache, "give the snapshot: .*snapshots/0123abc")):
        with pytest.raises(InputError, match=f"tokenizer: found no file {given}/tokenizer.json .*{said}"):
            tokenizer.load(given)


def test_shards_that_were_not_fetched_are_one_line(tmp_path: Path) -> None:
    listed = {f"tensor{number}": f"model-{number:05d}-of-00030.safetensors" for number in range(1, 31)}
    (tmp_path / safetensors.INDEX).write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(CheckpointError, match=r"00001-of-00030.safetensors: found no such file \(and 29 more\)") as caught:
        safetensors.open_shards(tmp_path)
    assert len(caught.value.problems) == 1


def test_a_file_and_a_dangling_link_are_named(tmp_path: Path) -> None:
    (tmp_path / "model-q8.gguf").write_bytes(b"GGUF")
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    assert "a GGUF model" in refused(tmp_path / "model-q8.gguf")
    assert "a link to" in refused(tmp_path / "link")


@pytest.mark.parametrize(
    ("start", "found"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\n  <HTML lang=en>", "web page"),
        (b'<?xml version="1.0"?><Error>', "web page"),
        (b"{}", None),
        (b"", None),
    ],
)
def test_a_file_is_known_by_how_it_begins(tmp_path: Path, start: bytes, found: str | None) -> None:
    (tmp_path / "file").write_bytes(start)
    problem = files.refusal(tmp_path / "file", "a file")
    assert problem is None if found is None else problem is not None and found in problem.found


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_links_of_the_hubs_cache_lead_to_its_blobs_at_any_depth(tmp_path: Path, depth: int) -> None:
    cache = tmp_path / "models--org--name"
    folder = cache.joinpath("snapshots", "0123abc", *["sub"] * (depth - 1))
    folder.mkdir(parents=True)
    for name in ("blobs", "secrets"):
        (cache / name).mkdir()
        (cache / name / "hash").write_text("{}")
    (folder / "config.json").symlink_to("../" * (depth + 1) + "blobs/hash")
    (folder / "leak.json").symlink_to("../" * (depth + 1) + "secrets/hash")
    assert files.is_inside(folder / "config.json") and not files.is_inside(folder / "leak.json")
    disk = cache.rename(tmp_path / "disk")  # the whole cache reached through a link
    cache.symlink_to(disk)
    assert files.is_inside(folder / "config.json")
    copies = (disk / "snapshots").rename(disk / "copies")
    assert not files.is_inside(copies / folder.relative_to(cache / "snapshots") / "config.json")
