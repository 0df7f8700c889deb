"""Reinforcement learning: `prism rl`."""

from __future__ import annotations

from typing import Any

from megatron_prism.cli import gang
from megatron_prism.cli.options import Config, DryRun, Json, Nproc, Overrides


def rl(config: Config, overrides: Overrides = None, nproc: Nproc = None, dry_run: DryRun = False, json: Json = None) -> None:
    """Train a checkpoint by reinforcement learning on prompts whose answers can be graded. Started again, the run resumes.

    Example: prism rl my_rl.yaml run_dir=runs/other optimizer.lr=1e-6 --nproc 2

    Under torchrun or srun it joins their gang instead of starting one, as prism train does.
    """
    from megatron_prism.core.config import RLConfig

    def job() -> Any:
        from megatron_prism.jobs import rl as job

        return job

    gang.run(job, RLConfig, config, overrides or [], nproc, dry_run, json)
