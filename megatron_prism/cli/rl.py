"""Reinforcement learning: `prism rl CONFIG`, and the jobs around a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from megatron_prism.cli import aligner, gang
from megatron_prism.cli.options import Config, DryRun, GroupWithDefault, Json, Nproc, Overrides, a_path, finish
from megatron_prism.core.errors import InputError, Problem, ResultFailure

app = typer.Typer(
    cls=GroupWithDefault,
    no_args_is_help=True,
    help="Train a checkpoint by reinforcement learning on prompts whose answers can be graded. `prism rl CONFIG` is `prism rl run CONFIG`.",
    epilog="Example: prism rl my_rl.yaml run_dir=runs/other optimizer.lr=1e-6 --nproc 2",
)


app.add_typer(aligner.export, name="export")
app.command()(aligner.serve)

Backend = Literal["megatron", "nemo_aligner"]


@app.command(GroupWithDefault.default)
def rl_run(
    config: Config,
    overrides: Overrides = None,
    nproc: Nproc = None,
    record: Annotated[bool, typer.Option("--record", help="Keep what each step saw (record.interval=1).")] = False,
    only: Annotated[Literal["rollout", "train"] | None, typer.Option(help="Only sample and grade, or only train, on --from's.")] = None,
    source: Annotated[Path | None, typer.Option("--from", help="With --only train: the recorded run.", callback=a_path)] = None,
    dry_run: DryRun = False,
    json: Json = None,
    backend: Annotated[Backend, typer.Option(help="What trains. nemo_aligner: nothing here; a folder is written.")] = "megatron",
    cluster: Annotated[Path | None, typer.Option(help="With nemo_aligner: the cluster's YAML.", callback=a_path)] = None,
    out: Annotated[Path | None, typer.Option(help="With nemo_aligner: the folder to write.", callback=a_path)] = None,
) -> None:
    """Train a checkpoint by reinforcement learning. Started again, the run resumes.

    Example: prism rl my_rl.yaml run_dir=runs/other optimizer.lr=1e-6 --nproc 2

    Under torchrun or srun it joins their gang instead of starting one, as prism train does.
    """
    from megatron_prism.core.config import RLConfig

    if backend == "nemo_aligner" and (record or only):
        raise InputError(Problem("--record, --only", "given with --backend nemo_aligner", "only where megatron_prism trains"))
    if backend == "nemo_aligner":
        finish(_export(config, overrides, nproc, cluster, out, dry_run), json)
        return
    if cluster is not None or out is not None:
        raise InputError(Problem("--cluster, --out", "given", "only with --backend nemo_aligner", "a cluster is prism submit's"))

    def job() -> Any:
        from megatron_prism.jobs import rl as job

        return job

    gang.run(job, RLConfig, config, [*_keys(record, only, source), *(overrides or [])], nproc, dry_run, json)


def _export(
    config: Path, overrides: list[str] | None, nproc: int | None, cluster: Path | None, out: Path | None, dry_run: bool
) -> dict[str, Any]:
    if cluster is None or out is None or nproc is not None:
        raise InputError(Problem("--backend", "nemo_aligner", "--cluster and --out with it, and no --nproc"))
    from megatron_prism.jobs import aligner as job

    return job.run_rl(config, overrides or [], cluster, out, dry_run)


def _keys(record: bool, only: str | None, source: Path | None) -> list[str]:
    """Return the options of a run as the keys that they stand for."""
    from megatron_prism.launch.pipeline import option_keys

    if (only == "train") != (source is not None):
        given = [f"{option} {value}" for option, value in (("--only", only), ("--from", source)) if value is not None]
        required = "--only train with --from RUN, and --from with nothing else"
        raise InputError(Problem("--only, --from", " ".join(given), required))
    return option_keys({"record": record, "only": only, "source": source})


@app.command("filter")
def rl_filter(config: Config, overrides: Overrides = None, nproc: Nproc = None, dry_run: DryRun = False, json: Json = None) -> None:
    """Sample a checkpoint's responses to every prompt of a set, and count the right ones. Started again, it goes on.

    Example: prism rl filter configs/tiny/rl/filter.yaml --nproc 2

    Under torchrun or srun it joins their gang instead of starting one, as prism train does.
    """
    from megatron_prism.core.config import FilterConfig

    def job() -> Any:
        from megatron_prism.jobs import rl_filter as job

        return job

    gang.run(job, FilterConfig, config, overrides or [], nproc, dry_run, json)


@app.command("mix")
def rl_mix(config: Config, overrides: Overrides = None, dry_run: DryRun = False, json: Json = None) -> None:
    """Select the prompts that RL trains on from prompt sets, by domain and pass count.

    Example: prism rl mix configs/prompts/mixes/mcs_balanced.yaml --dry-run
    """
    from megatron_prism.core.config import MixConfig
    from megatron_prism.core.load import load, placed
    from megatron_prism.jobs import rl_mix as job

    settings = load(config, MixConfig, overrides or [])
    with placed(config, MixConfig, overrides or []):
        finish(job.run(settings, dry_run=dry_run), json)


@app.command("samples")
def rl_samples(
    run: Annotated[Path, typer.Argument(help="A run's folder.", show_default=False, callback=a_path)],
    step: Annotated[int | None, typer.Option(help="A step whose responses were kept; without it, the newest.", min=1)] = None,
    json: Json = None,
) -> None:
    """Write a step's responses as a page for a browser: by prompt, with outcome, reward, advantage and text. The run needs rollout.keep.

    Example: prism rl samples runs/my_rl --step 100
    """
    from megatron_prism.jobs import rl_samples as job

    finish(job.run(run, step), json)


@app.command("replay")
def rl_replay(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run that keeps records.", show_default=False, callback=a_path)],
    step: Annotated[int, typer.Argument(help="The step to compute again.", min=1, show_default=False)],
    nproc: Annotated[
        int | None, typer.Option(help="The recorded number of ranks, on their layout. Else one process on the CPU.", min=1)
    ] = None,
    dry_run: DryRun = False,
    json: Json = None,
) -> None:
    """Compute a recorded step again, and name the first thing that differs from its record. Exit code 1 where something does.

    Example: prism rl replay runs/my_rl 120
    """
    if nproc is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megatron_prism.jobs import rl_replay as job
    from megatron_prism.parallel import environment

    resolved = job.resolve(run_dir, step, size := gang.world_size(nproc))
    if dry_run:
        finish(dict(resolved.figures), json)
        return
    environment.set_variables(resolved.config)
    gang.become(size)
    result = job.run(resolved)
    if gang.speaks():
        finish(result, json)
    if result["first_difference"]:
        raise ResultFailure(result["verdict"])
