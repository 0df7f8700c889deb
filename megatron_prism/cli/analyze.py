"""What changed between models, and what lies between them: `prism analyze`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_prism.cli import gang
from megatron_prism.cli.options import Config, DryRun, Json, Nproc, Overrides, a_path, finish
from megatron_prism.core.errors import InputError, Problem

app = typer.Typer(
    no_args_is_help=True,
    help="Say what changed between models, beside what chance would change.",
    epilog="Example: prism analyze weights --base Granite-3.3-8B --other hf/granite-mid --json weights.json",
)


@app.command()
def weights(
    base: Annotated[
        Path | None, typer.Option(help="The model before: a Hugging Face folder, a checkpoint, or a run (its latest).", callback=a_path)
    ] = None,
    other: Annotated[Path | None, typer.Option(help="The model after, in any of these forms.", callback=a_path)] = None,
    against: Annotated[
        Path | None, typer.Option(help="Another model made from --base: the cosine of both updates.", callback=a_path)
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Instead of --other: every checkpoint of this run. --base: what it began from.", callback=a_path)
    ] = None,
    num_threads: Annotated[int | None, typer.Option(help="Threads. Default: all cores.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="The seed of the nulls that are drawn.", min=0, max=2**30)] = 0,
    json: Json = None,
) -> None:
    """Say how much each tensor and component changed, and how much a dense update of the same norm would have changed.

    Example: prism analyze weights --base Granite-3.3-8B --other hf/granite-mid --against hf/granite-mid-2 --json weights.json
    """
    from megatron_prism.jobs import analyze as job
    from megatron_prism.jobs import analyze_trajectory as trajectory
    from megatron_prism.report import analysis

    threads = num_threads or len(os.sched_getaffinity(0))
    if run is not None and other is None and against is None:
        result = trajectory.run(run, base, threads, seed)
    elif run is None and base is not None and other is not None:
        result = job.run_weights(base, other, against, threads, seed)
    else:
        raise InputError(
            Problem("--base, --other, --run", "neither of the two ways, or both", "--base and --other; or --run, with --base or without")
        )
    for line in analysis.weights(result) if run is None else analysis.trajectory(result):
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
def responses(
    runs: Annotated[
        list[str], typer.Argument(help="Folders of prism evaluate, in the order of training; also NAME=DIR.", show_default=False)
    ],
    task: Annotated[list[str] | None, typer.Option(help="Only this task. May be given again.", show_default=False)] = None,
    steps: Annotated[str | None, typer.Option(help="A regular expression that a response with steps holds.", show_default=False)] = None,
    json: Json = None,
) -> None:
    """Say what responses are like: length, certainty by correctness, which problems are solved; and what flips from each model to the next.

    Example: prism analyze responses base=evaluations/base mid=evaluations/mid rl=evaluations/rl --task math500 --json responses.json
    """
    from megatron_prism.jobs import analyze_responses as job
    from megatron_prism.report import analysis

    result = job.run(runs, task or [], steps)
    for line in analysis.responses(result):
        typer.echo(line)
    finish(result, json, quiet=True)


@app.command()
def landscape(config: Config, overrides: Overrides = None, nproc: Nproc = None, dry_run: DryRun = False, json: Json = None) -> None:
    """Score models on the straight lines between three models, by evaluation's own score. Started again, it goes on.

    Example: prism analyze landscape configs/analyses/landscape.yaml base_model.hf=Llama-3.1-8B mid_model.checkpoint=runs/mid
    rl_model.checkpoint=runs/rl out=analyses/landscape --nproc 8 --json landscape.json
    """
    from megatron_prism.core.config import LandscapeConfig
    from megatron_prism.report import analysis

    def job() -> Any:
        from megatron_prism.jobs import analyze_landscape

        return analyze_landscape

    gang.run(job, LandscapeConfig, config, overrides or [], nproc, dry_run, json, analysis.landscape)


@app.command()
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
