"""A model's scores on tasks, `prism evaluate`, and the verdict on two evaluations, `prism evaluate compare`."""

from __future__ import annotations

import json as json_text
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_prism.cli import gang
from megatron_prism.cli.options import DryRun, GroupWithDefault, Json, Nproc, Overrides, a_path, finish
from megatron_prism.core import paths
from megatron_prism.core.errors import InputError, Problem, ResultFailure, raise_problems

EVALUATIONS = Path("evaluations")  # where the command line alone puts them
app = typer.Typer(
    cls=GroupWithDefault,
    no_args_is_help=True,
    help="Score a model on tasks, and hold it against an earlier one. `prism evaluate CONFIG` is `prism evaluate run CONFIG`.",
    epilog="Example: prism evaluate --hf models/llama --tasks math500=data/math500.jsonl --limit 10",
)


@app.command(GroupWithDefault.default)
def evaluate(
    config: Annotated[str | None, typer.Argument(help="A YAML config; with --hf or --ckpt the first override.", show_default=False)] = None,
    overrides: Overrides = None,
    hf: Annotated[Path | None, typer.Option(help="Without a YAML: a Hugging Face folder.", callback=a_path)] = None,
    ckpt: Annotated[Path | None, typer.Option(help="Without a YAML: a checkpoint, or a run folder (its latest).", callback=a_path)] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Without a YAML: sets, and their files, as math500=FILE.jsonl,aime24=FILE.jsonl.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Without a YAML: only the first so many questions of each.", min=1)] = None,
    num_samples: Annotated[int | None, typer.Option(help="Without a YAML: the responses to each question.", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="Without a YAML: the folder to write.", callback=a_path)] = None,
    against: Annotated[Path | None, typer.Option(help="An earlier evaluation, for a verdict by the policy.", callback=a_path)] = None,
    nproc: Nproc = None,
    dry_run: DryRun = False,
    json: Json = None,
) -> None:
    """Score a model on tasks, and keep every response. Started again, it goes on; asked for more, it samples only what is new.

    Example: prism evaluate --hf models/llama --tasks math500=data/math500.jsonl --limit 10

    Under torchrun or srun it joins their gang instead of starting one, as prism train does.
    """
    from megatron_prism.core.config import EvaluateConfig

    def job() -> Any:
        from megatron_prism.jobs import evaluate as job

        return job

    path, given = _of_command(config, list(overrides or []), hf, ckpt, tasks, out)
    if path is not None and (limit is not None or num_samples is not None):
        raise InputError(Problem("--limit, --num-samples", "given with a YAML", "tasks.NAME.limit and tasks.NAME.num_samples in it"))
    for name, _ in _tasks(tasks):
        given += [f"tasks.{name}.{key}={value}" for key, value in (("limit", limit), ("num_samples", num_samples)) if value is not None]
    if against is not None:
        given.append(f"against={_quoted(paths.escaped(str(against)))}")
    result = gang.run(job, EvaluateConfig, path, given, nproc, dry_run, json)
    if result.get("failure"):
        raise ResultFailure(result["failure"])


@app.command("compare")
def compare(
    new: Annotated[Path, typer.Argument(help="An evaluation's folder.", show_default=False, callback=a_path)],
    overrides: Annotated[list[str] | None, typer.Argument(help="Rules, as max_drop.math500=0.02.", show_default=False)] = None,
    *,
    against: Annotated[Path, typer.Option(help="The folder of the evaluation that it is held against.", callback=a_path)],
    policy: Annotated[Path | None, typer.Option(help="A YAML of rules; without a rule nothing is decided.", callback=a_path)] = None,
    out: Annotated[Path | None, typer.Option(help="Write verdict.json, and the pairs for nel gate, here.", callback=a_path)] = None,
    json: Json = None,
) -> None:
    """Hold an evaluation against an earlier one, question by question. Exit code 1 where the policy says NO-GO.

    Example: prism evaluate compare evaluations/new --against evaluations/base --policy configs/policies/retention.yaml
    """
    from megatron_prism.core.config.policy import PolicyConfig
    from megatron_prism.core.load import load
    from megatron_prism.eval.verdicts import verdict
    from megatron_prism.jobs import evaluate_compare as job

    made, values = job.run(new, against, load(policy, PolicyConfig, overrides or []), out)
    for line in verdict.lines(made):
        typer.echo(line)
    finish(values, json, quiet=True)
    verdict.require(made)


def _of_command(
    config: str | None, overrides: list[str], hf: Path | None, ckpt: Path | None, tasks: str | None, out: Path | None
) -> tuple[Path | None, list[str]]:
    """Return the YAML and the overrides; or no YAML, and the options as overrides.

    Raises: InputError for a YAML beside the options, or neither.
    """
    if hf is None and ckpt is None:
        if config is None or tasks is not None or out is not None:
            required = "a YAML and overrides; or --hf or --ckpt with --tasks, and no YAML"
            raise InputError(Problem("CONFIG, --hf, --ckpt, --tasks, --out", "none of the two ways, or both", required))
        try:
            return Path(paths.expanded(config)), overrides
        except ValueError as error:
            raise InputError(Problem("CONFIG", str(error), "a path", paths.FIX)) from None
    wrong = [Problem("--hf, --ckpt", f"{hf} and {ckpt}", "one model")] if hf is not None and ckpt is not None else []
    if not tasks:
        wrong.append(Problem("--tasks", "no task", "at least one, as math500=data/math500.jsonl"))
    raise_problems(wrong)
    if config is not None and "=" not in config:
        raise InputError(Problem("CONFIG", f"{config} with --hf or --ckpt", "a YAML, or these options"))
    model = hf or ckpt
    assert model is not None
    out = out or EVALUATIONS / model.resolve().name
    place, folder = (_quoted(paths.escaped(str(path))) for path in (model, out))
    given = [f"model.{'checkpoint' if hf is None else 'hf'}={place}", f"out={folder}"]
    for name, file in _tasks(tasks):
        given.append(f"tasks.{name}.path={_quoted(file)}" if file else f"tasks.{name}.set={name}")
    return None, [*given, *([config] if config is not None else []), *overrides]


def _tasks(text: str | None) -> list[tuple[str, str]]:
    """Return (name, file) of --tasks; a file may be empty. Raises: InputError for a name that is none, or comes twice."""
    from megatron_prism.core.check.evaluate import NAME

    given = [part.strip() for part in (text or "").split(",") if part.strip()]
    parts = [part.partition("=") for part in given]
    if wrong := [part for part, (name, _, _) in zip(given, parts, strict=True) if not re.fullmatch(NAME, name, re.ASCII)]:
        fix = "NAME is a set's, as math500, of letters, digits, _ and -"
        raise InputError([Problem("--tasks", repr(part), "NAME=FILE, or the NAME of a set that needs no file", fix) for part in wrong])
    names = [name for name, _, _ in parts]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(Problem("--tasks", f"{twice} twice", "a name of its own for each task", "a YAML's tasks.NAME.set names the set"))
    return [(name, file) for name, _, file in parts]


def _quoted(path: str) -> str:
    """Return a path as the text of an override, which is read as YAML: ` #` would begin a comment."""
    return json_text.dumps(path, ensure_ascii=False)
