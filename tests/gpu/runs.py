"""`prism` as a process, and training runs of the tiny models by their files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.options import ROOT, Options

PRISM = (sys.executable, "-m", "megatron_prism.cli")
TIMEOUT_S = 150.0


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    output: str
    said: str
    seconds: float


def environment(more: Mapping[str, str | None] = {}) -> dict[str, str]:
    """Return the variables of a process that runs the code of this tree. A value of None takes a variable away."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MAMBA_DETERMINISTIC": "1",  # without it mamba_ssm's autotuner compiles for minutes
    }
    changed: dict[str, str | None] = {**os.environ, **kept, **more}
    return {name: value for name, value in changed.items() if value is not None}


def prism(*arguments: object, more: Mapping[str, str | None] = {}, timeout_s: float = TIMEOUT_S) -> Ended:
    """Run one prism command to its end; it and its children are killed after timeout_s, and the code is 124."""
    began = time.perf_counter()
    child = subprocess.Popen(
        [*PRISM, *map(str, arguments)],
        env=environment(more),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, said = child.communicate(timeout=timeout_s)
        code = child.returncode
    except subprocess.TimeoutExpired:
        kill(child)
        output, said = child.communicate()
        code = 124
    return Ended(code, output, said, time.perf_counter() - began)


def kill(child: subprocess.Popen[Any]) -> None:
    """SIGKILL a process that leads its session, with its children, and wait for it."""
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def must(ended: Ended) -> Ended:
    """Return what ended well.

    Raises: RuntimeError with the end of what it said.
    """
    if ended.code:
        raise RuntimeError(f"exit code {ended.code}: {ended.said[-1500:]}")
    return ended


def config(given: Options, run_dir: Path, family: str = "llama", **more: Any) -> Path:
    """Write a run's config beside its folder: 12 steps of a tiny model, a checkpoint in the middle. A section of `more` is merged."""
    base: dict[str, Any] = {
        "run_dir": str(run_dir),
        "steps": 12,
        "precision": "bf16",
        "deterministic": True,
        "init": {"checkpoint": str(given.fixtures / family / "ckpt")},
        "data": {"prepared": str(given.fixtures / "data"), "seq_length": 128},
        "batch": {"global_size": 8, "micro_size": 4},
        "optimizer": {"lr": 6e-4, "eps": 1e-8},
        "schedule": {"warmup_steps": 4},
        "validation": {"sequences": 8},
        "save": {"interval": 6, "keep_last": 20, "timeout_s": 60.0},
        "limits": {"collective_timeout_s": 80.0, "hang_timeout_s": 120.0},
    }
    for name, value in more.items():
        base[name] = {**base.get(name, {}), **value} if isinstance(value, dict) else value
    path = run_dir.with_suffix(".yaml")
    path.write_text(json.dumps(base))  # JSON is YAML
    return path


def losses(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Return a run's losses and gradient norms by step; of a step that was trained twice, the later ones."""
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.is_file() else []
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "loss" in line}


def kernels(run_dir: Path) -> dict[str, Any]:
    """Return the kernels that a run noted in its manifest (train/kernels.py)."""
    return json.loads((run_dir / "manifest.json").read_text())["kernels"]


def attention(run_dir: Path) -> str:
    """Return the attention that a run computed with: flash, fused, unfused, or local on a CPU."""
    choice = kernels(run_dir)["attention"]
    return choice if isinstance(choice, str) else choice["backend"]


def largest_difference(one: Mapping[int, tuple[float, float]], other: Mapping[int, tuple[float, float]]) -> float:
    """Return the largest difference of the losses of two runs of the same steps; inf where they are not the same steps."""
    if one.keys() != other.keys() or not one:
        return float("inf")
    return max(abs(one[step][0] - other[step][0]) for step in one)


def at_once(given: Options, function: Callable[[Options, str], None], names: Sequence[str]) -> None:
    """Call a function for each name, as many at a time as the machine trains runs; it reports its own errors."""
    with ThreadPoolExecutor(given.num_at_once) as pool:
        for each in [pool.submit(function, given, name) for name in names]:
            each.result()
