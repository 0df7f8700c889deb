"""A real Slurm of two virtual nodes (tools/slurm_cluster.sh) for tests: starting it, submitting to it, and waiting for what jobs do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "configs" / "clusters" / "test.yaml"
TOOL = ROOT / "tools" / "slurm_cluster.sh"


def environment() -> dict[str, str]:
    """Return what jobs inherit: this interpreter's prism, and this working tree."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def running() -> Iterator[None]:
    """Use the cluster that runs, or start one for these tests; without root skip, or fail where CI requires everything."""
    done = subprocess.run(["bash", str(TOOL), "start"], capture_output=True, text=True, timeout=600)
    if done.returncode:
        absent = f"no Slurm: {(done.stderr or done.stdout).strip()}"
        if os.environ.get("CI") == "true" and os.environ.get("PRISM_REQUIRE_SHARED"):
            pytest.fail(absent)
        pytest.skip(absent)
    yield
    if "already running" not in done.stdout:
        subprocess.run(["bash", str(TOOL), "stop"], check=True, capture_output=True, timeout=120)


def prism(*arguments: object, code: int = 0) -> str:
    command = [sys.executable, "-m", "megatron_prism.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment())
    assert done.returncode == code, done.stderr[-4000:]
    return done.stdout if code == 0 else done.stderr


def slurm_command(*arguments: object) -> str:
    return subprocess.run(list(map(str, arguments)), capture_output=True, text=True, timeout=60).stdout


def wait_for(condition: Callable[[], Any], what: str, folder: Path, timeout_s: float = 240.0) -> Any:
    """Wait for something that is true at last; return it."""
    ends = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > ends:
            logs = "\n".join(f"{path}:\n{path.read_text()[-3000:]}" for path in sorted(folder.glob("*.out")))
            raise AssertionError(f"not in {timeout_s} s: {what}\n{slurm_command('squeue', '--all')}{logs}")
        time.sleep(0.1)
    return found
