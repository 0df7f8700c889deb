"""A job on a Slurm cluster: `prism submit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_prism.cli.options import Config, Json, Overrides, finish


def submit(
    config: Config,
    cluster: Annotated[Path, typer.Option(help="The cluster's YAML (configs/clusters/).", show_default=False)],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the sbatch scripts; needs neither Slurm nor data, writes nothing.")
    ] = False,
    json: Json = None,
) -> None:
    """Submit a training run, a mixture to prepare, or a pipeline of jobs to Slurm.

    Example: prism submit configs/tiny/mid.yaml world_size=2 --cluster configs/clusters/test.yaml --dry-run

    Overrides that begin with `cluster.` are the cluster's: cluster.partition=long.
    """
    from megatron_prism.jobs import submit as job

    result = job.run(config, overrides or [], cluster, dry_run)
    for text in result.pop("texts", []):
        typer.echo(text, nl=False)
    finish(result, json, quiet=dry_run)
