"""`prism plan`: what a run of `prism train` or `prism rl` (or in jobs/plan_sampling.py a job that only samples) will need, before any GPU is requested. It reads a config, and writes nothing.

Parameters are counted on Megatron-Core's own model, built without memory for each distinct rank. The rest is arithmetic (planning/).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from megatron_prism.checkpoint import folder
from megatron_prism.core.check.gang import data_parallel_size
from megatron_prism.core.check.train import check_extension
from megatron_prism.core.config import GangConfig, ModelConfig, ParallelConfig, Precision, RLConfig, RunConfig
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.families import registry
from megatron_prism.planning import layouts, policy, predict
from megatron_prism.planning.gpus import H100, Gpu
from megatron_prism.planning.layouts import Planned
from megatron_prism.planning.stage import Stage, letters_of, of_sizes

ON_TERMINAL = 20  # layouts of a sweep


@dataclass(frozen=True)
class Asked:
    """What a plan assumes. response_tokens: the mean of an RL run's responses; None: a quarter of rollout.max_tokens."""

    usd_per_gpu_hour: float = 0.0
    gpu: Gpu = H100
    response_tokens: float | None = None


Prediction = predict.Prediction | policy.Prediction


def run(config: Planned, asked: Asked) -> dict[str, Any]:
    """Return the plan of a run on the config's world_size, or on the fewest GPUs that its layout needs.

    A plan that does not fit is returned too: see `too_large`.
    Raises: InputError for an invalid config.
    """
    world_size = num_gpus(config)
    model = check(config, world_size)
    prediction, figures = _predict(built(model, config), model, config, world_size, asked)
    sizes = registry.parameters(model)
    return {
        "parameters": sum(sizes.values()),
        "trainable_parameters": of_sizes(sizes, "", False, False, config).trainable,
        "world_size": world_size,
        "layout": layout(config, world_size),
        "parameters_per_rank_max": max(stage.parameters for stage in prediction.stages),
        **figures,
    }


def _predict(stages: list[Stage], model: ModelConfig, config: Planned, world_size: int, asked: Asked) -> tuple[Prediction, dict[str, Any]]:
    """Return the prediction for a layout with these stages, and its figures."""
    if isinstance(config, RLConfig):
        found = policy.predict_rl(stages, model, config, world_size, asked.gpu, asked.response_tokens)
        return found, policy.figures(found, config, world_size, asked.usd_per_gpu_hour)
    prediction = predict.predict(stages, model, config, world_size, gpu=asked.gpu)
    return prediction, predict.figures(prediction, config, world_size, asked.usd_per_gpu_hour)


def num_gpus(gang: GangConfig) -> int:
    """Return the number of GPUs of a plan."""
    grid = gang.parallel
    return gang.world_size or max(grid.tp * grid.pp * grid.cp, 1)


def check(config: Planned, world_size: int) -> ModelConfig:
    """Check a config on `world_size` GPUs, and return its architecture.

    Raises: InputError with every problem.
    """
    raise_problems(layouts.problems(config, world_size))
    model = architecture(config)
    raise_problems([*layouts.model_problems(model, config), *_engine_problems(model, config, world_size)])
    without_gpu()
    from megatron_prism.models import trainable

    raise_problems(trainable.check(config.trainable, registry.parameters(model), model, config.parallel))
    return model


def _engine_problems(model: ModelConfig, config: Planned, world_size: int) -> list[Problem]:
    if not isinstance(config, RLConfig):
        return []
    from megatron_prism.generate import cached, engines

    grid = config.parallel
    return [
        *cached.unsupported(grid.vpp, grid.cp, config.fp8 is not None),
        *engines.check(config.rollout, model, world_size, config.parallel.tp, config.parallel.pp),
    ]


def architecture(config: RunConfig) -> ModelConfig:
    """Return the config's `model`, else the checkpoint's architecture. With `model` a plan needs no checkpoint."""
    model = config.model
    if model is None:
        assert config.init.checkpoint is not None  # check_train
        model = folder.read(config.init.checkpoint).model
    raise_problems(list(check_extension(config.init, model)))
    return config.init.extend(model)


def without_gpu() -> None:
    """Hide the machine's GPUs from this process. A plan builds the host's layers, which have the same names and sizes as the GPU's."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def built(model: ModelConfig, config: GangConfig) -> list[Stage]:
    """Return the pipeline's stages, counted on the models that its distinct ranks would build. The largest tensor-parallel rank counts."""
    parallel = _split(config.parallel)
    letters, stages = stage_letters(model, parallel), []
    for stage in range(parallel.pp):
        ranks = [_sizes_of_rank(model, parallel, config.precision, rank, stage) for rank in range(parallel.tp)]
        held = [of_sizes(sizes, letters[stage], stage == 0, stage == parallel.pp - 1, config) for sizes in ranks]
        stages.append(max(held, key=lambda one: one.parameters))
    return stages


def derived(model: ModelConfig, config: RunConfig) -> list[Stage]:
    """Return the same stages from one model built without a pipeline, so that a sweep builds one model for each tp."""
    from megatron_prism.models import shapes

    parallel = _split(config.parallel)
    whole = _sizes_of_rank(model, replace(parallel, pp=1, vpp=None), config.precision, 0, 0)
    letters, last = stage_letters(model, parallel), parallel.pp - 1
    parts = shapes.split(whole, model, parallel)
    return [of_sizes(sizes, letters[stage], stage == 0, stage == last, config) for stage, sizes in enumerate(parts)]


def stage_letters(model: ModelConfig, parallel: ParallelConfig) -> list[str]:
    """Return the letters of each pipeline rank's layers."""
    from megatron_prism.models.build import stages

    return [letters_of(model, sorted(layers)) for layers in stages(model, parallel)]


def _split(parallel: ParallelConfig) -> ParallelConfig:
    """Return only the settings that decide which parameters a rank holds."""
    return ParallelConfig(tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp, sequence_parallel=parallel.tp > 1)


@cache
def _sizes_of_rank(model: ModelConfig, parallel: ParallelConfig, precision: Precision, tp_rank: int, pp_rank: int) -> Mapping[str, int]:
    from megatron_prism.checkpoint import sharded
    from megatron_prism.models import shapes

    return shapes.sizes(model, GangConfig(parallel=parallel, precision=precision), tp_rank, pp_rank, sharded.weights)


def layout(config: Planned, world_size: int) -> dict[str, Any]:
    """Return a layout's keys for display."""
    grid, recompute = config.parallel, config.recompute
    keys = {"tp": grid.tp, "pp": grid.pp, "vpp": grid.vpp or 1, "cp": grid.cp, "dp": data_parallel_size(config, world_size)}
    recomputed = {"none": "none", "selective": ", ".join(recompute.modules), "full": f"{recompute.num_layers or 'all'} layers"}[
        recompute.granularity
    ]
    rows = {"num_rows": config.rollout.num_rows} if isinstance(config, RLConfig) else {}
    return {**keys, "micro_size": config.batch.micro_size, "recompute": recomputed, **rows}


SWEPT = (
    "tokens_per_s_per_gpu",
    "mfu_causal",
    "rollout_s",
    "log_probs_s",
    "training_s",
    "memory_gib_per_gpu_max",
    "hours",
    "gpu_hours",
    "usd",
)  # of a layout
SHARED = ("flops_per_token_causal", "flops_per_token_full", "prompt_tokens_assumed", "response_tokens_assumed")  # of all layouts


def sweep(config: Planned, world_size: int, asked: Asked) -> dict[str, Any]:
    """Return every valid layout on `world_size` GPUs that fits, fastest first.

    Raises: InputError where no layout is valid, or none fits.
    """
    config, gpu = replace(config, world_size=world_size), asked.gpu
    if config.model is None and config.init.checkpoint is None:
        raise_problems(layouts.problems(config, world_size))
    model = architecture(config)
    if next(layouts.valid(config, model, world_size), None) is None:  # the problem is not in the layout
        raise_problems([*layouts.problems(config, world_size), *layouts.model_problems(model, config)])
    without_gpu()
    ranked = fitting(config, model, world_size, asked)
    if not ranked:
        found = f"no valid layout of {world_size} GPUs fits in the {gpu.memory_gib} GiB of an {gpu.name.upper()}"
        raise InputError(Problem("parallel", found, "one that does", "take more GPUs (--gpus)"))
    entries = []
    for laid, values in ranked:
        said = {name: values[name] for name in SWEPT if name in values}
        entries.append({**layout(laid, world_size), **said, "overrides": layouts.changes(config, laid)})
    facts = {"world_size": world_size, **{name: ranked[0][1][name] for name in SHARED if name in ranked[0][1]}}
    return {**facts, "gpu": gpu.name, "memory_gib_available": gpu.memory_gib, "fits": True, "layouts": entries}


def fitting(config: Planned, model: ModelConfig, world_size: int, asked: Asked) -> list[tuple[Planned, dict[str, Any]]]:
    """Return the valid layouts that fit, with their figures, fastest first."""
    candidates = []
    for laid in layouts.valid(config, model, world_size):
        stages = derived(model, laid)
        if all(stage.trainable for stage in stages):
            prediction, values = _predict(stages, model, laid, world_size, asked)
            candidates += [(laid, values)] if prediction.fits else []
    return sorted(candidates, key=lambda pair: -round(pair[1]["tokens_per_s_per_gpu"]))


def too_large(config: Planned, plan: Mapping[str, Any], asked: Asked) -> Problem:
    """Return the problem of a plan that does not fit, with the nearest layout that fits: fewest keys changed, then fastest."""
    world_size = plan["world_size"]
    worst = max(plan["stages"], key=lambda stage: stage["total_gib"])
    near = sorted(fitting(config, architecture(config), world_size, asked), key=lambda pair: layouts.distance(config, pair[0]))
    fix = f"no layout of {world_size} GPUs fits: take more (--gpus)"
    if near:
        fix = f"the nearest that fits: {' '.join(layouts.changes(config, near[0][0]))}"
    return Problem(
        "parallel",
        f"{worst['total_gib']:.1f} GiB on pipeline stage {worst['stage']}",
        f"at most the {asked.gpu.memory_gib} GiB of an {asked.gpu.name.upper()}",
        fix,
    )


def show(plan: Mapping[str, Any]) -> None:
    """Print a plan or a sweep: tables on a terminal, else plain lines."""
    from rich.console import Console

    console, key = Console(soft_wrap=True, highlight=False, markup=False), "layouts" if "layouts" in plan else "stages"
    for name, value in plan.items():
        if name == "parts":
            for part, figures in value.items():
                console.print(f"{part}: {_plain(figures)}")
        elif name != key:
            console.print(f"{name}: {_plain(value)}")
    entries = [{name: _plain(value) for name, value in entry.items()} for entry in plan[key]]
    if not console.is_terminal:
        console.print(f"{key}:")
        for entry in entries:
            console.print("  " + "  ".join(f"{name} {value}" for name, value in entry.items()))
    elif key == "stages":  # one column per key
        console.print(_table([[name, *(entry[name] for entry in entries)] for name in entries[0]]))
    else:
        names = [name for name in entries[0] if name != "overrides"]  # the other columns say the same
        console.print(_table([names, *([entry[name] for name in names] for entry in entries[:ON_TERMINAL])]))
        console.print(f"{max(len(entries) - ON_TERMINAL, 0)} more: --json FILE has all, with the overrides of each")


def _table(rows: list[list[str]]) -> Any:
    from rich.table import Table

    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{name} {_plain(part)}" for name, part in value.items())
    if isinstance(value, list):
        return " ".join(map(_plain, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= value < 1e7 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
