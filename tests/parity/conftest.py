"""Run models in Megatron and in transformers side by side, in one process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(scope="session")
def compare() -> Callable[[Path, list[dict[str, Any]]], dict[str, dict[str, Any]]]:
    """Return a function that runs the worker's cases in a folder and returns the differences by case."""

    def run(root: Path, cases: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        (root / "cases.json").write_text(json.dumps([{"control": None, "replace": {}, **case} for case in cases]))
        done = subprocess.run([sys.executable, str(WORKER), str(root)], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads((root / "results.json").read_text())

    return run
