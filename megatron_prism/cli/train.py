"""A training run and its plan: `prism train`, `prism plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_prism.cli import gang
from megatron_prism.cli.options import Config, DryRun, Json, Nproc, Overrides, a_path, finish
from megatron_prism.core.errors import InputError, Problem
from megatron_prism.planning.gpus import GPUS, GpuName


def train(config: Config, overrides: Overrides = None, nproc: Nproc = None, dry_run: DryRun = False, json: Json = None) -> None:
    """Train from a checkpoint or from scratch. Started again, the run resumes from its last checkpoint.

    Example, after examples/quickstart_text.sh: prism train configs/tiny/mid.yaml run_dir=runs/other optimizer.lr=1e-3 --nproc 2

    Under torchrun or srun it joins their gang instead of starting one. With --nproc, under an srun with one task per node, it starts each
    node's part of one gang.
    """
    from megatron_prism.core.config import TrainConfig

    def job() -> Any:
        from megatron_prism.jobs import train as job

        return job

    gang.run(job, TrainConfig, config, overrides or [], nproc, dry_run, json)


def plan(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="On so many GPUs: the same as world_size=N.", min=1)] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Rank every layout that is valid and fits.")] = False,
    gpu: Annotated[GpuName, typer.Option(help="The kind of GPU.")] = "h100",
    usd_per_gpu_hour: Annotated[float, typer.Option(help="The price that the cost assumes.", min=0.0)] = 2.5,
    response_tokens: Annotated[
        float | None,
        typer.Option(help="An RL run's mean response, which its time assumes. Without it: a quarter of rollout.max_tokens.", min=1.0),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="For rl filter and evaluate: a YAML of configs/models, while the checkpoint is not there; of a recipe, the model's own.",
            callback=a_path,
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Predict what a run of train, rl, rl filter or evaluate needs on H100s or H200s: memory, time, cost. It writes nothing.

    Example: prism plan configs/recipes/llama-3.1-8b/midtrain.yaml --gpus 64
    """
    from megatron_prism.core.config import EvaluateConfig, FilterConfig, RLConfig, TrainConfig
    from megatron_prism.core.load import load, placed

    if gpus and any(each.startswith("world_size=") for each in overrides or []):
        raise InputError(Problem("--gpus", f"{gpus}, and world_size as an override", "one of them: they are the same"))
    given = [*(overrides or []), *([f"world_size={gpus}"] if gpus and not sweep else [])]
    kind = _planned_kind(config, given)
    if gpus and sweep and kind in (TrainConfig, RLConfig):  # its overrides are for the layout of that size, or for none where there is none
        given += [f"world_size={gpus}", f"layouts.{gpus}={{}}"]
    settings: Any = load(config, kind, given)
    from megatron_prism.jobs import plan as job

    asked = job.Asked(usd_per_gpu_hour, GPUS[gpu], response_tokens)
    if response_tokens is not None and kind is TrainConfig:
        raise InputError(Problem("--response-tokens", f"{response_tokens:g}", "only for what samples: a run of train does not"))
    with placed(config, kind, given):
        if kind in (FilterConfig, EvaluateConfig):
            planned = _of_sampling(settings, asked, model or _preset(config, settings), sweep)
        elif model is not None:
            raise InputError(Problem("--model", str(model), "only for rl filter and evaluate: a run has its own key, model"))
        else:
            planned = job.sweep(settings, gpus or job.num_gpus(settings), asked) if sweep else job.run(settings, asked)
        finish(planned, json, quiet=True)
        job.show(planned)
        if not planned["fits"] and kind in (FilterConfig, EvaluateConfig):
            raise InputError(Problem("num_rows", f"{planned['memory_gib_per_gpu_max']:.1f} GiB", "what fits", "fewer rows, or a larger tp"))
        if not planned["fits"]:
            raise InputError(job.too_large(settings, planned, asked))


def _planned_kind(config: Path, overrides: list[str]) -> type:
    """Return which config of those that are planned a YAML is. Raises: InputError where it is one of another job."""
    from megatron_prism.core.config import EvaluateConfig, FilterConfig, RLConfig, StudyConfig, TrainConfig
    from megatron_prism.core.load import closest
    from megatron_prism.launch.pipeline import CONFIGS

    planned = (TrainConfig, RLConfig, FilterConfig, EvaluateConfig)
    jobs = {**{kind: job for job, kind in CONFIGS.items()}, StudyConfig: "study"}
    kind = closest(config, (*planned, *(kind for kind in jobs if kind not in planned)), overrides)
    if kind not in planned:
        required = f"one of {', '.join(jobs[one] for one in planned)}: what runs on GPUs"
        fix = f"prism {jobs[kind]} {config} --dry-run shows its plan"
        raise InputError(Problem(str(config), f"a config of prism {jobs[kind]}", required, fix))
    return kind


def _preset(config: Path, settings: Any) -> Path | None:
    """Return configs/models/NAME.yaml for configs/recipes/NAME/..., where the checkpoint that the recipe names is not there yet."""
    from megatron_prism.core import log

    start, recipe = getattr(settings, "model", None) or settings.init, config.resolve().parent
    if recipe.parent.name != "recipes" or start.checkpoint is None or start.checkpoint.exists():
        return None
    path = recipe.parent.parent / "models" / f"{recipe.name}.yaml"
    if not path.is_file():
        return None
    log.get().info("%s is not there: planned for %s", start.checkpoint, path)
    return path


def _of_sampling(settings: Any, asked: Any, model: Path | None, sweep: bool) -> dict[str, Any]:
    from megatron_prism.core.config import PresetConfig
    from megatron_prism.core.load import load
    from megatron_prism.jobs import plan_sampling

    if sweep:
        raise InputError(
            Problem("--sweep", "asked of a job that only samples", "a config of train or rl", "try parallel.tp=... num_rows=... one by one")
        )
    return plan_sampling.run(settings, asked, None if model is None else load(model, PresetConfig).model)
