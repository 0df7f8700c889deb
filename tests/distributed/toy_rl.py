"""A toy for the RL loop: prompts of digits, and a grader that finds a response right where it has many digits."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_prism.core.config import RLConfig
from megatron_prism.core.load import build
from megatron_prism.grade.outcome import Graded, Item
from megatron_prism.jobs import rl
from megatron_prism.parallel.groups import Groups
from megatron_prism.rl import loop


class Toy:
    """Right: a response of at least eight digits."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> Toy:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def grade(self, items: Sequence[Item]) -> dict[str, Graded]:
        """Return each item's outcome."""
        return {item.id: Graded(id=item.id, outcome="right" if is_right(item.response) else "wrong") for item in items}


def is_right(text: str) -> bool:
    return sum(character.isdigit() for character in text) >= 8


def write_prompts(folder: Path, num_prompts: int = 12) -> Path:
    """Write a prompt set."""
    from megatron_prism.data import prompts
    from megatron_prism.data.prompts import Prompt

    folder.mkdir()
    lines = [
        Prompt(id=f"p{n}", domain=("math", "science")[n % 2], kind="math", prompt=f"The sum of {n} and", gold="1")
        for n in range(num_prompts)
    ]  # type: ignore[arg-type]
    text = "".join(map(prompts.to_line, lines))
    (folder / prompts.FILE).write_text(text)
    sums = hashlib.sha256(text.encode()).hexdigest()
    (folder / prompts.MANIFEST).write_text(json.dumps({"kind": prompts.KIND, "sha256": sums}))
    return folder


def config(run_dir: str, prompts: str, checkpoint: str, steps: int = 4, **changes: Any) -> RLConfig:
    """Return a config of the toy. changes: whole sections or values."""
    values = {
        "run_dir": run_dir,
        "prompts": prompts,
        "steps": steps,
        "precision": "fp32",
        "init": {"checkpoint": checkpoint},
        "rollout": {"num_prompts": 4, "num_samples": 6, "max_tokens": 8, "num_rows": 32, "keep": True},
        "batch": {"seq_length": 64},
        "optimizer": {"lr": 3e-3},
        "save": {"interval": 1, "background": False},
        "algorithm": {"keep_zero_variance": True},
        "reference": {"alpha": 0.3, "interval": 2},
        **changes,
    }
    return build(values, RLConfig, str)


@contextmanager
def killed_after(step: int | None) -> Any:
    """Within the block a run is killed (SIGKILL) in the step after `step`, once its responses are sampled."""
    kept = loop._scored

    def scored(run: Any, rollouts: Any) -> Any:
        if step is not None and rollouts.groups[0][0].sample.weights_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return kept(run, rollouts)

    loop._scored = scored
    try:
        yield
    finally:
        loop._scored = kept


def train(groups: Groups, kill_after: int | None = None, grid: dict[str, Any] | None = None, **values: Any) -> dict[str, Any]:
    """Train the toy on a gang; return the result."""
    rl.grader.Grader, kept = Toy, rl.grader.Grader  # type: ignore[misc, assignment]
    given = config(parallel=grid or {}, **values)
    try:
        with killed_after(kill_after):
            resolved = rl.resolve(given, groups.world_size)
            return rl.train_in_gang(replace(resolved, config=given), groups)
    finally:
        rl.grader.Grader = kept  # type: ignore[misc]
