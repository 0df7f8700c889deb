"""Outcomes for responses: `prism grade`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_prism.cli.options import Json, a_path, finish
from megatron_prism.core.config.grade import AnswerForm, GradeConfig, Think

DEFAULT = GradeConfig()


def grade(
    file: Annotated[Path, typer.Argument(help="Responses, a JSON object a line.", show_default=False, callback=a_path)],
    out: Annotated[Path, typer.Option(help="The new file: the same lines with outcome and why.", callback=a_path)],
    num_workers: Annotated[
        int, typer.Option(help="Processes that compare expressions, and programs that run at once.", min=1)
    ] = DEFAULT.num_workers,
    think: Annotated[
        Think, typer.Option(help="`<think>` and `</think>`: required; opened (by the prompt); free (may be missing).")
    ] = DEFAULT.think,
    answer: Annotated[AnswerForm, typer.Option(help="Where the answer of math stands.")] = DEFAULT.answer,
    json: Json = None,
) -> None:
    """Grade a file of responses: right, wrong, no_format, truncated or fault, and why.

    Example: prism grade responses.jsonl --out graded.jsonl

    Exit code 0 whatever the outcomes are: a fault is counted, and no failure of the command.

    A line: `{"id": 1, "kind": "math", "gold": "1/2", "response": "<think>halve it</think> \\\\boxed{0.5}"}`
    """
    from megatron_prism.jobs import grade as job

    finish(job.run(file, out, GradeConfig(num_workers=num_workers, think=think, answer=answer)), json)
