"""Configs, commands and a Slurm that only notes what it is asked, for tests of `prism submit` and `prism status`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.cli.submit import read_command
from megatron_prism.core.errors import InputError
from megatron_prism.jobs import submit

ROOT = Path(__file__).resolve().parents[3]
TRAIN: dict[str, Any] = {
    "run_dir": "run",
    "steps": 10,
    "world_size": 16,
    "data": {"prepared": "data", "seq_length": 64},
    "batch": {"global_size": 16},
    "init": {"checkpoint": "ckpt"},
    "parallel": {"tp": 2},
    "environment": {"NCCL_DEBUG": "INFO"},
}
RL: dict[str, Any] = {
    "run_dir": "rl",
    "steps": 10,
    "world_size": 16,
    "prompts": "prompts",
    "rollout": {"max_tokens": 48},
    "batch": {"seq_length": 64},
    "init": {"checkpoint": "run"},
    "parallel": {"tp": 2},
}
FILTER: dict[str, Any] = {
    "out": "passes",
    "world_size": 16,
    "prompts": "prompts",
    "rollout": {"max_tokens": 48},
    "init": {"checkpoint": "run"},
    "parallel": {"tp": 2},
}
PREPARE = {"out": "data", "tokenizer": "tok", "sources": [{"name": "a", "weight": 100, "path": ["a.txt"]}]}


def stub(home: Path, name: str, text: str) -> None:
    (home / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
    (home / "bin" / name).chmod(0o755)


def write(name: str, values: Any) -> Path:
    Path(name).write_text(json.dumps(values))  # JSON is YAML
    return Path(name)


def submitted(*words: str | Path, dry_run: bool = False, cluster: str = "cluster.yaml") -> dict[str, Any]:
    return submit.run([*map(str, words)], Path(cluster), dry_run, read_command)


def scripts(*words: str) -> list[str]:
    return submitted(*words, dry_run=True)["texts"]


def refused(*words: str) -> str:
    with pytest.raises(InputError) as caught:
        scripts(*words)
    return str(caught.value)


def chain(**train: Any) -> dict[str, Any]:
    stages = [
        {"name": "train", "after": ["prepare"], "command": ["train", "train.yaml"], **train},
        {"name": "prepare", "command": ["prepare", "mixture.yaml"]},
        {"name": "export", "after": ["train"], "command": ["convert", "export", "--ckpt", "run", "--out", "hf"]},
    ]
    return {"name": "all", "run_dir": "pipeline", "stages": stages}
