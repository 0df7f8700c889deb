"""Run models in Megatron and in transformers side by side, in a gang of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
