"""What changed between models, and what lies between them: `prism analyze`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_prism.cli import gang
from megatron_prism.cli.options import Config, DryRun, Json, Nproc, Overrides, a_path, finish

app = typer.Typer(
    no_args_is_help=True,
    help="Say what changed between models, beside what chance would change.",
    epilog="Example: prism analyze weights --base Granite-3.3-8B --other hf/granite-mid --json weights.json",
)


@app.command()
def weights(
    base: Annotated[
        Path, typer.Option(help="The model before: a Hugging Face folder, a checkpoint, or a run (its latest).", callback=a_path)
    ],
    other: Annotated[Path, typer.Option(help="The model after, in any of these forms.", callback=a_path)],
    against: Annotated[
        Path | None, typer.Option(help="Another model made from --base: the cosine of both updates.", callback=a_path)
    ] = None,
    num_threads: Annotated[int | None, typer.Option(help="Threads. Default: all cores.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="The seed of the nulls that are drawn.", min=0, max=2**30)] = 0,
    json: Json = None,
) -> None:
    """Say how much each tensor and component changed, and how much a dense update of the same norm would have changed.

    Example: prism analyze weights --base Granite-3.3-8B --other hf/granite-mid --against hf/granite-mid-2 --json weights.json
    """
    from megatron_prism.jobs import analyze as job
    from megatron_prism.report import analysis

    result = job.run_weights(base, other, against, num_threads or len(os.sched_getaffinity(0)), seed)
    for line in analysis.weights(result):
        typer.echo(line)
    finish(result, json, quiet=True)


@app.command()
def spectra(
    base: Annotated[
        Path, typer.Option(help="The model before: a Hugging Face folder, a checkpoint, or a run (its latest).", callback=a_path)
    ],
    other: Annotated[Path, typer.Option(help="The model after, in any of these forms.", callback=a_path)],
    num_directions: Annotated[int, typer.Option(help="The leading singular directions that are looked at.", min=1)] = 32,
    seed: Annotated[int, typer.Option(help="The seed of the nulls and of the randomised SVD.", min=0, max=2**30)] = 0,
    json: Json = None,
) -> None:
    """Say of which rank each matrix's update is, and whether it turns the matrix's leading directions, beside a Gaussian update of its norm.

    Example: prism analyze spectra --base Granite-3.3-8B --other hf/granite-rl --json spectra.json
    """
    from megatron_prism.jobs import analyze as job
    from megatron_prism.report import analysis

    result = job.run_spectra(base, other, num_directions, seed)
    for line in analysis.spectra(result):
        typer.echo(line)
    finish(result, json, quiet=True)


@app.command()
def landscape(config: Config, overrides: Overrides = None, nproc: Nproc = None, dry_run: DryRun = False, json: Json = None) -> None:
    """Score models on the straight lines between three models, by evaluation's own score. Started again, it goes on.

    Example: prism analyze landscape configs/analyses/landscape.yaml out=analyses/landscape --nproc 8 --json landscape.json
    """
    from megatron_prism.core.config import LandscapeConfig
    from megatron_prism.report import analysis

    def job() -> Any:
        from megatron_prism.jobs import analyze_landscape

        return analyze_landscape

    gang.run(job, LandscapeConfig, config, overrides or [], nproc, dry_run, json, analysis.landscape)


def cka(config: Config, overrides: Overrides = None, nproc: Nproc = None, dry_run: DryRun = False, json: Json = None) -> None:
    """Say how alike the layers of models represent the same prompts (CKA), beside what chance gives. Started again, it goes on.

    Example: prism analyze cka configs/analyses/cka.yaml models.1.hf=hf/granite-mid out=analyses/cka --nproc 8 --json cka.json
    """
    from megatron_prism.core.config.cka import CkaConfig
    from megatron_prism.report import analysis

    def job() -> Any:
        from megatron_prism.jobs import analyze_cka

        return analyze_cka

    gang.run(job, CkaConfig, config, overrides or [], nproc, dry_run, json, analysis.cka)
