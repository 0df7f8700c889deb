"""Reinforcement learning: `prism rl CONFIG`, and the jobs around a run."""

from __future__ import annotations

from typing import Any

import typer

from megatron_prism.cli import gang
from megatron_prism.cli.options import Config, DryRun, GroupWithDefault, Json, Nproc, Overrides

app = typer.Typer(
    cls=GroupWithDefault,
    no_args_is_help=True,
    help="Train a checkpoint by reinforcement learning on prompts whose answers can be graded. `prism rl CONFIG` is `prism rl run CONFIG`.",
    epilog="Example: prism rl my_rl.yaml run_dir=runs/other optimizer.lr=1e-6 --nproc 2",
)


@app.command(GroupWithDefault.default)
def rl_run(config: Config, overrides: Overrides = None, nproc: Nproc = None, dry_run: DryRun = False, json: Json = None) -> None:
    """Train a checkpoint by reinforcement learning. Started again, the run resumes.

    Example: prism rl my_rl.yaml run_dir=runs/other optimizer.lr=1e-6 --nproc 2

    Under torchrun or srun it joins their gang instead of starting one, as prism train does.
    """
    from megatron_prism.core.config import RLConfig

    def job() -> Any:
        from megatron_prism.jobs import rl as job

        return job

    gang.run(job, RLConfig, config, overrides or [], nproc, dry_run, json)
