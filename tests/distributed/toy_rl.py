"""A toy for the RL loop: prompts of digits, and a grader that finds a response right where it has many digits."""

from __future__ import annotations

import hashlib
import json
import os
import pkgutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron_prism.core.config import RLConfig
from megatron_prism.core.load import build
from megatron_prism.generate.cached import Cached
from megatron_prism.generate.engine import logprobs_of
from megatron_prism.grade.outcome import Graded, Item
from megatron_prism.jobs import rl
from megatron_prism.parallel.groups import Groups
from megatron_prism.rl import loop

ROLLOUT = {"num_prompts": 4, "num_samples": 6, "max_tokens": 8, "num_rows": 32, "keep": True}


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
        "rollout": ROLLOUT,
        "batch": {"seq_length": 64},
        "optimizer": {"lr": 3e-3},
        "save": {"interval": 1, "background": False},
        "algorithm": {"keep_zero_variance": True},
        "reference": {"alpha": 0.3, "interval": 2},
        **changes,
    }
    return build(values, RLConfig, str)


# where a run is killed, by the name of the point: what is called there, and whether the kill waits until that is done
POINTS = {
    "rollout": ("megatron_prism.generate.lane.Lane.advance", False),
    "grading": ("tests.distributed.toy_rl.Toy.grade", False),
    "sampled": ("megatron_prism.rl.scoring.Scorer.score", False),
    "training": ("megatron_prism.rl.loop.forward_backward", True),
    "reference": ("megatron_prism.rl.reference.Reference.update", True),
    "saving": ("megatron_prism.checkpoint.writers.Writers.poll", False),
    "published": ("megatron_prism.checkpoint.folder.publish", True),
}


@contextmanager
def killed_at(point: str | None, step: int) -> Iterator[None]:
    """Within the block a run is killed (SIGKILL) at a point, once it has taken `step` steps."""
    if point is None:
        yield
        return
    place, is_after = POINTS[point]
    where, _, name = place.rpartition(".")
    owner: Any = pkgutil.resolve_name(where)
    kept, applied, num_taken = getattr(owner, name), loop.optim.apply, 0

    def apply(*arguments: Any, **named: Any) -> Any:
        nonlocal num_taken
        num_taken += 1
        return applied(*arguments, **named)

    def call(*arguments: Any, **named: Any) -> Any:
        is_time = num_taken >= step  # not ==: grading is a thread's, which may be late
        if is_time and not is_after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = kept(*arguments, **named)
        if is_time:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    with patch.object(owner, name, call), patch.object(loop.optim, "apply", apply):
        yield


def train(
    groups: Groups,
    kill_at: str | None = None,
    kill_after: int = 2,
    kill_after_s: float | None = None,
    off_from: int | None = None,
    grid: dict[str, Any] | None = None,
    **values: Any,
) -> dict[str, Any]:
    """Train the toy on a gang; return the result. It is killed at a point once it has taken kill_after steps, or so long after its first step began."""
    given = config(parallel=grid or {}, **values)
    with patch.object(rl.grader, "Grader", Toy), killed_at(kill_at, kill_after), killed_in(kill_after_s), sampler_off(off_from):
        resolved = rl.resolve(given, groups.world_size)
        return rl.train_in_gang(replace(resolved, config=given), groups)


@contextmanager
def sampler_off(from_call: int | None) -> Iterator[None]:
    """Within the block the engine says a little too much of each token's log-probability, from that call on (0: the gate's own)."""
    kept, num_calls = Cached.generate, 0

    def generate(*arguments: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        rollouts = kept(*arguments)
        if from_call is None or num_calls <= from_call:
            return rollouts
        return [replace(one, logprobs=logprobs_of(value + 1e-3 for value in one.logprobs)) for one in rollouts]

    with patch.object(Cached, "generate", generate):
        yield


@contextmanager
def killed_in(seconds: float | None) -> Iterator[None]:
    """Within the block a run is killed (SIGKILL) so long after it begins to collect its first groups."""
    kept = loop._collect
    timers: list[threading.Timer] = []

    def collect(*arguments: Any) -> Any:
        if seconds is not None and not timers:
            timers.append(threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)))
            timers[0].start()
        return kept(*arguments)

    with patch.object(loop, "_collect", collect):
        yield
    for timer in timers:
        timer.cancel()
