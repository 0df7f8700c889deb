"""The arguments shared by several jobs, and the output of a job's result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from megatron_prism.core import paths
from megatron_prism.core.errors import EnvironmentFault, InputError, Problem

LATER = "later"  # a command that is only parsed: it runs on another machine, and its folders may not exist yet


class GroupWithDefault(TyperGroup):
    """A group of commands whose `run` needs no name: words that begin with no command of the group are its arguments."""

    default = "run"

    def parse_args(self, context: Any, words: list[str]) -> list[str]:
        """Put `run` before words that name no command of the group, and ask for no help of the group."""
        return super().parse_args(context, self.in_full(words))

    def in_full(self, words: list[str]) -> list[str]:
        """Return the words with their command's name."""
        is_named = not words or words[0] in self.commands or words[0] in ("--help", "-h")
        return words if is_named else [self.default, *words]


def a_path(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """Return a path of the command line with `~` and $VARIABLES replaced: a shell leaves them in --out=~/a, and in quotes."""
    if path is None:
        return None
    try:
        return Path(paths.expanded(str(path)))
    except ValueError as error:
        raise InputError(Problem(parameter.opts[0], str(error), "a path", paths.FIX)) from None


def _in_a_folder(context: typer.Context, parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    path = a_path(parameter, path)
    if context.obj == LATER:
        return path
    if path is not None and not path.parent.is_dir():
        raise InputError(Problem("--json", str(path), f"a file in a folder that is there: {path.parent} is not"))
    if path is not None and path.is_dir():
        raise InputError(Problem("--json", f"{path}, a folder", "a file"))
    return path


Config = Annotated[Path, typer.Argument(help="A YAML config.", show_default=False, callback=a_path)]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides, as a.b=c.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, show the plan, write nothing.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file, as JSON.", callback=_in_a_folder)]
Nproc = Annotated[int | None, typer.Option(help="Start this many processes on this machine (torchrun).", min=1)]
Out = Annotated[Path, typer.Option(help="The folder to write; it must be new or empty.", callback=a_path)]
Hf = Annotated[Path, typer.Option(help="A Hugging Face model folder.", callback=a_path)]
Ckpt = Annotated[Path, typer.Option(help="A checkpoint, or a run folder (its latest).", callback=a_path)]


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
