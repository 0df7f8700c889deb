"""Models merged into one: `prism merge`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_prism.cli.options import DryRun, Json, Overrides, a_path, finish
from megatron_prism.core import paths
from megatron_prism.core.errors import InputError, Problem

OptionalConfig = Annotated[Path | None, typer.Argument(help="A YAML config, in place of the options.", show_default=False, callback=a_path)]
Folder = Annotated[Path | None, typer.Option(callback=a_path)]


def merge(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR=WEIGHT", help="A model and its weight, once for each: a Hugging Face folder, a checkpoint or a run."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write; it must be new or empty.", callback=a_path)] = None,
    method: Annotated[str | None, typer.Option(help="linear (without it), slerp, task_arithmetic or ties.")] = None,
    base: Annotated[Path | None, typer.Option(help="task_arithmetic, ties: what the models were trained from.", callback=a_path)] = None,
    config_from: Annotated[
        Path | None,
        typer.Option(help="The model that gives config.json, tokenizer and files. Without it: --base, or the first.", callback=a_path),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Without it: each tensor's own.")] = None,
    normalize: Annotated[
        bool | None, typer.Option(help="Divide by the sum of the weights. Without it: ties alone does.", show_default=False)
    ] = None,
    any_sum: Annotated[bool, typer.Option("--any-sum", help="linear: accept weights that do not sum to 1.")] = False,
    t: Annotated[float | None, typer.Option(help="slerp: 0 is the first model, 1 the second.")] = None,
    density: Annotated[float | None, typer.Option(help="ties: the share of each tensor's moves to keep.")] = None,
    scale: Annotated[float | None, typer.Option(help="task_arithmetic, ties: the factor of the merged move.")] = None,
    sums: Annotated[str | None, typer.Option(help="xxh128 (without it) or sha256: what merge.json has of the models' files.")] = None,
    dry_run: DryRun = False,
    json: Json = None,
) -> None:
    """Merge models of one architecture into a Hugging Face folder: by options, or by a YAML of the same keys.

    Example: prism merge --model Llama-3.1-8B=0.15 --model runs/mid=0.85 --out Llama-3.1-8B-merged
    """
    from megatron_prism.core.config import MergeConfig
    from megatron_prism.core.load import build, load, placed
    from megatron_prism.jobs import merge as job

    given = {
        "out": out,
        "models": [_model(text) for text in model] if model else None,
        "method": method,
        "base_model": base,
        "config_from": config_from,
        "dtype": dtype,
        "normalize": normalize,
        "any_sum": any_sum or None,
        "t": t,
        "density": density,
        "scale": scale,
        "sums": sums,
    }
    values = {key: value if isinstance(value, (list, bool, float)) else str(value) for key, value in given.items() if value is not None}
    if config is None:
        finish(job.run(build(values, MergeConfig, _option), dry_run=dry_run), json)
        return
    if values:
        found = ", ".join(f"{_option((key,))} beside {config}" for key in values)
        raise InputError(Problem("CONFIG", found, "a config or options", "override a config's keys as a.b=c"))
    settings = load(config, MergeConfig, overrides or [])
    with placed(config, MergeConfig, overrides or []):
        finish(job.run(settings, dry_run=dry_run), json)


def _option(key: tuple[Any, ...]) -> str:
    """Return the option that sets a key."""
    name = {"models": "model", "base_model": "base"}.get(str(key[0]), str(key[0]))
    return "--" + " ".join([name.replace("_", "-"), *map(str, key[1:])])


def _model(text: str) -> dict[str, Any]:
    """Return a model of the command line: a path, and after its last `=` the weight, where a number stands there.

    A folder that is there under the whole text, as step=100, and not without the number, has no weight.
    """
    path, sign, weight = text.rpartition("=")
    try:
        split: tuple[str, float | None] = (path, float(weight)) if sign else (text, None)
    except ValueError:
        split = (text, None)
    if sign and not path:
        raise InputError(Problem("--model", repr(text), "DIR=WEIGHT", "no folder is named: a shell variable may be empty"))
    try:
        whole, path = paths.expanded(text), paths.expanded(split[0])
    except ValueError as error:
        raise InputError(Problem("--model", str(error), "DIR=WEIGHT", paths.FIX)) from None
    is_whole = os.path.isdir(whole) and not os.path.exists(path)
    return {"path": whole, "weight": None} if is_whole else {"path": path, "weight": split[1]}
