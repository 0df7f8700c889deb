"""The data of a run: `prism prepare`, `prism prompts`, `prism contaminate`, `prism locate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_prism.cli.options import Config, DryRun, Json, Overrides, a_path, finish
from megatron_prism.core.errors import InputError, Problem


def prepare(
    config: Config,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    report: Annotated[
        bool, typer.Option("--report", help="Draw the blend and show sample documents, into OUT/report; a dry run's into OUT.plan.")
    ] = False,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="I/N", help="Only make task I's shards of N tasks (I from 0); without it, the mixture is finished."),
    ] = None,
    json: Json = None,
) -> None:
    """Tokenize a weighted mixture of sources into Megatron data files.

    Example: prism prepare configs/mixtures/math.yaml out=data/math --dry-run

    `--task I/N` on N machines with one file system, then the same command without it: prism submit writes that as a job array.
    """
    from megatron_prism.core.config import PrepareConfig
    from megatron_prism.core.load import load, placed

    settings = load(config, PrepareConfig, overrides or [])  # before the job imports torch
    from megatron_prism.jobs import prepare as job

    with placed(config, PrepareConfig, overrides or []):
        if task is not None and not dry_run:
            finish(job.run_task(settings, *_task(task)), json)
            return
        result = job.run(settings, dry_run=dry_run)
    if report:
        result |= job.report(settings, result)
    finish(result, json, quiet=True)
    for line in result.get("downloads", []):
        typer.echo(_download(line))
    for path in result.get("report", []):
        typer.echo(f"report: {path}")
    if not dry_run:
        typer.echo(f"out: {settings.out}")


def prompts(config: Config, overrides: Overrides = None, dry_run: DryRun = False, json: Json = None) -> None:
    """Turn records into a prompt set for RL: prompts, and what grades their answers.

    Example: prism prompts configs/prompts/deepscaler.yaml out=data/prompts/deepscaler
    """
    from megatron_prism.core.config import PromptsConfig
    from megatron_prism.core.load import load, placed
    from megatron_prism.jobs import prompts as job

    settings = load(config, PromptsConfig, overrides or [])
    with placed(config, PromptsConfig, overrides or []):
        finish(job.run(settings, dry_run=dry_run), json)


def contaminate(
    data: Annotated[list[str], typer.Argument(help="A mixture's folder, a prompt set's, or files; also NAME=PATH.", show_default=False)],
    against: Annotated[list[str], typer.Option(help="An evaluation set in its published form, as NAME=FILE. May be given again.")],
    ngram: Annotated[int, typer.Option(help="This many words in a row.", min=1)] = 13,
    shortest: Annotated[
        int, typer.Option(help="A text of fewer words than --ngram is looked for as a whole, of fewer than this not.", min=1)
    ] = 8,
    text: Annotated[str, typer.Option(help="How a record of a file becomes its text.")] = "{text}",
    question: Annotated[list[str] | None, typer.Option(help="A field of a question, looked for before those of published sets.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A mixture's tokenizer, where it has moved.", callback=a_path)] = None,
    examples: Annotated[int, typer.Option(help="The documents written for each question and source.", min=1)] = 3,
    num_workers: Annotated[int | None, typer.Option(help="The number of processes; the default is one a core.", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="Write the examples into this folder.", callback=a_path)] = None,
    dry_run: DryRun = False,
    json: Json = None,
) -> None:
    """Find the questions of evaluation sets in a mixture, a prompt set or files.

    Example: prism contaminate data/prepared/math --against math500=data/evaluation/math500.jsonl --against aime24=data/evaluation/aime24.jsonl
    """
    from megatron_prism.jobs import contaminate as job
    from megatron_prism.report import contamination

    result = job.run(
        data,
        against,
        ngram=ngram,
        shortest=shortest,
        text=text,
        question_fields=question or (),
        tokenizer=tokenizer,
        num_examples=examples,
        num_workers=num_workers,
        out=out,
        dry_run=dry_run,
    )
    finish(result, json, quiet=True)
    for line in contamination.lines(result):
        typer.echo(line)


def _download(line: dict[str, Any]) -> str:
    """Return a source's download as lines for a shell: a comment, and the command."""
    share = "" if line["share"] is None else f", {line['share']:.1%} of its files"
    size = "" if line["text_bytes"] is None else f", about {line['text_bytes'] / 1e9:.1f} GB of text before compression"
    note = f"; {line['note']}" if line["note"] else ""
    return "\n".join([f"# {line['source']}{share}{size}{note}", *([line["command"]] if line["command"] else [])])


def _task(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(count) > 0):
        raise InputError(Problem("--task", repr(text), "I/N, as 0/8"))
    return int(index), int(count)


def locate(
    config: Config,
    overrides: Overrides = None,
    step: Annotated[int | None, typer.Option(help="What this step reads (1 is the first).")] = None,
    rank: Annotated[int, typer.Option(help="Data-parallel rank.")] = 0,
    sample: Annotated[int, typer.Option(help="Its sequence of the step, from 0.")] = 0,
    source: Annotated[str | None, typer.Option(help="Or which step reads a document of this source.")] = None,
    document: Annotated[int, typer.Option(help="The document, from 0.")] = 0,
    token: Annotated[int, typer.Option(help="Its token, from 0.")] = 0,
    epoch: Annotated[int, typer.Option(help="In which pass over the source, from 0.", min=0)] = 0,
    nproc: Annotated[int | None, typer.Option(help="The run's world size, where its config does not say.", min=1)] = None,
    json: Json = None,
) -> None:
    """Name the documents that a step of a run reads, or the step that reads a document.

    Example, after examples/quickstart_text.sh: prism locate configs/tiny/mid.yaml --step 40 --sample 3 --nproc 2
    """
    from megatron_prism.core.config import TrainConfig
    from megatron_prism.core.load import load, placed

    if (step is None) == (source is None):
        raise InputError(Problem("--step, --source", "neither" if step is None else "both", "one of them"))
    settings = load(config, TrainConfig, overrides or [])
    world_size = nproc or settings.world_size or 1
    from megatron_prism.data.locate import Sample
    from megatron_prism.jobs import locate as job

    with placed(config, TrainConfig, overrides or []):
        if step is not None:
            finish(job.contents(settings, world_size, Sample(step, rank, sample)), json)
        else:
            assert source is not None
            finish(job.reader_of(settings, world_size, source, epoch, document, token), json)
