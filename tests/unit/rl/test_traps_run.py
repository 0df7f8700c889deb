"""Trap 10 of reinforcement learning (docs/RL.md, Traps): what a resumed run continues with. Whole runs of a toy; the kill is a SIGKILL."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_prism.checkpoint.folder import steps
from megatron_prism.grade.outcome import Graded, Item
from megatron_prism.parallel.groups import Groups
from tests.distributed import toy_rl
from tests.distributed.test_rl import curve, responses, state

pytestmark = pytest.mark.slow


def of_generators() -> str:
    """Return a hash of the states of all global random generators."""
    _, keys, position, *_ = np.random.get_state()
    held = [torch.get_rng_state().numpy().tobytes(), keys.tobytes(), position, random.getstate()]  # type: ignore[union-attr]
    return hashlib.sha256(repr(held).encode()).hexdigest()


def train(groups: Groups, is_scrambled: bool, **values: Any) -> list[str]:
    """Train the toy; return the state of the global generators whenever a step grades. Scrambled, they are then seeded anew each time."""
    states = []

    class Watching(toy_rl.Toy):
        def grade(self, items: Sequence[Item]) -> dict[str, Graded]:
            states.append(of_generators())
            if is_scrambled:
                for seed in (torch.manual_seed, np.random.seed, random.seed):
                    seed(1000 + len(states))
            return super().grade(items)

    with mock.patch.object(toy_rl, "Toy", Watching):
        toy_rl.train(groups, **values)
    return states


@pytest.fixture(scope="module")
def runs(run_distributed: Callable[..., list[Any]], tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return an unbroken run, what its generators held, one whose generators were scrambled, and one that was killed in step 3, then scrambled."""
    home = tmp_path_factory.mktemp("trap_10")
    how = {"prompts": toy_rl.write_prompts(home / "prompts"), "checkpoint": tiny_checkpoint, "timeout_s": 240}
    states = run_distributed(train, 1, run_dir=home / "unbroken", is_scrambled=False, **how)[0]
    scrambled = run_distributed(train, 1, run_dir=home / "scrambled", is_scrambled=True, **how)[0]
    with pytest.raises(AssertionError, match="exit code -9"):
        run_distributed(train, 1, run_dir=home / "killed", is_scrambled=False, kill_at="training", kill_after=2, **how)
    run_distributed(train, 1, run_dir=home / "killed", is_scrambled=True, **how)
    return {name: home / name for name in ("unbroken", "scrambled", "killed")} | {"states": states, "others": scrambled}


def prompts_of(run_dir: Path) -> list[list[str]]:
    return [[json.loads(line)["id"] for line in text.splitlines()] for text in responses(run_dir)]


def test_trap_10_a_resumed_run_draws_the_next_prompts_and_not_the_first_again(runs: dict[str, Any]) -> None:
    drawn = prompts_of(runs["killed"])
    assert drawn == prompts_of(runs["unbroken"]) and len(drawn) == 4
    assert drawn[2] not in drawn[:2], "a run whose steps draw the same prompts shows nothing"


def test_trap_10_a_step_neither_reads_nor_moves_a_global_random_generator(runs: dict[str, Any]) -> None:
    """Such a draw (a DataLoader's _base_seed is one) is made once more by a run that resumes, and all that follows differs."""
    assert len(runs["states"]) == 4 and len(set(runs["states"])) == 1
    assert len(set(runs["others"])) == 4, "the control: scrambled generators are seen"
    for name in ("scrambled", "killed"):
        assert responses(runs[name]) == responses(runs["unbroken"]) and curve(runs[name]) == curve(runs["unbroken"])
        assert state(runs[name]) == state(runs["unbroken"])


def test_trap_10_a_resumed_run_counts_its_steps_on(runs: dict[str, Any]) -> None:
    lines = {
        name: [json.loads(line) for line in (runs[name] / "metrics.jsonl").read_text().splitlines()] for name in ("killed", "unbroken")
    }
    counted, unbroken = (
        [[line[key] for key in ("step", "lr", "trained_tokens")] for line in lines[name]] for name in ("killed", "unbroken")
    )
    assert counted == unbroken and [step for step, *_ in counted] == [1, 2, 3, 4] and len({lr for _, lr, _ in counted}) == 4
    assert [path.name for path in steps(runs["killed"] / "checkpoints")] == [path.name for path in steps(runs["unbroken"] / "checkpoints")]
    weights = [{json.loads(line)["weights_step"] for line in text.splitlines()} for text in responses(runs["killed"])]
    assert weights == [{0}, {1}, {2}, {3}]
