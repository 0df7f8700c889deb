"""A training config as plain values, and as the YAML file of a user; and a config of each job that has all sections."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_prism.core.config import (
    CheckConfig,
    ClaimConfig,
    ClusterConfig,
    ContainerConfig,
    DecontaminateConfig,
    JobConfig,
    KeepConfig,
    Llama3Rope,
    MambaConfig,
    ModelConfig,
    PackingConfig,
    PartConfig,
    PipelineConfig,
    PrepareConfig,
    PromptsConfig,
    PromptSourceConfig,
    SampleConfig,
    SourceConfig,
    StageConfig,
    StudyConfig,
    TrainConfig,
    TurnsConfig,
    YarnRope,
)
from megatron_prism.core.load import to_dict

VALUES: dict[str, Any] = {
    "run_dir": "runs/a",
    "steps": 100,
    "data": {"prepared": "data/a", "seq_length": 64, "weights": {"math": 60.0, "code": 40.0}},
    "batch": {"global_size": 8, "micro_size": 2},
    "init": {"checkpoint": "ckpt/a"},
    "optimizer": {"lr": 5e-5},
    "schedule": {"warmup_steps": 5},
}
MODEL = ModelConfig(
    family="llama",
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=8,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=4,
    vocab_size=9,
    max_position_embeddings=64,
    layer_pattern="M*",
    mamba=MambaConfig(num_heads=2, head_dim=4, state_dim=4, num_groups=1),
    rope_scaling=Llama3Rope(factor=8.0),
    yarn=YarnRope(factor=4.0, original_max_position_embeddings=16, attention_factor=1.0, mscale=1.0, mscale_all_dim=1.0),
    attention_multiplier=1.0,
    window_size=4,
)
PART = PartConfig(path=("a",), keep=(KeepConfig(field="a", equals=1),), turns=TurnsConfig(), sample=SampleConfig(counts={"a": 1}))
SOURCE = SourceConfig(name="a", weight=100.0, parts=(PART,), keep=PART.keep, turns=PART.turns, sample=PART.sample, available_tokens=1)
CHECK = CheckConfig(value="a:b", above=1.0)
FULL: dict[type, Any] = {  # every section is there, and every list has an entry
    TrainConfig: {
        "run_dir": "r",
        "steps": 9,
        "world_size": 1,
        "data": {"prepared": "p", "seq_length": 8, "weights": {"a": 100}, "changes": [{"step": 2, "weights": {"a": 100}}], "max_epochs": 1},
        "batch": {"global_size": 8},
        "init": {"tokenizer": "t", "max_position_embeddings": 8, "rope_theta": 2.0, "yarn": to_dict(MODEL.yarn), "window_size": 8},
        "model": to_dict(MODEL),
        "parallel": {"vpp": 2, "cp_a2a_size": 1},
        "recompute": {"num_layers": 1},
        "schedule": {"wsd_decay_steps": 1},
        "fp8": {},
        "log": {"peak_tflops": 1},
        "limits": {"wall_clock_s": 1},
    },
    PrepareConfig: to_dict(
        PrepareConfig(
            out=Path("o"),
            tokenizer=Path("t"),
            sources=(SOURCE,),
            tokens=1,
            max_epochs=1.0,
            num_workers=1,
            decontaminate=DecontaminateConfig(against=(PART,)),
            packing=PackingConfig(seq_length=8),
        )
    ),
    PromptsConfig: to_dict(
        PromptsConfig(
            out=Path("o"),
            sources=(PromptSourceConfig(name="a", domain="math", kind="math", path=("a",), text="{a}", keep=PART.keep),),
            decontaminate=DecontaminateConfig(against=(PART,)),
        )
    ),
    ClusterConfig: to_dict(ClusterConfig(gpus_per_node=8, cpus_per_task=1, sbatch=("--a",), container=ContainerConfig(image="i"))),
    StudyConfig: to_dict(
        StudyConfig(
            name="a",
            run_dir=Path("r"),
            variables={"a": "1"},
            environment={"A": "1"},
            stages=(StageConfig(name="a", command=("b",)),),
            claims=(ClaimConfig(name="a", says="b", requires=(CHECK,), shows=(CHECK,), null=(CHECK,)),),
        )
    ),
    PipelineConfig: to_dict(PipelineConfig(name="a", run_dir=Path("r"), stages=(JobConfig(name="a", command=("b",)),))),
}
Write = Callable[..., Path]


@pytest.fixture
def values() -> dict[str, Any]:
    """Return a valid training config that a test may change."""
    return copy.deepcopy(VALUES)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a YAML file (a dict, or text) into the test's folder and returns its path."""

    def write_one(name: str, content: dict[str, Any] | str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write_one


@pytest.fixture
def full() -> dict[type, dict[str, Any]]:
    """Return a config of each job as plain values, that a test may change."""
    return copy.deepcopy(FULL)
