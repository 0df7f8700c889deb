"""`prism evaluate` as a group: a model's scores, and the verdict on two evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_prism.cli import evaluate
from megatron_prism.cli.options import GroupWithDefault, Json, a_path, finish

app = typer.Typer(
    cls=GroupWithDefault,
    no_args_is_help=True,
    help="Score a model on tasks, and hold it against an earlier one. `prism evaluate CONFIG` is `prism evaluate run CONFIG`.",
    epilog="Example: prism evaluate --hf models/llama --tasks math500=data/math500.jsonl --limit 10",
)
app.command(GroupWithDefault.default)(evaluate.evaluate)


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
    from megatron_prism.eval import verdict
    from megatron_prism.jobs import evaluate_compare as job

    made, values = job.run(new, against, load(policy, PolicyConfig, overrides or []), out)
    for line in verdict.lines(made):
        typer.echo(line)
    finish(values, json, quiet=True)
    verdict.require(made)
