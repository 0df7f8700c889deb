"""The arguments shared by several jobs, and the output of a job's result."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from megatron_prism.core import paths
from megatron_prism.core.errors import EnvironmentFault, InputError, Problem, raise_problems

LATER = "later"  # a command that is only parsed: it runs on another machine, and its folders may not exist yet

SUMMARY = b'{\n  "kind": "evaluation"'  # how an evaluation's summary.json begins, which a result must not overwrite
# files of runs and sets, of models and of checkpoints, which a result must not overwrite: some begin as a result does
KEPT = re.compile(
    r"(manifest|prism|shards|merge|vocab|added_tokens|special_tokens_map|tokenizer|chat_template|tekken|(\w+_)?config|.*\.index)\.json"
)


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


def a_path(context: typer.Context, parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """Return a path of the command line with `~` and $VARIABLES replaced: a shell leaves them in --out=~/a, and in quotes.

    Raises: InputError where --json would overwrite it.
    """
    if path is None:
        return None
    try:
        path = Path(paths.expanded(str(path)))
    except ValueError as error:
        raise InputError(Problem(parameter.opts[0], str(error), "a path", paths.FIX)) from None
    _refuse_overwrite(context, {**context.params, parameter.name: path})
    return path


def expanded(texts: Iterable[str | Path], where: str) -> list[Path]:
    """Return several paths of the command line with `~` and $VARIABLES replaced. Raises: InputError with each that has a variable not set."""
    made: list[Path] = []
    problems: list[Problem] = []
    for text in texts:
        try:
            made.append(Path(paths.expanded(str(text))))
        except ValueError as error:
            problems.append(Problem(where, str(error), "a path", paths.FIX))
    raise_problems(problems)
    return made


def _in_a_folder(context: typer.Context, parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    path = a_path(context, parameter, path)
    if context.obj == LATER or path is None:
        return path
    if str(path) == "-":
        raise InputError(Problem("--json", "-", "a file", "results as lines are on standard output without it; name a file for JSON"))
    if not path.parent.is_dir():
        raise InputError(Problem("--json", str(path), f"a file in a folder that is there: {path.parent} is not"))
    if path.is_dir():
        raise InputError(Problem("--json", f"{path}, a folder", "a file"))
    _refuse_other(path)
    return path


def _refuse_overwrite(context: typer.Context, values: dict[Any, Any]) -> None:
    """Refuse a --json file that is another path of the command line, or is there already in a folder of it.

    Each path calls this with those before it: whichever is read last sees both.
    """
    json = values.get("json")
    if context.obj == LATER or not isinstance(json, Path):
        return
    file = json.resolve()
    for name, value in values.items():
        if name == "json" or not isinstance(value, Path):
            continue
        place = value.resolve()
        if file == place or (file.exists() and place in file.parents):
            raise InputError(Problem("--json", f"{json}, which is {value} or in it", "a file of its own", "choose another file"))


def _refuse_other(path: Path) -> None:
    """Refuse a --json file that is there and is no result: results, and no lines of JSON, begin as write_json writes them.

    A file of a model, a checkpoint or a run is none, whether the command line or a YAML names its folder.
    """
    if not path.is_file():  # a device or a pipe holds nothing
        return
    try:
        with path.open("rb") as stream:
            begin = stream.read(len(SUMMARY))
            is_result = not KEPT.fullmatch(path.name) and begin != SUMMARY and begin[:2] in (b"{\n", b"{}", b"")
    except OSError as error:
        raise InputError(Problem("--json", f"{path}: {error.strerror or error}", "a file that can be written")) from None
    if not is_result:
        raise InputError(
            Problem("--json", f"{path}, which is there and is no result", "a new file, or an earlier result", "choose another")
        )


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

    for line in [] if quiet else lines.lines(result):  # before the file, which may not be written
        typer.echo(line)
    if path is not None:
        _refuse_other(path)  # the job may have written it
        try:
            write_json(path, result)
        except OSError as error:
            raise EnvironmentFault(f"--json {path}: {error.strerror or error}; the job itself is done") from error
