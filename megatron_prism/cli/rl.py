"""Reinforcement learning: `prism rl CONFIG`, and the jobs around a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_prism.cli import gang
from megatron_prism.cli.options import Config, DryRun, GroupWithDefault, Json, Nproc, Overrides, a_path, finish

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


@app.command("filter")
def rl_filter(config: Config, overrides: Overrides = None, nproc: Nproc = None, dry_run: DryRun = False, json: Json = None) -> None:
    """Sample a checkpoint's responses to every prompt of a set, and count the right ones. Started again, it goes on.

    Example: prism rl filter configs/tiny/rl/filter.yaml --nproc 2

    Under torchrun or srun it joins their gang instead of starting one, as prism train does.
    """
    from megatron_prism.core.config import FilterConfig

    def job() -> Any:
        from megatron_prism.jobs import rl_filter as job

        return job

    gang.run(job, FilterConfig, config, overrides or [], nproc, dry_run, json)


@app.command("mix")
def rl_mix(config: Config, overrides: Overrides = None, dry_run: DryRun = False, json: Json = None) -> None:
    """Select the prompts that RL trains on from prompt sets, by domain and pass count.

    Example: prism rl mix configs/prompts/mixes/mcs_balanced.yaml --dry-run
    """
    from megatron_prism.core.config import MixConfig
    from megatron_prism.core.load import load, placed
    from megatron_prism.jobs import rl_mix as job

    settings = load(config, MixConfig, overrides or [])
    with placed(config, MixConfig, overrides or []):
        finish(job.run(settings, dry_run=dry_run), json)


@app.command("samples")
def rl_samples(
    run: Annotated[Path, typer.Argument(help="A run's folder.", show_default=False, callback=a_path)],
    step: Annotated[int | None, typer.Option(help="A step whose responses were kept; without it, the newest.", min=1)] = None,
    json: Json = None,
) -> None:
    """Write a step's responses as a page for a browser: by prompt, with outcome, reward, advantage and text. The run needs rollout.keep.

    Example: prism rl samples runs/my_rl --step 100
    """
    from megatron_prism.jobs import rl_samples as job

    finish(job.run(run, step), json)
