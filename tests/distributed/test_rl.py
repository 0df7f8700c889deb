"""Reinforcement learning over layouts, through a kill, and what it learns: the whole job on a toy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.checkpoint.folder import steps
from tests.distributed import toy_rl

pytestmark = pytest.mark.slow
KEPT = ("reward", "kept_groups", "response_tokens", "entropy", "loss", "grad_norm", "ratio", "kl")


def curve(run_dir: Path) -> list[dict[str, Any]]:
    """Return the metrics that follow from the run's state alone, by step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in KEPT} for line in lines if "loss" in line]


def responses(run_dir: Path) -> list[str]:
    return [path.read_text() for path in sorted((run_dir / "rollouts").glob("*.jsonl"))]


def state(run_dir: Path) -> dict[str, str]:
    """Return the hashes of the last checkpoint's tensors."""
    import torch

    from megatron_prism.checkpoint import torch_dist

    reader = torch_dist.TensorReader(steps(run_dir / "checkpoints")[-1] / "state")
    return {name: reader.read(name).contiguous().view(torch.uint8).numpy().tobytes().hex()[:4096] for name in reader.dtypes()}


def test_one_process_learns(run_distributed: Callable[..., list[Any]], tiny_checkpoint: Path, tmp_path: Path) -> None:
    prompts = toy_rl.write_prompts(tmp_path / "prompts")
    run_distributed(toy_rl.train, 1, timeout_s=300, run_dir=tmp_path / "run", prompts=prompts, checkpoint=tiny_checkpoint, steps=12)
    for line in curve(tmp_path / "run"):
        print(line)
    assert 0
