"""Reinforcement learning: `prism rl CONFIG`, and the jobs around a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from megatron_prism.cli import aligner, gang
from megatron_prism.cli.options import Config, DryRun, GroupWithDefault, Json, Nproc, Overrides, a_path, finish
from megatron_prism.core.errors import InputError, Problem

app = typer.Typer(
    cls=GroupWithDefault,
    no_args_is_help=True,
    help="Train a checkpoint by reinforcement learning on prompts whose answers can be graded. `prism rl CONFIG` is `prism rl run CONFIG`.",
    epilog="Example: prism rl my_rl.yaml run_dir=runs/other optimizer.lr=1e-6 --nproc 2",
)


app.add_typer(aligner.export, name="export")
app.command()(aligner.serve)

Backend = Literal["megatron", "nemo_aligner"]


@app.command(GroupWithDefault.default)
def rl_run(
    config: Config,
    overrides: Overrides = None,
    nproc: Nproc = None,
    dry_run: DryRun = False,
    json: Json = None,
    backend: Annotated[Backend, typer.Option(help="What trains. nemo_aligner: nothing here; a folder is written.")] = "megatron",
    cluster: Annotated[Path | None, typer.Option(help="With nemo_aligner: the cluster's YAML.", callback=a_path)] = None,
    out: Annotated[Path | None, typer.Option(help="With nemo_aligner: the folder to write.", callback=a_path)] = None,
) -> None:
    """Train a checkpoint by reinforcement learning. Started again, the run resumes.

    Example: prism rl my_rl.yaml run_dir=runs/other optimizer.lr=1e-6 --nproc 2

    Under torchrun or srun it joins their gang instead of starting one, as prism train does.
    """
    from megatron_prism.core.config import RLConfig

    if backend == "nemo_aligner":
        if cluster is None or out is None or nproc is not None:
            raise InputError(Problem("--backend", "nemo_aligner", "--cluster and --out with it, and no --nproc"))
        from megatron_prism.jobs import aligner as export

        finish(export.run_rl(config, overrides or [], cluster, out, dry_run), json)
        return
    if cluster is not None or out is not None:
        raise InputError(Problem("--cluster, --out", "given", "only with --backend nemo_aligner", "a cluster is prism submit's"))

    def job() -> Any:
        from megatron_prism.jobs import rl as job

        return job

    gang.run(job, RLConfig, config, overrides or [], nproc, dry_run, json)
