"""A training config as plain values, and as the YAML file of a user."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

VALUES: dict[str, Any] = {
    "run_dir": "runs/a",
    "steps": 100,
    "data": {"prepared": "data/a", "seq_length": 64, "weights": {"math": 60.0, "code": 40.0}},
    "batch": {"global_size": 8, "micro_size": 2},
    "init": {"checkpoint": "ckpt/a"},
    "optimizer": {"lr": 5e-5},
    "schedule": {"warmup_steps": 5},
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
