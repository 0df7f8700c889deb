"""Run models in Megatron and in transformers side by side, in a gang of their own."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .tiny import FAMILIES, random_model

WORKER = Path(__file__).with_name("worker.py")
GANG = Path(__file__).parents[1] / "gang.py"
Compare = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture(scope="session")
def compare() -> Compare:
    """Return a function that runs the worker's cases in a folder, on a gang of so many, and returns the differences by case."""

    def run(root: Path, cases: list[dict[str, Any]], num_processes: int = 1) -> dict[str, dict[str, Any]]:
        (root / "cases.json").write_text(
            json.dumps([{"control": None, "replace": {}, "documents": None, "parallel": {}, **case} for case in cases])
        )
        command = [sys.executable, str(GANG), str(num_processes), str(WORKER), str(root)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads((root / "results.json").read_text())

    return run


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return, by family, a folder with hf/ (fp32), ckpt/ and bf16/."""
    import torch

    from megatron_prism.jobs import convert

    found = {}
    for name in FAMILIES:
        root = found[name] = tmp_path_factory.mktemp(name)
        model = random_model(name)
        model.save_pretrained(root / "hf")
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(root / "bf16", max_shard_size="60KB")
        convert.run_import(root / "hf", root / "ckpt", dry_run=False)
    return found
