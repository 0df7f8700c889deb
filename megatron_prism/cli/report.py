"""What a machine has, how far a run is, what a YAML may say: `prism doctor`, `prism status`, `prism config`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_prism.cli.options import Json, finish
from megatron_prism.core.errors import EnvironmentFault


def doctor(json: Json = None) -> None:
    """Tell what this machine has and what each absence costs.

    Example: prism doctor
    """
    from megatron_prism.jobs import doctor as job

    found = job.run()
    job.show(found)
    finish(found, json, quiet=True)
    if found["missing"]:
        raise EnvironmentFault(f"required but absent: {', '.join(found['missing'])}")


def status(run: Annotated[Path, typer.Argument(help="A run folder, or a pipeline's.", show_default=False)], json: Json = None) -> None:
    """Show how far a run or a pipeline is: its jobs, steps, loss, speed, time left, newest checkpoint.

    Example: prism status runs/quickstart/mid
    """
    from megatron_prism.jobs import status as job

    found = job.run(run)
    job.show(found)
    finish(found, json, quiet=True)


def config(
    job: Annotated[str, typer.Argument(help="train, prepare, cluster or pipeline.", show_default=False)],
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema, by which an editor completes and checks a YAML.")
    ] = False,
    json: Json = None,
) -> None:
    """Print every key of a job's YAML: its default, its bounds, its words, and whether a resumed run may change it.

    Example: prism config train --schema > train.schema.json
    """
    from json import dumps

    from megatron_prism.jobs import config as jobs

    found = jobs.schema(job) if schema else jobs.run(job)
    if schema:
        typer.echo(dumps(found, indent=2))
    else:
        jobs.show(found)
    finish(found, json, quiet=True)
