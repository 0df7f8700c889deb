"""What a stranger's model folder, data file or config can do: be refused, or be read. It never runs (checkpoints: test_hostile.py)."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prism.checkpoint import convert, folder, integrity, reference
from megatron_prism.checkpoint.plan import plan_export, plan_import
from megatron_prism.core.config import TrainConfig
from megatron_prism.core.errors import CheckpointError, InputError
from megatron_prism.core.load import load
from megatron_prism.data import indexed, tokenizer
from megatron_prism.prepare import arrow, shards

from .conftest import Payload, saved


@pytest.fixture
def hf_root(tmp_path: Path, make_folder: Callable[..., Path], tiny_tokenizer: Path) -> Path:
    """Return a Hugging Face folder of a tiny LLaMA, with a tokenizer."""
    root = make_folder(tmp_path / "hf", {"model_type": "llama"}, 2)
    for file in tiny_tokenizer.iterdir():
        shutil.copyfile(file, root / file.name)
    return root


def pickled_weights(root: Path, payload: Payload) -> str:
    for path in root.glob("model*"):
        path.unlink()
    torch.save({"model.norm.weight": payload}, root / "pytorch_model.bin")
    return "pytorch_model.bin"


def out_of_the_folder(root: Path, payload: Payload) -> str:
    (root.parent / "evil.safetensors").write_bytes(saved(payload))
    index = json.loads((root / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "../evil.safetensors"
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    return "model.safetensors.index.json"


def link(root: Path, payload: Payload) -> str:
    (root.parent / "evil").write_bytes(saved(payload))
    (root / "model-00001-of-00002.safetensors").unlink()
    (root / "model-00001-of-00002.safetensors").symlink_to(root.parent / "evil")
    return "model-00001-of-00002.safetensors"


def pickle_as_safetensors(root: Path, payload: Payload) -> str:
    (root / "model-00002-of-00002.safetensors").write_bytes(saved(payload))
    return "model-00002-of-00002.safetensors"


def own_model(root: Path, payload: Payload) -> str:
    custom_code(
        root,
        payload,
        "config.json",
        {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"},
        model_type="evil",
        architectures=["Evil"],
    )
    return "config.json"


def custom_code(root: Path, payload: Payload, file: str, auto_map: dict[str, Any], **changes: Any) -> None:
    (root / "modeling_evil.py").write_text(f"import os\nos.system({payload.command!r})\nclass Evil: ...\n")
    (root / file).write_text(json.dumps({**json.loads((root / file).read_text()), **changes, "auto_map": auto_map}))


HF_CHANGES = [pickled_weights, out_of_the_folder, link, pickle_as_safetensors, own_model]


@pytest.mark.parametrize("change", HF_CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_folder_is_refused_and_does_not_run(hf_root: Path, marker: Path, change: Callable) -> None:
    named = change(hf_root, Payload(marker))
    with pytest.raises(InputError, match=named):
        plan_import(hf_root)
    assert not marker.exists()


@pytest.mark.parametrize("change", [pickled_weights, pickle_as_safetensors, own_model], ids=lambda change: change.__name__)
def test_nor_does_it_run_in_transformers(hf_root: Path, marker: Path, change: Callable) -> None:
    change(hf_root, Payload(marker))
    with pytest.raises(CheckpointError, match=str(hf_root)):
        reference.load(hf_root)
    assert not marker.exists()


def test_the_code_beside_a_known_model_and_its_tokenizer_is_not_looked_at(hf_root: Path, marker: Path) -> None:
    payload = Payload(marker)
    custom_code(hf_root, payload, "config.json", {"AutoModelForCausalLM": "modeling_evil.Evil"})
    custom_code(hf_root, payload, "tokenizer_config.json", {"AutoTokenizer": ["modeling_evil.Evil", None]})
    plan_import(hf_root)
    tokenizer.load(hf_root, need_eos=False)
    assert type(reference.load(hf_root)).__name__ == "LlamaForCausalLM"
    assert not marker.exists()


def test_an_export_writes_to_its_folder_alone(hf_root: Path, tmp_path: Path) -> None:
    convert.import_hf(plan_import(hf_root), tmp_path / "ckpt")
    kept = tmp_path / "ckpt" / folder.SHARDS
    whole = json.loads(kept.read_text())
    for name in ("../evil.safetensors", str(tmp_path / "evil.safetensors"), "evil.sh"):
        kept.write_text(json.dumps([whole[0] | {"file": name}, *whole[1:]]))
        integrity.seal(tmp_path / "ckpt")  # whoever made it can make its sums
        with pytest.raises(CheckpointError, match=f"{folder.SHARDS}.*evil"):
            plan_export(tmp_path / "ckpt")
    kept.write_text(json.dumps(whole))
    (tmp_path / "secret").write_text("a key")
    (tmp_path / "ckpt" / folder.ASSETS / "notes.txt").symlink_to(tmp_path / "secret")
    integrity.seal(tmp_path / "ckpt")
    with pytest.raises(InputError, match="notes.txt: found a link"):
        plan_export(tmp_path / "ckpt")


def test_a_pickled_array_among_the_data_is_refused(tmp_path: Path, marker: Path) -> None:
    np.save(tmp_path / "00000.keys.npy", np.array([Payload(marker)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        shards.keys(tmp_path, 0)
    (tmp_path / "a.bin").write_bytes(b"\0\0")
    for data in ((tmp_path / "00000.keys.npy").read_bytes(), pickle.dumps(Payload(marker))):
        (tmp_path / "a.idx").write_bytes(data)
        for read in (indexed.verify, lambda prefix: indexed.Reader([prefix])):
            with pytest.raises(InputError, match="a.idx"):
                read(tmp_path / "a")
    assert not marker.exists()
    np.load(tmp_path / "00000.keys.npy", allow_pickle=True)
    assert marker.exists()


def test_a_parquet_column_of_a_pickled_type_does_not_run(tmp_path: Path, marker: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pickled_type = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Payload(marker), 0).decode(),
    }
    table = pa.table([pa.array(["a", "b"])], schema=pa.schema([pa.field("text", pa.string(), metadata=pickled_type)]))
    pq.write_table(table, tmp_path / "a.parquet")
    with (tmp_path / "a.parquet").open("rb") as raw:
        assert [row for _, row in arrow.records(tmp_path / "a.parquet", raw, ["text"])] == [{"text": b"a"}, {"text": b"b"}]
    assert not marker.exists()


CONFIGS = {
    "an object": "run_dir: !!python/object/apply:os.system ['echo ran > {marker}']\n",
    "a new object": "run_dir: !!python/object/new:os.system ['echo ran > {marker}']\n",
    "a module": "run_dir: !!python/module:antigravity\n",
    "a target": "model:\n  _target_: os.system\n  command: echo ran > {marker}\n",
    "a resolver": "run_dir: ${{oc.create:os.system}}\n",
    "code": "run_dir: ${{eval:__import__('os').system('echo ran > {marker}')}}\n",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_does_not_run(tmp_path: Path, marker: Path, name: str) -> None:
    (tmp_path / "train.yaml").write_text(CONFIGS[name].format(marker=marker))
    with pytest.raises(InputError, match="train.yaml"):
        load(tmp_path / "train.yaml", TrainConfig)
    assert not marker.exists()
