"""A graph of stages as one command: `prism study`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from megatron_prism.cli.options import Config, Json, Overrides, a_path, expanded, finish
from megatron_prism.cli.submit import read_command
from megatron_prism.core.errors import EnvironmentFault, Problem, ResultFailure, Stopped, raise_problems

if TYPE_CHECKING:
    from megatron_prism.core.config import StudyConfig
    from megatron_prism.jobs.study import Study


def study(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every stage, show the graph and what it needs, write nothing.")] = False,
    gpu_hour_price: Annotated[
        float | None, typer.Option(help="With --dry-run: the price in USD that the cost assumes. Without it: 2.5.", min=0.0)
    ] = None,
    gpu: Annotated[
        Literal["h100", "h200"] | None, typer.Option(help="With --dry-run: the GPU that is planned for. Without it: h100.")
    ] = None,
    status: Annotated[bool, typer.Option("--status", help="Only show how the stages stand, and the claims on their results.")] = False,
    cluster: Annotated[
        Path | None, typer.Option(help="Submit the stages as a chain of Slurm jobs on this cluster (configs/clusters/).", callback=a_path)
    ] = None,
    stage: Annotated[str | None, typer.Option(metavar="NAME", help="Run this stage alone, as a job of --cluster does.")] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RUN_DIR", help="With --status: another study of this graph (a seed); once for each. Claims are put together."
        ),
    ] = None,
    only: Annotated[str | None, typer.Option(metavar="NAME,...", help="Run these stages alone.")] = None,
    until: Annotated[str | None, typer.Option(metavar="NAME,...", help="Run these stages and those that they need.")] = None,
    json: Json = None,
) -> None:
    """Run a graph of stages, and judge the claims on what they give. Started again, it goes on: a stage that is done runs again only if an input changed.

    Example: prism study configs/studies/tiny.yaml run_dir=runs/tiny variables.seed=1

    Exit code 1 where a stage failed (--status shows its last line, RUN_DIR/study/NAME/log.txt the rest), 3 where the study was stopped.
    """
    from megatron_prism.core.config import StudyConfig
    from megatron_prism.core.load import placed
    from megatron_prism.jobs import study as job
    from megatron_prism.study import claims, overview

    of_plan, beside = {"--gpu": gpu, "--gpu-hour-price": gpu_hour_price}, expanded(beside or (), "--beside")
    _check_options({"--only": only, "--until": until, "--stage": stage}, of_plan, status, dry_run, bool(beside), cluster is not None)
    settings = _load(config, overrides or [])
    with placed(config, StudyConfig, overrides or []):
        at_work = job.read(settings, read_command, _names(only), _names(until), stage)
    if cluster is not None:
        _submit(at_work, [str(config), *(overrides or [])], cluster, dry_run, json)
        return
    if dry_run:
        _show_plan(at_work, 2.5 if gpu_hour_price is None else gpu_hour_price, gpu or "h100", json)
        return
    result = job.standing(at_work) if status else job.run(at_work, stage)
    for line in overview.lines(result, at_work.wanted):
        typer.echo(line)
    if beside:
        result = job.beside(result, beside)
        for line in claims.lines_over(result["over_studies"]):
            typer.echo(line)
    finish(result, json, quiet=True)
    if not status:
        _exit(at_work, result, stage)


def _load(config: Path, overrides: list[str]) -> StudyConfig:
    from megatron_prism.core.check.study import check_variables
    from megatron_prism.core.config import StudyConfig
    from megatron_prism.core.layers import config_layers
    from megatron_prism.core.load import load

    settings = load(config, StudyConfig, overrides)
    raise_problems(check_variables(config_layers(config, StudyConfig, overrides)))  # of what interpolates: a loaded config has values alone
    return settings


def _check_options(names: dict[str, str | None], of_plan: dict[str, Any], status: bool, dry_run: bool, beside: bool, cluster: bool) -> None:
    """Check that no option is silently left aside. Raises: InputError."""
    chosen = [name for name, text in names.items() if text is not None]
    problems = [Problem(name, repr(names[name]), "at least one stage's name") for name in chosen if not _names(names[name])]
    if len(chosen) > 1:
        problems.append(Problem(chosen[-1], f"beside {chosen[0]}", "one of --only, --until and --stage"))
    if status and (dry_run or cluster):
        problems.append(Problem("--status", f"beside {'--dry-run' if dry_run else '--cluster'}", "--status alone"))
    if names["--stage"] is not None and (dry_run or cluster):
        problems.append(Problem("--stage", f"beside {'--dry-run' if dry_run else '--cluster'}", "--stage alone", "or --only"))
    if (given := [name for name, value in of_plan.items() if value is not None]) and (cluster or not dry_run):
        found = "beside --cluster" if cluster else "no --dry-run"
        problems.append(Problem(given[0], found, "--dry-run without --cluster, which plans", f"leave {' and '.join(given)} out"))
    if beside and not status:
        problems.append(Problem("--beside", "no --status", "--status --beside RUN_DIR"))
    raise_problems(problems)


def _exit(at_work: Study, result: dict[str, Any], alone: str | None) -> None:
    """End as the stages did.

    Raises: ResultFailure, Stopped; of a stage alone EnvironmentFault too, upon which its job is started again, as often as after faults.
    """
    from megatron_prism.study import overview

    wanted = {name: stage for name, stage in result["stages"].items() if name in at_work.wanted}
    if failed := [name for name, stage in wanted.items() if stage["state"] in (overview.FAILED, overview.BLOCKED)]:
        told = f"failed, or needs one that did: {', '.join(failed)}; logs: {result['run_dir']}/study/NAME/log.txt; the same command goes on"
        is_machine = alone is not None and (wanted[failed[0]]["exit_code"] or 0) >= EnvironmentFault.exit_code
        raise EnvironmentFault(told) if is_machine else ResultFailure(told)
    if alone is not None and wanted[alone]["state"] == overview.STOPPED and not at_work.stages[alone].resumes:
        raise EnvironmentFault(
            f"{alone} was stopped, and begins anew at each start; the cluster's cpu.time_limit must be longer than it takes"
        )
    if at_work.signals or any(stage["state"] == overview.STOPPED for stage in wanted.values()):
        raise Stopped("stopped; the same command goes on")


def _submit(at_work: Study, words: list[str], cluster: Path, dry_run: bool, json: Path | None) -> None:
    from megatron_prism.jobs import study_slurm

    result = study_slurm.run(at_work, words, cluster, dry_run, read_command)
    for text in result.pop("texts", []):
        typer.echo(text, nl=False)
    finish(result, json, quiet=dry_run)


def _show_plan(at_work: Study, gpu_hour_price: float, gpu: Literal["h100", "h200"], json: Path | None) -> None:
    from megatron_prism.jobs import study_plan
    from megatron_prism.jobs.plan import Asked
    from megatron_prism.planning.gpus import GPUS

    plan = study_plan.run(at_work, Asked(gpu_hour_price, GPUS[gpu]))
    for line in study_plan.lines(plan):
        typer.echo(line)
    finish(plan, json, quiet=True)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]
