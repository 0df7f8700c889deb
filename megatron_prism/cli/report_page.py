"""The report of studies, runs, evaluations and analyses: `prism report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_prism.cli.options import Json, Out, a_path, expanded, finish


def report(
    places: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Folders of studies, runs, mixtures, evaluations, verdicts, or JSON files of analyses."),
    ],
    out: Out,
    title: Annotated[str | None, typer.Option(help="The report's title. Default: the names of what it is of.")] = None,
    paper: Annotated[
        Path | None, typer.Option(help="A folder of the paper's tables. Default: configs/studies/paper of a checkout.", callback=a_path)
    ] = None,
    json: Json = None,
) -> None:
    """Write one self-contained HTML page, Markdown with CSV files, and every figure as PNG and SVG. Several studies are seeds of one.

    Example: prism report runs/study --out runs/study/report
    """
    from megatron_prism.jobs import report as job

    result = job.run(expanded(places, "RUN"), out, title, paper)
    finish(result, json)
