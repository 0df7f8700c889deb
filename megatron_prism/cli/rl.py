"""Reinforcement learning: `prism rl`."""

from __future__ import annotations

from megatron_prism.cli import gang
from megatron_prism.cli.options import Config, DryRun, Json, Nproc, Overrides, finish


def rl(config: Config, overrides: Overrides = None, nproc: Nproc = None, dry_run: DryRun = False, json: Json = None) -> None:
    """Train a checkpoint by reinforcement learning on prompts whose answers can be graded. Started again, the run resumes.

    Example: prism rl my_rl.yaml run_dir=runs/other optimizer.lr=1e-6 --nproc 2

    Under torchrun or srun it joins their gang instead of starting one, as prism train does.
    """
    from megatron_prism.core.config import RLConfig
    from megatron_prism.core.load import load, placed
    from megatron_prism.parallel import environment, launch

    launch.heed_signals_while_starting()
    settings = load(config, RLConfig, overrides or [])  # before the job imports torch
    from megatron_prism.jobs import rl as job

    if nproc:
        launch.check_nproc(nproc)
    span = launch.slurm_span() if nproc else launch.ALONE
    world_size = gang.world_size(nproc or (settings.world_size if dry_run else None), span)
    with placed(config, RLConfig, overrides or []):
        resolved = job.resolve(settings, world_size)
    if dry_run:
        finish(resolved.figures, json)
        return
    environment.set_variables(settings)  # before any rank starts: a process reads some of them at its start
    gang.become(world_size, span)
    result = job.run(resolved)
    if gang.speaks():
        finish(result, json)
