"""Real weights through the real command line: the published text on every layout, the same bytes back, the same logits.

Beside it a random LLaMA in bf16 and several shards. The oracle is transformers; the seven models: test_families.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Compare = Callable[[Path, list[dict[str, Any]]], dict[str, dict[str, Any]]]
LOGITS, GRADIENT = 2e-5, 5e-6  # tolerances in fp32: the largest difference, and the relative one by norm
TOKENS = 48  # of the golden text: over all 202 the logits of some instruction sets differ by 2.1e-5
GOLDEN_CHARACTERS = 464
CONTROLS = ["swapped_gate_and_up", "dropped_norm"]


def prism(*arguments: object) -> str:
    """Run the command line and return its standard output."""
    command = [sys.executable, "-m", "megatron_prism.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*")}


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> Path:
    return shared_data / "stories260k"


@pytest.fixture(scope="session")
def stories_checkpoint(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stories") / "ckpt"
    assert "parameters: 260,032" in prism("convert", "import", "--hf", stories, "--out", out)
    return out


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Return a folder (hf, ckpt) of a random bf16 LLaMA as transformers saves it in shards, with everything that may lie beside them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_prism.jobs import convert

    root = tmp_path_factory.mktemp("sharded")
    torch.manual_seed(0)
    sizes = {"vocab_size": 390, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 65536, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(**sizes, **more, initializer_range=0.1)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config.max_length = 77
    model.save_pretrained(root / "hf", max_shard_size="100KB")
    for file in tiny_tokenizer.iterdir():
        (root / "hf" / file.name).write_bytes(file.read_bytes())
    (root / "hf" / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n\xc3\xa9")
    convert.run_import(root / "hf", root / "ckpt", dry_run=False)
    return root


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param((), id="tp1"),
        pytest.param(("--tp", 2), id="tp2", marks=pytest.mark.slow),
        pytest.param(("--pp", 2), id="pp2", marks=pytest.mark.slow),
    ],
)
def test_greedy_text_is_the_published_one(stories: Path, stories_checkpoint: Path, layout: tuple) -> None:
    """Five layers: at pp 2 the stages are uneven."""
    golden = (stories / "GOLDEN.txt").read_text().removesuffix("\n")
    text = prism("generate", "--ckpt", stories_checkpoint, "--greedy", "--max-tokens", 200, "--prompt", "", *layout).removesuffix("\n")
    assert len(golden) == GOLDEN_CHARACTERS
    assert text[:GOLDEN_CHARACTERS] == golden


def test_verify_compares_on_a_text(stories: Path, stories_checkpoint: Path) -> None:
    said = prism("convert", "verify", "--hf", stories, "--ckpt", stories_checkpoint, "--tokens", 48)
    assert "passed: True" in said and "tokens: text" in said and "num_tokens: 48" in said


def test_export_is_the_folder_byte_for_byte(stories: Path, stories_checkpoint: Path, tmp_path: Path) -> None:
    prism("convert", "export", "--ckpt", stories_checkpoint, "--out", tmp_path / "out")
    assert files(tmp_path / "out") == files(stories)


def test_bf16_shards_come_back_byte_for_byte(sharded: Path, tmp_path: Path) -> None:
    from megatron_prism.jobs import convert

    result = convert.run_export(sharded / "ckpt", tmp_path / "out", dry_run=False)
    original = files(sharded / "hf")
    assert files(tmp_path / "out") == original
    assert result["dtypes"] == ["bfloat16"] and len(result["files"]) > 2
    assert {"model.safetensors.index.json", "generation_config.json", "chat_template.jinja", "tokenizer.json"} < original.keys()


@pytest.fixture(scope="session")
def results(
    compare: Compare, stories: Path, stories_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Return the differences from transformers by case, all from one process."""
    from tokenizers import Tokenizer

    root = tmp_path_factory.mktemp("parity")
    text = Tokenizer.from_file(str(stories / "tokenizer.json")).encode((stories / "GOLDEN.txt").read_text()).ids
    real = {"hf": str(stories), "ckpt": str(stories_checkpoint), "tokens": text[:TOKENS]}
    return compare(root, [{"name": "stories", **real}, *({"name": control, "control": control, **real} for control in CONTROLS)])


def test_logits_and_gradients_are_those_of_transformers(results: dict[str, dict[str, Any]]) -> None:
    assert results["stories"]["logits"] <= LOGITS
    assert results["stories"]["gradient"] <= GRADIENT, results["stories"]["parameter"]


@pytest.mark.parametrize("control", CONTROLS)
def test_control_is_seen(results: dict[str, dict[str, Any]], control: str) -> None:
    """The fault moves both far beyond their tolerances."""
    assert results[control]["logits"] > 100 * LOGITS
    assert results[control]["gradient"] > 100 * GRADIENT
