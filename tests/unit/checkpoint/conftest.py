"""A tiny Hugging Face LLaMA folder of two shards, made without transformers, and its checkpoint."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "vocab_size": 390,
}


def write_folder(root: Path, config: dict[str, Any], num_shards: int) -> Path:
    """Write a random model of a config.json with our rules' names, its layers dealt over the shards."""
    import torch
    from safetensors.torch import save_file

    from megatron_prism.families import find, llama

    root.mkdir()
    (root / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    shapes = [part for rule in find.rules(llama.read_config(config, "config.json")) for part in rule.hf]
    each = -(-len(shapes) // num_shards)
    weight_map = {}
    for index in range(num_shards):
        part = shapes[index * each : (index + 1) * each]
        file = f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"
        save_file({name: torch.randn(shape) for name, shape in part}, root / file, metadata={"format": "pt"})
        weight_map |= {name: file for name, _ in part}
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return root


@pytest.fixture(scope="session")
def make_folder() -> Callable[..., Path]:
    """Return a function that writes a folder: (root, changes to its config, number of shards)."""
    return lambda root, changes, num_shards: write_folder(root, CONFIG | changes, num_shards)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Return a Hugging Face folder (hf) and its checkpoint (ckpt) side by side; tests copy them."""
    from megatron_prism.jobs import convert

    root = tmp_path_factory.mktemp("pristine")
    write_folder(root / "hf", CONFIG, 2)
    for file in tiny_tokenizer.iterdir():
        shutil.copyfile(file, root / "hf" / file.name)
    convert.run_import(root / "hf", root / "ckpt", dry_run=False)
    return root


@pytest.fixture
def hf_root(pristine: Path, tmp_path: Path) -> Path:
    """Return a copy of the Hugging Face folder that a test may damage."""
    return Path(shutil.copytree(pristine / "hf", tmp_path / "hf"))


@pytest.fixture
def ckpt_root(pristine: Path, tmp_path: Path) -> Path:
    """Return a copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(pristine / "ckpt", tmp_path / "ckpt"))


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    """Stop what would wait for ever."""

    def stop(*_: object) -> None:
        raise AssertionError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def limit() -> Callable[[int], AbstractContextManager[None]]:
    """Return `no_longer_than`."""
    return no_longer_than
