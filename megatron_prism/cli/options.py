"""The arguments shared by several jobs, and the output of a job's result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_prism.core.errors import EnvironmentFault, InputError, Problem

LATER = "later"  # a command that is only parsed: it runs on another machine, and its folders may not exist yet


def _in_a_folder(context: typer.Context, path: Path | None) -> Path | None:
    if context.obj == LATER:
        return path
    if path is not None and not path.parent.is_dir():
        raise InputError(Problem("--json", str(path), f"a file in a folder that is there: {path.parent} is not"))
    if path is not None and path.is_dir():
        raise InputError(Problem("--json", f"{path}, a folder", "a file"))
    return path


Config = Annotated[Path, typer.Argument(help="A YAML config.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides, as a.b=c.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, show the plan, write nothing.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file, as JSON.", callback=_in_a_folder)]
Nproc = Annotated[int | None, typer.Option(help="Start this many processes on this machine (torchrun).", min=1)]
Out = Annotated[Path, typer.Option(help="The folder to write; it must be new or empty.")]


def finish(result: dict[str, Any], path: Path | None, quiet: bool = False) -> None:
    """Print a result on standard output, one line per value. With `path`, also write it as JSON."""
    from megatron_prism.core.manifest import write_json
    from megatron_prism.report import lines

    if path is not None:
        try:
            write_json(path, result)
        except OSError as error:
            raise EnvironmentFault(f"--json {path}: {error.strerror or error}; the job itself is done") from error
    for line in [] if quiet else lines.lines(result):
        typer.echo(line)
