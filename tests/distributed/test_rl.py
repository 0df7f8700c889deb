"""Reinforcement learning over layouts, through a kill, and what it learns: the whole job on a toy."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_prism.checkpoint import torch_dist
from megatron_prism.checkpoint.folder import steps
from megatron_prism.core.errors import EnvironmentFault
from megatron_prism.parallel.groups import Groups
from megatron_prism.train import safety
from tests.distributed import toy_rl

pytestmark = pytest.mark.slow
NUM_KILLS = int(os.environ.get("PRISM_SOAK_KILLS", "10"))  # with each lag
KEPT = ("reward", "kept_groups", "response_tokens", "entropy", "loss", "grad_norm", "ratio", "kl")


def curve(run_dir: Path) -> list[dict[str, Any]]:
    """Return the metrics that follow from the run's state alone, by step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: line.get(name, 0.0) for name in KEPT} for line in lines if "loss" in line]


def responses(run_dir: Path) -> list[str]:
    return [path.read_text() for path in sorted((run_dir / "rollouts").glob("*.jsonl"))]


def state(run_dir: Path) -> dict[str, str]:
    """Return the hashes of the last checkpoint's tensors: weights, optimizer and reference."""
    reader = torch_dist.TensorReader(steps(run_dir / "checkpoints")[-1] / "state")
    values = {name: reader.read(name, shape) for name, shape in reader.shapes().items()}
    return {
        name: hashlib.sha256(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest() for name, value in values.items()
    }


@pytest.fixture(scope="module")
def toy(run_distributed: Callable[..., list[Any]], tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that trains the toy in a new run folder, or in one of before, and returns the folder."""
    home = tmp_path_factory.mktemp("rl")
    prompts = toy_rl.write_prompts(home / "prompts")

    def train(name: str, num_ranks: int = 1, worker: Callable[..., Any] = toy_rl.train, **values: Any) -> Path:
        given = {"prompts": prompts, "checkpoint": tiny_checkpoint, **values}
        run_distributed(worker, num_ranks, timeout_s=240, run_dir=home / name, parallel=values.get("grid", {}), **given)
        return home / name

    train.home = home  # type: ignore[attr-defined]
    return train


@pytest.fixture(scope="module")
def alone(toy: Callable[..., Path]) -> Path:
    """Return the run of one process that others are compared with."""
    return toy("alone")


def test_it_learns_and_its_ratio_is_exactly_1(toy: Callable[..., Path]) -> None:
    lines = curve(toy("learns", steps=40, algorithm={"kl_beta": 0.0}, save={}, optimizer={"lr": 1e-2}))
    print([line["reward"] for line in lines])
    assert all(line["ratio"] == 1.0 for line in lines if line["kept_groups"])  # else nothing was trained on
    first, last = (sum(line["reward"] for line in part) / 5 for part in (lines[:5], lines[-5:]))
    assert first < 0.6 and last > first + 0.3, (first, last)


def same(one: Path, other: Path) -> bool:
    """Say whether two runs have the same metrics, responses, weights, optimizer and reference, bit for bit."""
    return curve(one) == curve(other) and responses(one) == responses(other) and state(one) == state(other)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_run_killed_at_each_point_of_a_step_goes_on_bit_for_bit(toy: Callable[..., Path], lag: int) -> None:
    """Each run is killed twice at its point: first after two steps, and after one more once it has resumed."""
    values = {"rollout": {**toy_rl.ROLLOUT, "lag": lag}, "steps": 5}  # one step off, the last step samples nothing
    unbroken = toy(f"unbroken-{lag}", **values)
    for point in toy_rl.POINTS:
        for kill_after in (2, 1):
            with pytest.raises(AssertionError, match="exit code -9"):
                toy(f"{point}-{lag}", **values, kill_at=point, kill_after=kill_after)
        assert same(toy(f"{point}-{lag}", **values), unbroken), point
    assert any(name.startswith("reference.") for name in state(unbroken))
    other = toy(f"other-{lag}", **values, seed=5)  # the control: the comparison sees a difference
    assert responses(other) != responses(unbroken) and state(other) != state(unbroken)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_run_killed_at_random_times_goes_on_bit_for_bit(toy: Callable[..., Path], lag: int) -> None:
    rollout, chance = {**toy_rl.ROLLOUT, "lag": lag}, random.Random(lag)
    values = {"rollout": rollout, "steps": 12, "save": {"interval": 3, "background": True}}
    unbroken = toy(f"long-{lag}", **values)
    num_kills = 0
    while num_kills < NUM_KILLS:
        try:
            run_dir = toy(f"random-{lag}", **values, kill_after_s=chance.uniform(0.0, 1.5))
        except AssertionError as error:
            assert "exit code -9" in str(error)
            num_kills += 1
        else:  # it was faster than the kill: once more from the start
            assert same(run_dir, unbroken)
            shutil.rmtree(run_dir)
    assert same(toy(f"random-{lag}", **values), unbroken)


def test_minibatches_are_updates_of_their_own(toy: Callable[..., Path], alone: Path) -> None:
    """From the second on the ratio is not 1, unless the learning rate is 0, as in the last step. Killed in the second, a run goes on bit for bit; two ranks give the curve of one."""
    values = {"batch": {"seq_length": 64, "num_minibatches": 2}}
    run_dir = toy("minibatches", **values)
    lines = curve(run_dir)
    assert all(abs(line["ratio"] - 1) > 1e-6 for line in lines[1:-1]) and lines[0]["loss"] != curve(alone)[0]["loss"]
    with pytest.raises(AssertionError, match="exit code -9"):
        toy("minibatches-killed", **values, kill_at="training", kill_after=3)  # the first of the second step's two is applied
    assert same(toy("minibatches-killed", **values), run_dir)
    other = curve(toy("minibatches-dp2", 2, grid={"tp": 1}, **values))
    assert max(abs(one[key] - two[key]) for one, two in zip(lines, other, strict=True) for key in KEPT) < 1e-5


def test_one_step_off_trains_on_the_weights_of_the_step_before(toy: Callable[..., Path]) -> None:
    run_dir = toy("off", rollout={**toy_rl.ROLLOUT, "lag": 1})
    lags = [json.loads(line)["lag"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lags == [0.0, 1.0, 1.0, 1.0]
    weights = [{json.loads(line)["weights_step"] for line in text.splitlines()} for text in responses(run_dir)]
    assert weights == [{0}, {0}, {1}, {2}]
    assert all(line["ratio"] == 1.0 for line in curve(run_dir))  # of the trainer's own pass; the sampler's weights are tis_weight


def test_what_no_step_may_train_on_is_discarded_and_counted(toy: Callable[..., Path]) -> None:
    with pytest.raises(AssertionError, match="exit code -9"):
        toy("stale", rollout={**toy_rl.ROLLOUT, "lag": 1}, kill_at="training", kill_after=2)
    lines = [json.loads(line) for line in (toy("stale") / "metrics.jsonl").read_text().splitlines()]  # goes on with lag 0
    assert [line.get("discarded") for line in lines] == [None, None, 24.0, None]
    assert lines[2]["discarded_tokens"] > 0 and 0 <= lines[2]["discarded_reward"] <= 1 and lines[2]["lag_max"] == 0.0


@pytest.mark.parametrize("grid", [{"tp": 2, "sequence_parallel": True}, {"pp": 2}, {"tp": 1}], ids=["tp2", "pp2", "dp2"])
def test_a_layout_gives_the_curve_of_one_process(toy: Callable[..., Path], alone: Path, grid: dict[str, Any]) -> None:
    name = "-".join(f"{key}{value}" for key, value in grid.items())
    run_dir = toy(name, 2, grid=grid)
    ids = [[json.loads(line)["token_ids"] for line in text.splitlines()] for text in responses(run_dir)]
    assert ids == [[json.loads(line)["token_ids"] for line in text.splitlines()] for text in responses(alone)]
    differences = [abs(one[key] - other[key]) for one, other in zip(curve(run_dir), curve(alone), strict=True) for key in KEPT]
    print(name, "largest difference", max(differences))
    assert max(differences) < 1e-5


def test_two_ranks_go_on_bit_for_bit_after_a_kill(toy: Callable[..., Path]) -> None:
    off = {"rollout": {**toy_rl.ROLLOUT, "lag": 1}}
    unbroken = toy("dp2-unbroken", 2, grid={"tp": 1}, **off)
    with pytest.raises(AssertionError, match="exit code -9"):
        toy("dp2-killed", 2, grid={"tp": 1}, kill_at="sampled", **off)
    assert same(toy("dp2-killed", 2, grid={"tp": 1}, **off), unbroken)


@pytest.mark.parametrize(
    ("from_call", "lag", "num_steps"), [(0, 0, 0), (2, 0, 1), (3, 1, 1)], ids=["at the start", "in step 2", "ahead of step 3"]
)
def test_a_run_ends_where_its_sampler_is_not_its_trainer(toy: Callable[..., Path], from_call: int, lag: int, num_steps: int) -> None:
    name = f"off-from-{from_call}"
    with pytest.raises(AssertionError, match="sampler and trainer disagree: KL .* prompt .* sample .*: token .* nothing was trained on it"):
        toy(name, off_from=from_call, rollout={**toy_rl.ROLLOUT, "lag": lag})
    assert len(curve(toy.home / name)) == num_steps  # type: ignore[attr-defined]


def gone_back(groups: Groups, at_save: int, **values: Any) -> None:
    """Train; the weights are found to be not finite at that save (0: at none), and the run goes back."""
    calls = itertools.count(1)
    with patch.object(safety.optim, "are_finite", lambda _: next(calls) != at_save):
        toy_rl.train(groups, **values)


def test_a_run_that_has_gone_back_one_step_off_goes_on_bit_for_bit(toy: Callable[..., Path]) -> None:
    """What was sampled ahead by the weights that were given up is not in the checkpoint that the same save then writes."""
    values = {"rollout": {**toy_rl.ROLLOUT, "lag": 1}, "steps": 5, "guard": {"on_nonfinite": "rewind"}, "worker": gone_back}
    unbroken = toy("back", at_save=3, **values)
    with pytest.raises(AssertionError, match="exit code -9"):
        toy("back-killed", at_save=3, kill_at="training", kill_after=3, **values)
    assert steps(toy.home / "back-killed" / "checkpoints")[-1].name == "step_00000003"  # type: ignore[attr-defined]
    assert same(toy("back-killed", at_save=0, **values), unbroken)
    assert not same(toy("off-5", at_save=0, **values), unbroken), "the control: going back is seen"


def refused(groups: Groups, **values: Any) -> list[Any]:
    """Train where rank 0's grader refuses its kinds of prompts; return what a rank raises."""

    class Refusing(toy_rl.Toy):
        def __init__(self, _: Any, kinds: Any) -> None:
            self.kinds = kinds

        def __enter__(self) -> toy_rl.Toy:
            raise EnvironmentFault(f"nothing here grades {self.kinds}")

    with patch.object(toy_rl, "Toy", Refusing):
        try:
            toy_rl.train(groups, **values)
        except EnvironmentFault as fault:
            return [str(fault), fault.is_agreed]
    return []


def test_what_cannot_be_graded_ends_every_rank_before_a_response_is_sampled(
    run_distributed: Callable[..., list[Any]], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    values = {"prompts": toy_rl.write_prompts(tmp_path / "prompts"), "checkpoint": tiny_checkpoint, "run_dir": tmp_path / "run"}
    assert run_distributed(refused, 2, parallel={"tp": 1}, grid={"tp": 1}, **values) == [["nothing here grades {'math'}", True]] * 2
    assert not (tmp_path / "run" / "rollouts").exists()
