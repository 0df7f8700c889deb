"""The toy of tests/distributed trained with vLLM as its sampler. By hand: tools/test_vllm.sh. Skipped where vLLM is not."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_prism.parallel.groups import Groups
from megatron_prism.rl.gate import BOUNDS
from tests.distributed import toy_rl
from tests.distributed.test_rl import same

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed: tools/test_vllm.sh")
ROLLOUT = {**toy_rl.ROLLOUT, "engine": "vllm", "vllm": {"memory_share": 0.004}}
STEPS = 3


def train(groups: Groups, **values: Any) -> dict[str, Any]:
    """Train the toy; return what the gate measured at the start and in each step, [KL, largest difference, tokens], and the hand-overs."""
    from megatron_prism.generate import vllm
    from megatron_prism.rl import gate

    trusts, engines, start, at_start, require_kl = [], [], vllm.VLLM._start, gate.at_start, gate.require_kl

    def kept(trust: gate.Trust) -> gate.Trust:
        trusts.append([trust.kl, trust.difference, trust.num_tokens])
        return trust

    def compared(samples: Any, mine: Any, *others: Any) -> None:
        kept(gate.compare([samples[number] for number in mine], list(mine.values())))
        require_kl(samples, mine, *others)

    def started(self: Any) -> Any:
        engines.append(self)
        return start(self)

    with (
        mock.patch.object(gate, "at_start", lambda *arguments: kept(at_start(*arguments))),
        mock.patch.object(gate, "require_kl", compared),
        mock.patch.object(vllm.VLLM, "_start", started),
    ):
        toy_rl.train(groups, **values)
    return {"trusts": trusts, "num_updates": [engine.num_updates for engine in engines]}


@pytest.mark.parametrize(
    ("num_ranks", "grid", "tensor_parallel"), [(1, {}, 1), (2, {"tp": 2, "sequence_parallel": True}, 1)], ids=["1", "tp2-dp2"]
)
def test_a_run_samples_by_the_weights_of_its_step(
    run_distributed: Callable[..., list[Any]],
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    num_ranks: int,
    grid: dict[str, Any],
    tensor_parallel: int,
) -> None:
    prompts = toy_rl.write_prompts(tmp_path / "prompts")
    checkpoint = make_checkpoint("llama", hidden_size=128)
    rollout = {**ROLLOUT, "vllm": {**ROLLOUT["vllm"], "tensor_parallel": tensor_parallel}}
    own = {"run_dir": tmp_path / "run", "prompts": prompts, "checkpoint": checkpoint, "steps": STEPS, "rollout": rollout, "grid": grid}
    said = run_distributed(train, num_ranks, timeout_s=400.0, parallel=grid, **own)[0]
    print(said)
    assert said["num_updates"] == [STEPS]  # at the gate, and once after each step but the last
    assert len(said["trusts"]) == 1 + STEPS and all(kl < BOUNDS["fp32"].kl for kl, _, _ in said["trusts"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == STEPS and all(line["ratio"] == 1.0 for line in steps if line["kept_groups"])


def test_a_killed_run_goes_on_bit_for_bit(
    run_distributed: Callable[..., list[Any]], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """vLLM's random numbers are of each rollout's seed, so on the same machine the same tokens come again."""
    own = {"prompts": toy_rl.write_prompts(tmp_path / "prompts"), "checkpoint": make_checkpoint("granite", hidden_size=128)}
    own |= {"steps": STEPS, "rollout": ROLLOUT}

    def run(name: str, **values: Any) -> Path:
        run_distributed(train, 1, timeout_s=400.0, run_dir=tmp_path / name, **own, **values)
        return tmp_path / name

    with pytest.raises(AssertionError, match="exit code -9"):
        run("killed", kill_at="sampled", kill_after=1)
    killed, unbroken, other = run("killed"), run("unbroken"), run("other", seed=5)
    assert same(killed, unbroken)
    assert not same(other, unbroken)
