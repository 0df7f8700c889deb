"""Training on another run's records: what is refused before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.checkpoint import run_folder
from megatron_prism.core.config import RLConfig
from megatron_prism.core.load import build, to_yaml
from megatron_prism.core.manifest import write_json
from megatron_prism.data.prompts import Prompt
from megatron_prism.generate.engine import seed_of
from megatron_prism.rl import record_files, replay
from megatron_prism.rl.order import Order
from megatron_prism.rl.record import Step
from megatron_prism.rl.rollout import Encoded
from tests.unit.rl.responses import response

ROLLOUT = {"max_tokens": 16, "num_prompts": 4, "num_samples": 6}


def config(**changes: Any) -> RLConfig:
    values = {"run_dir": "r", "steps": 3, "init": {"checkpoint": "c"}, "prompts": "p", "rollout": ROLLOUT, "batch": {"seq_length": 64}}
    return build({**values, "mode": "train", **changes}, RLConfig, str)


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Return a run's folder with records of the steps 1 to 3."""
    (tmp_path / run_folder.CONFIG).write_text(to_yaml(replace(config(), mode="all")))
    write_json(tmp_path / run_folder.MANIFEST, {"kind": "run", "starts": [{"plan": {"prompts_sha256": {"prompts": "aa"}}}]})
    for step in (1, 2, 3):
        record_files.path_of(tmp_path, step).mkdir(parents=True)
    return tmp_path


def test_a_run_of_the_recorded_draws_has_no_problem(recorded: Path) -> None:
    ours = config(train_from=str(recorded), optimizer={"lr": 1e-3}, algorithm={"advantage": "rloo"}, steps=2)
    assert replay.check(ours, "aa") == [] == replay.check(replace(config(), train_from=None), "bb")


@pytest.mark.parametrize(
    ("changes", "key", "says"),
    [
        ({"seed": 5}, "seed", "found 5"),
        ({"rollout": {**ROLLOUT, "num_prompts": 5}}, "rollout.num_prompts", "required 4"),
        ({"rollout": {**ROLLOUT, "num_samples": 5}}, "rollout.num_samples", "required 6"),
        ({"rollout": {**ROLLOUT, "max_tokens": 15}}, "rollout.max_tokens", "required 16"),
        ({"rollout": {**ROLLOUT, "max_refills": 1}}, "rollout.max_refills", "required 0"),
        ({"steps": 4}, "train_from", "record.keep_last=4, or train steps=3"),
    ],
)
def test_other_draws_and_missing_records_are_named(recorded: Path, changes: dict[str, Any], key: str, says: str) -> None:
    (problem,) = replay.check(config(train_from=str(recorded), **changes), "aa")
    assert problem.where == key and says in str(problem)


def test_records_that_were_removed_are_named(recorded: Path) -> None:
    record_files.path_of(recorded, 1).rmdir()  # record.keep_last
    (problem,) = replay.check(config(train_from=str(recorded)), "aa")
    assert "without a record of 1 steps, step 1 the first" in str(problem) and "record.keep_last=3" in problem.fix
    assert "or train" not in problem.fix


def test_another_prompt_set_and_no_run_are_named(recorded: Path, tmp_path: Path) -> None:
    (problem,) = replay.check(config(train_from=str(recorded)), "bb")
    assert problem.where == "prompts"
    (problem,) = replay.check(config(train_from=str(tmp_path / "none")), "aa")
    assert problem.where == "train_from" and "no run" in problem.found


def a_record(run_dir: Path, step: int, seeds: Sequence[int], prompts: Sequence[Encoded]) -> None:
    asked = zip(seeds, prompts, strict=True)
    responses = [response(one.prompt.id, number, one.tokens, seed) for seed, one in asked for number in range(6)]
    platform = {"world_size": 1, "num_threads": 1}
    record_files.write(
        run_dir,
        Step(step=step, platform=platform, responses=responses, advantages={}, plan=[], old_log_probs={}, ref_log_probs={}, figures={}, tensors={}),
        keep_last=9,
    )  # fmt: skip


def test_a_first_record_that_cannot_be_trained_on_is_refused_before_a_run_begins(tmp_path: Path) -> None:
    prompts = [Encoded(Prompt(id=f"p{n}", domain="math", kind="math", prompt="?", gold="1"), (n + 1,)) for n in range(8)]
    draws = Order(len(prompts), config().seed).draw(0, 4)
    seeds = [seed_of(config().seed, 1, one.number) for one in draws]
    ours = config(train_from=str(tmp_path))
    drawn = [prompts[one.prompt] for one in draws]
    a_record(tmp_path, 1, seeds, drawn)
    spec: Any = None  # nothing is decoded
    assert replay.check_next(ours, 0, prompts, spec) == []
    (problem,) = replay.check_next(ours, 0, prompts[::-1], spec)
    assert problem.where == "train_from" and "the draws of the recorded run" in problem.required
    a_record(tmp_path, 2, seeds, drawn)
    assert replay.check_next(ours, 1, prompts, spec) == []
    path = record_files.path_of(tmp_path, 2) / record_files.RESPONSES
    path.write_text(path.read_text()[:-9])
    (problem,) = replay.check_next(ours, 1, prompts, spec)
    assert problem.where == str(path) and "sha256" in problem.found
    assert replay.check_next(ours, 0, prompts, spec) == replay.check_next(ours, 3, prompts, spec) == []
