"""Reports on the machine, a run's progress, and the keys of a YAML: `prism doctor`, `prism status`, `prism config`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_prism.cli.options import Json, a_path, finish
from megatron_prism.core.errors import EnvironmentFault


def doctor(json: Json = None) -> None:
    """Report what this machine has, and what does not work without each missing package.

    Example: prism doctor
    """
    from megatron_prism.jobs import doctor as job

    findings = job.run()
    job.show(findings)
    finish(findings, json, quiet=True)
    if findings["missing"]:
        raise EnvironmentFault(f"required but absent: {', '.join(findings['missing'])}")


def status(
    run: Annotated[Path, typer.Argument(help="A run folder, or a pipeline's.", show_default=False, callback=a_path)], json: Json = None
) -> None:
    """Show the progress of a run or a pipeline: jobs, steps, loss, speed, time left, newest checkpoint.

    Example: prism status runs/quickstart/mid
    """
    from megatron_prism.jobs import status as job

    progress = job.run(run)
    job.show(progress)
    finish(progress, json, quiet=True)


def config(
    job: Annotated[
        str,
        typer.Argument(
            help="train, prepare, rl, evaluate, cluster, pipeline, study and others: a wrong name lists them all.", show_default=False
        ),
    ],
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema, by which an editor completes and checks a YAML.")
    ] = False,
    json: Json = None,
) -> None:
    """Print every key of a job's YAML: its default, bounds and description, and whether a resumed run may change it.

    Example: prism config train --schema > train.schema.json
    """
    from json import dumps

    from megatron_prism.jobs import config as jobs

    described = jobs.schema(job) if schema else jobs.run(job)
    if schema:
        typer.echo(dumps(described, indent=2))
    else:
        jobs.show(described)
    finish(described, json, quiet=True)
