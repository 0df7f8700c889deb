"""Ten GRPO steps of the toy of tests/distributed with each embedded engine: python -m tests.gpu.mcore FIXTURES WORK.

`cached` and, where this machine has what it needs, Megatron-Core's dynamic engine, on a dense model and a hybrid, in bf16. The trust gate stands at the
start and at each step; a run that it stops has failed. Tokens per second of either beside transformers: python -m tests.gpu.rl --group engines.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from megatron_prism.checkpoint import folder
from megatron_prism.core.config import GangConfig
from megatron_prism.core.config.rl import RolloutConfig
from megatron_prism.generate import engines
from megatron_prism.parallel import groups
from tests.distributed import toy_rl
from tests.gpu import options
from tests.gpu.fixtures import HYBRID
from tests.gpu.options import Options
from tests.gpu.report import Check, check
from tests.gpu.rl import metrics

STEPS = 10


def main(given: Options) -> None:
    """Run each engine on each model."""
    prompts = toy_rl.write_prompts(given.work / "prompts")
    for name in ("llama", HYBRID):
        for engine in ("cached", "mcore"):
            with check("mcore", f"{name}: {STEPS} GRPO steps, {engine}") as result:
                steps(result, given.fixtures / name / "ckpt", engine, prompts, given.work / f"{name}_{engine}")
    sys.stdout.flush()
    os._exit(0)


def steps(result: Check, checkpoint: Path, engine: str, prompts: Path, run_dir: Path) -> None:
    """Train, or say what the engine lacks here."""
    gang = GangConfig(precision="bf16", seed=0)
    asked = RolloutConfig(engine=engine, max_tokens=1)  # type: ignore[arg-type]
    model = folder.read(checkpoint).model
    if lacking := [*engines.check(asked, model, 1, tp=1), *engines.check_machine(asked, model, "bf16")]:
        result.skip("; ".join(map(str, lacking)))
        return
    with groups.gang(gang) as grid:
        rollout = {**toy_rl.ROLLOUT, "engine": engine}
        given = {"run_dir": str(run_dir), "prompts": str(prompts), "checkpoint": str(checkpoint), "rollout": rollout}
        toy_rl.train(grid, steps=STEPS, precision="bf16", optimizer={"lr": 1e-4}, reference={"alpha": 0.6}, **given)
    judge(result, [line for line in metrics(str(run_dir)) if "loss" in line])


def judge(result: Check, lines: list[dict[str, Any]]) -> None:
    """Hold where every step was taken, some step trained, and the policy that trained was the one that sampled."""
    trained = [line for line in lines if line["kept_groups"]]
    result.figures["sampler_kl"] = max((line["sampler_kl"] for line in trained), default=0.0)
    result.figures["ratio"] = sorted({line["ratio"] for line in trained})
    result.figures["rollout_tokens_per_s"] = max(line["rollout_tokens_per_s"] for line in lines)
    result.ok = len(lines) == STEPS and result.figures["ratio"] == [1.0]


if __name__ == "__main__":
    main(options.read())
