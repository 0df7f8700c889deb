"""The NeMo-RL config: its keys are those of NeMo-RL's published example, and what does not go together is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_prism.core.config import NemoRlConfig
from megatron_prism.core.errors import InputError
from megatron_prism.core.manifest import sha256_file
from megatron_prism.data import prompts as prompt_set
from megatron_prism.data import tokenizer
from megatron_prism.jobs import aligner

KNOWN = set(json.loads((Path(__file__).parent / "nemo_rl_keys.json").read_text())["keys"])


def flat(values: dict[str, Any], above: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield from flat(value, f"{above}{key}.") if isinstance(value, dict) else [f"{above}{key}"]


def config(tmp_path: Path, kind: str = "math", **changes: Any) -> NemoRlConfig:
    record = {"id": "a", "domain": "math", "kind": kind, "prompt": "1 + 1?", "gold": "A", "choices": ["1", "2"]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(record) + "\n")
    path = tmp_path / "prompts.jsonl"
    return NemoRlConfig(**{"hf": "/w/hf", "prompts": path, "validation_prompts": path, "results": "/w/r", **changes})


@pytest.mark.parametrize("changes", [{}, {"max_staleness": 2, "num_nodes": 4, "num_generation_nodes": 2}])
def test_its_keys_are_nemo_rls(tmp_path: Path, changes: dict[str, Any]) -> None:
    aligner.export_nemo_rl(config(tmp_path, **changes), tmp_path / "out")
    written = yaml.safe_load((tmp_path / "out/grpo.yaml").read_text())
    assert written.pop("defaults") == "/opt/nemo-rl/examples/configs/grpo_math_1B.yaml"
    assert set(flat(written)) <= KNOWN
    assert written["grpo"]["async_grpo"] == {"enabled": bool(changes), "max_trajectory_age_steps": changes.get("max_staleness", 1)}
    assert written["loss_fn"]["truncated_importance_sampling_ratio"] == 2.0 and written["loss_fn"]["use_importance_sampling_correction"]
    assert json.loads((tmp_path / "out/train.jsonl").read_text()) == {"input": "1 + 1?", "output": "A"}


def test_a_misspelt_key_would_be_seen() -> None:
    assert not set(flat({"grpo": {"num_prompts": 1}})) <= KNOWN


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_staleness": 1}, "nodes that only sample"),
        ({"num_generation_nodes": 1, "num_nodes": 2}, "0 where max_staleness is 0"),
        ({"max_staleness": 1, "num_nodes": 2, "num_generation_nodes": 1, "tis_cap": None}, "requires importance sampling"),
        ({"tp": 3}, "a divisor of the GPUs"),
        ({"kind": "choice"}, "the kind choice"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        aligner.export_nemo_rl(config(tmp_path, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_prompt_that_leaves_a_response_no_room_is_refused(tmp_path: Path, tiny_tokenizer: Path) -> None:
    num_tokens = len(tokenizer.encode_prompt("1 + 1?", tokenizer.load(tiny_tokenizer)))
    with pytest.raises(InputError, match=f"seq_length: found {num_tokens}, and the prompt a has {num_tokens} tokens"):
        aligner.export_nemo_rl(config(tmp_path, hf=str(tiny_tokenizer), seq_length=num_tokens), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    aligner.export_nemo_rl(config(tmp_path, hf=str(tiny_tokenizer), seq_length=num_tokens + 1), tmp_path / "out")


def test_a_prompt_set_that_is_not_as_its_manifest_says_is_refused(tmp_path: Path) -> None:
    settings = config(tmp_path)
    manifest = {"kind": prompt_set.KIND, "sha256": sha256_file(settings.prompts)}
    (tmp_path / prompt_set.MANIFEST).write_text(json.dumps(manifest))
    aligner.export_nemo_rl(settings, tmp_path / "whole")
    settings.prompts.write_text(settings.prompts.read_text().replace("1 + 1?", "1 + 2?"))
    with pytest.raises(InputError, match=r"prompts.jsonl: found sha256 .* as its manifest says"):
        aligner.export_nemo_rl(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()
