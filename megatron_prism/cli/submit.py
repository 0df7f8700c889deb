"""A job on a Slurm cluster: `prism submit`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_prism.cli.options import LATER, GroupWithDefault, Json, a_path, finish
from megatron_prism.core.errors import InputError, Problem

if TYPE_CHECKING:
    from megatron_prism.launch.pipeline import Call


def submit(
    words: Annotated[list[str], typer.Argument(metavar="PIPELINE | -- JOB ...", help="A pipeline's YAML, or a job as prism takes it.")],
    cluster: Annotated[Path, typer.Option(help="The cluster's YAML (configs/clusters/).", show_default=False, callback=a_path)],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the sbatch scripts; needs neither Slurm nor data, writes nothing.")
    ] = False,
    tasks: Annotated[
        int | None, typer.Option(help="Make `prepare` a job array of so many tasks. Without it: the cluster's cpu.prepare_tasks.", min=1)
    ] = None,
    json: Json = None,
) -> None:
    """Submit a job, or a pipeline of jobs that wait for each other, to Slurm.

    Example: prism submit --cluster configs/clusters/test.yaml --dry-run -- train configs/tiny/mid.yaml world_size=2

    The words after `--` are a job of prism, as in a pipeline's `command`. Words before it that begin with `cluster.` override keys of the
    cluster: cluster.partition=long.
    """
    from megatron_prism.jobs import submit as job

    result = job.run(words, cluster, dry_run, read_command, tasks)
    for text in result.pop("texts", []):
        typer.echo(text, nl=False)
    finish(result, json, quiet=dry_run)


def read_command(words: Sequence[str]) -> Call | None:
    """Parse words as the command line does, and return the job with its arguments. None: the first word is not a job.

    Raises: InputError where the command line would refuse them.
    """
    from megatron_prism.launch.pipeline import Call

    command = _prism()
    names: list[str] = []
    rest = list(words)
    while jobs := getattr(command, "commands", None):
        rest = command.in_full(rest) if isinstance(command, GroupWithDefault) else rest
        name = rest.pop(0) if rest else ""
        if name not in jobs:
            if not names:
                return None
            raise InputError(Problem("command", " ".join(words), f"a job of prism: {' '.join(names)} with one of {', '.join(jobs)}"))
        names, command = [*names, *([] if name == getattr(command, "default", None) else [name])], jobs[name]
    try:
        with command.make_context(f"prism {' '.join(names)}", rest, obj=LATER) as context:
            return Call(" ".join(names), dict(context.params))
    except typer.Exit:  # --help has printed itself
        raise InputError(Problem("command", " ".join(words), "a job and its arguments, without --help")) from None
    except typer.BadParameter.__base__ as error:  # type: ignore[misc]  # click's UsageError: typer bundles and hides its own click
        raise InputError(
            Problem("command", " ".join(words), f"what prism {' '.join(names)} --help shows", error.format_message())
        ) from None


@functools.cache
def _prism() -> Any:
    """Return the command line, built once: it takes 0.1 s, and a study has hundreds of stages."""
    from megatron_prism.cli.entry import app  # imported here: entry imports this module

    return typer.main.get_command(app)
