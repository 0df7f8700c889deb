"""`prism study --dry-run`: the graph in order, what each stage is about to do, and what it needs, as far as `prism plan` can say before the inputs are there.

A stage is planned where its config gives a world_size: the figures are those of an H100 or H200, and say nothing of a toy on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from megatron_prism.core.check.landscape import evaluation
from megatron_prism.core.config import (
    EvaluateConfig,
    FilterConfig,
    GangConfig,
    LandscapeConfig,
    MergeConfig,
    ModelConfig,
    PrepareConfig,
    RLConfig,
    RunConfig,
    TrainConfig,
)
from megatron_prism.core.errors import PrismError, raise_problems
from megatron_prism.jobs import study_stages
from megatron_prism.jobs.plan import Asked
from megatron_prism.jobs.study import Study
from megatron_prism.jobs.study_stages import Stage, world_size
from megatron_prism.study import overview
from megatron_prism.study.graph import longest_path

SHOWN = ("hours", "gpu_hours", "usd", "memory_gib_per_gpu_max", "memory_gib_available", "fits")  # of a plan
GIB = 2**30
BYTES_PER_TOKEN, BYTES_PER_PARAMETER = 4, 2  # of a mixture, of a Hugging Face folder in bf16


def run(study: Study, asked: Asked) -> dict[str, Any]:
    """Return {"stages": {NAME: state, reason, job, ranks, tokens, hours, ...}} in order, and of those to run the totals and the longest path.

    It writes nothing. Raises: InputError where an output is there that no record is of.
    """
    raise_problems(study_stages.unknown_outputs(study.stages, study.wanted, study.records))
    states = _states(study)
    stages = {name: states[name] | _of_stage(stage) for name, stage in study.stages.items()}
    planned = [name for name, stage in study.stages.items() if _is_planned(stage)]
    if planned:  # a child process, since a plan hides the GPUs from its process
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            models = {name: model_of(_start(study.stages[name]), study.stages) for name in planned}
            asks = {name: pool.submit(_plan, study.stages[name].config, asked, models[name]) for name in planned}
            for name, answer in asks.items():
                stages[name] |= answer.result()
    for name, stage in study.stages.items():
        stages[name] |= _storage(stage, stages, study.stages)
    to_run = {name: stage for name, stage in stages.items() if stage["state"] in (overview.TO_RUN, overview.CHANGED)}
    seconds = {name: float(stage.get("hours", 0.0)) * 3600 for name, stage in to_run.items()}
    longest_s, path = longest_path([stage.task for stage in study.stages.values()], seconds)
    totals = {key: sum(stage.get(key) or 0.0 for stage in to_run.values()) for key in ("gpu_hours", "usd", "storage_gib")}
    return {
        "kind": "study plan",
        "name": study.config.name,
        "stages": stages,
        "num_stages": len(stages),
        "num_to_run": len(to_run),
        "gpu": asked.gpu.name,
        "usd_per_gpu_hour_assumed": asked.usd_per_gpu_hour,
        **totals,
        "gpus_max": max((stage["ranks"] for stage in to_run.values() if "hours" in stage), default=0),
        "longest_path_hours": longest_s / 3600,
        "longest_path": [name for name in path if seconds.get(name)],
    }


def _states(study: Study) -> dict[str, dict[str, str]]:
    """Return {NAME: {"state", "reason"}} as `prism study` will find them: of what is not asked for too, and of what that blocks."""
    states: dict[str, dict[str, str]] = {}
    for name, stage in study.stages.items():
        states[name] = {"state": study.states[name], "reason": study.reasons[name]}
        missing = [before for before in stage.task.after if states[before]["state"] in (overview.BLOCKED, overview.LEFT_OUT)]
        if study.states[name] in overview.ENDED:
            continue
        if name not in study.wanted:
            states[name] = {"state": overview.LEFT_OUT, "reason": ""}
        elif missing:
            states[name] = {"state": overview.BLOCKED, "reason": f"needs {', '.join(missing)}"}
    return states


def _of_stage(stage: Stage) -> dict[str, Any]:
    facts: dict[str, Any] = {"job": stage.job, "after": list(stage.task.after)}
    if stage.output is not None:
        facts["output"] = str(stage.output)
    config = stage.config
    if isinstance(config, GangConfig):
        facts["ranks"] = world_size(stage)
    if isinstance(config, TrainConfig):
        facts["tokens"] = config.steps * config.batch.global_size * config.data.seq_length
    if isinstance(config, RLConfig):
        facts["responses"] = config.steps * config.rollout.num_prompts * config.rollout.num_samples
    if isinstance(config, PrepareConfig) and config.tokens is not None:
        facts["tokens"] = config.tokens
    return facts


def _is_planned(stage: Stage) -> bool:
    """Say whether a stage's size is its config's: a gang of GPUs, not the processes of a shell's --nproc."""
    config = stage.config
    if not isinstance(config, RunConfig | FilterConfig | EvaluateConfig | LandscapeConfig) or config.world_size is None:
        return False
    assert stage.call is not None
    return stage.call.arguments.get("nproc") is None


def _start(stage: Stage) -> Path | None:
    """Return the model that a stage starts from or samples; None where its config has the architecture."""
    config = stage.config
    if isinstance(config, EvaluateConfig):
        return config.model.checkpoint or config.model.hf
    if isinstance(config, LandscapeConfig):
        return config.mid_model.checkpoint or config.mid_model.hf
    return None if isinstance(config, RunConfig) and config.model is not None else config.init.checkpoint


def _plan(config: Any, asked: Asked, model: ModelConfig | None) -> dict[str, Any]:
    """Return the figures of a stage's plan, or why there are none."""
    from megatron_prism.jobs import plan, plan_sampling

    try:
        if isinstance(config, RunConfig):
            config = config if model is None else replace(config, model=model)
            figures = plan.run(config, asked)
        elif isinstance(config, LandscapeConfig):
            figures = of_landscape(config, plan_sampling.run(evaluation(config), asked, model))
        else:
            figures = plan_sampling.run(config, asked, model)
    except PrismError as error:
        return {"not_planned": str(error).splitlines()[0]}
    return {key: figures[key] for key in (*SHOWN, "parameters", "checkpoint_gib") if key in figures}


def of_landscape(config: LandscapeConfig, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a landscape: those of one point's evaluation, at every point."""
    from megatron_prism.analysis.landscape import points

    num_points = len(points(config.num_steps_to_mid, config.num_steps_to_rl, config.plane_size, config.keep_largest, config.num_nulls))
    return {**figures, **{key: figures[key] * num_points for key in ("hours", "gpu_hours", "usd")}}


def model_of(path: Path | None, stages: Mapping[str, Stage]) -> ModelConfig | None:
    """Return the architecture of what a path will hold, by the stage that makes it; of what is there already, by its files. None: unknown."""
    if path is None:
        return None
    place = path.absolute()
    maker = next(
        (stage for stage in stages.values() if stage.output is not None and stage.output.absolute() in (place, *place.parents)), None
    )
    if maker is None:
        return _at_rest(path)
    config, arguments = maker.config, maker.call.arguments if maker.call else {}
    if isinstance(config, TrainConfig | RLConfig):
        before = config.model or model_of(config.init.checkpoint, stages)
        return None if before is None else config.init.extend(before)
    if isinstance(config, MergeConfig):
        return model_of(config.models[0].path, stages)
    source = arguments.get("ckpt") or (arguments.get("hf") if maker.job == "convert import" else None)
    return model_of(source, stages) or _expected(path, stages)


def _expected(path: Path, stages: Mapping[str, Stage]) -> ModelConfig | None:
    """Return the architecture that a run which begins from a path wants of it: before the base model is there. None: no run says one."""
    runs = (stage.config for stage in stages.values() if isinstance(stage.config, RunConfig))
    return next((run.model for run in runs if run.model is not None and run.init.checkpoint == path), None)


def _at_rest(path: Path) -> ModelConfig | None:
    from megatron_prism.checkpoint import folder
    from megatron_prism.checkpoint.plan import plan_import

    try:
        return plan_import(path).model if (path / "config.json").is_file() else folder.read(path).model
    except (PrismError, OSError):
        return None


def _storage(stage: Stage, plans: Mapping[str, Mapping[str, Any]], stages: Mapping[str, Stage]) -> dict[str, Any]:
    """Return {"storage_gib"}: the checkpoints that a run keeps, a mixture's tokens, a model's folder in bf16. Nothing where it is unknown."""
    config, planned = stage.config, plans[stage.name]
    if isinstance(config, TrainConfig | RLConfig) and "checkpoint_gib" in planned:
        return {"storage_gib": num_kept(config) * planned["checkpoint_gib"]}
    if isinstance(config, PrepareConfig) and config.tokens is not None:
        return {"storage_gib": config.tokens * BYTES_PER_TOKEN / GIB}
    if stage.job in ("merge", "convert export", "convert import") and (model := model_of(stage.output, stages)) is not None:
        from megatron_prism.families import registry

        return {"storage_gib": registry.num_parameters(model) * BYTES_PER_PARAMETER / GIB}
    return {}


def num_kept(config: TrainConfig | RLConfig) -> int:
    """Return how many checkpoints a run keeps when it has ended: its newest ones, and every multiple of keep_every."""
    every = config.save.interval
    saved = {*range(every, config.steps + 1, every), config.steps} if every else {config.steps}
    newest = sorted(saved)[-config.save.keep_last :]
    return len({*newest, *(step for step in saved if config.save.keep_every and step % config.save.keep_every == 0)})


def lines(plan: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each stage in order, and one for all."""
    stages: Mapping[str, Mapping[str, Any]] = plan["stages"]
    width, jobs = max(map(len, stages)), max(len(stage["job"]) for stage in stages.values())
    for name, stage in stages.items():
        told = f": {stage['reason']}" if stage["reason"] and stage["reason"] != "not run yet" else ""
        yield f"{name:<{width}}  {stage['state']:<8}  {stage['job']:<{jobs}}  {'  '.join(_needs(stage))}{told}".rstrip()
    yield f"{plan['name']}: {plan['num_stages']} stages, {plan['num_to_run']} to run"
    if plan["gpu_hours"]:
        price = plan["usd_per_gpu_hour_assumed"]
        yield (
            f"planned on {plan['gpu'].upper()}s: {plan['gpu_hours']:,.0f} GPU-hours, {plan['usd']:,.0f} USD at {price:g} a GPU-hour, "
            f"{plan['storage_gib']:,.0f} GiB, at most {plan['gpus_max']} GPUs a stage"
        )
        yield f"longest path: {plan['longest_path_hours']:,.1f} hours: {' -> '.join(plan['longest_path'])}"


def _needs(stage: Mapping[str, Any]) -> Iterator[str]:
    for key, words in (("ranks", "{:,} ranks"), ("tokens", "{:,} tokens"), ("responses", "{:,} responses"), ("hours", "{:,.2f} h")):
        if key in stage:
            yield words.format(stage[key])
    for key, words in (("gpu_hours", "{:,.1f} GPU-h"), ("usd", "{:,.0f} USD"), ("storage_gib", "{:,.2f} GiB")):
        if key in stage:
            yield words.format(stage[key])
    if not stage.get("fits", True):
        yield f"DOES NOT FIT: {stage['memory_gib_per_gpu_max']:.1f} of {stage['memory_gib_available']} GiB"
    if "not_planned" in stage:
        yield f"not planned: {stage['not_planned']}"
