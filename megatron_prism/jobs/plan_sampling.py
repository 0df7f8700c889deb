"""`prism plan` of `prism rl filter` and `prism evaluate`: memory and time of jobs that only sample. What lm-eval asks is not predicted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_prism.checkpoint import folder
from megatron_prism.checkpoint.plan import plan_import
from megatron_prism.core.check.evaluate import kind_of
from megatron_prism.core.check.gang import check_model_on_gang, data_parallel_size
from megatron_prism.core.check.model import check_architecture
from megatron_prism.core.config import EvaluateConfig, FilterConfig, ModelConfig, RulerConfig, SamplingConfig, TaskConfig
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.data import prompts
from megatron_prism.eval import tasks
from megatron_prism.eval.ruler import task as ruler_task
from megatron_prism.eval.ruler.make import PROTOCOL, SUB_TASKS
from megatron_prism.eval.sets import published
from megatron_prism.families import registry
from megatron_prism.generate import cached, engines
from megatron_prism.jobs.gangs import GANGS
from megatron_prism.jobs.plan import Asked, built, num_gpus, without_gpu
from megatron_prism.planning import sampling
from megatron_prism.planning.rollout import SHARE, Lengths, Load
from megatron_prism.planning.sampling import Part

Sampling = FilterConfig | EvaluateConfig
PROMPT_TOKENS, MAX_PROMPT_TOKENS = 256, 2048  # of a question in the mean, and the longest: assumptions


def run(config: Sampling, asked: Asked, model: ModelConfig | None = None) -> dict[str, Any]:
    """Return the plan of a job on the config's world_size, or on the fewest GPUs that its layout needs.

    model: the architecture, where the checkpoint is not there yet.
    Raises: InputError for an invalid config, and for a job of which nothing is sampled.
    """
    world_size = num_gpus(config)
    raise_problems(GANGS[type(config)].check(config, world_size))
    model = model or _architecture(config)
    grid = config.parallel
    parts = dict(_filtered(config, asked) if isinstance(config, FilterConfig) else _evaluated(config, model, world_size, asked))
    loads, section = [part.load for part in parts.values()], "rollout." if isinstance(config, FilterConfig) else ""
    raise_problems(
        [
            *check_model_on_gang(model, config),
            *check_architecture(model),
            *cached.unsupported(grid.vpp, grid.cp, config.fp8 is not None),
            *(problem for load in loads[:1] for problem in engines.check(load.sampling, model, world_size, grid.tp, grid.pp, section)),
            *([] if parts else [Problem("tasks", "none whose responses are sampled", "a published set, a file, or ruler")]),
        ]
    )
    without_gpu()
    prediction = sampling.predict_sampling(built(model, config), model, parts, world_size, asked.gpu)
    return {
        "parameters": registry.num_parameters(model),
        "world_size": world_size,
        "layout": {"tp": grid.tp, "pp": grid.pp, "dp": data_parallel_size(config, world_size)},
        **sampling.figures(prediction, parts, world_size, asked.usd_per_gpu_hour),
        "not_planned": []
        if isinstance(config, FilterConfig)
        else [name for name in config.tasks if name not in {_task(part) for part in parts}],
    }


def _task(part: str) -> str:
    return part.partition("/")[0]


def _architecture(config: Sampling) -> ModelConfig:
    if isinstance(config, FilterConfig):
        checkpoint: Path | None = config.init.checkpoint
    else:
        checkpoint = config.model.checkpoint
        if config.model.hf is not None:
            return plan_import(config.model.hf).model
        if checkpoint is None:
            raise InputError(Problem("model.endpoint", "a model that is served elsewhere", "one of ours", "its server has its own plan"))
    assert checkpoint is not None  # check_filter
    if not checkpoint.exists():
        fix = "where it is not made yet, name its architecture: --model configs/models/NAME.yaml"
        raise InputError(Problem(str(checkpoint), "no such folder", "a checkpoint, or a run", fix))
    return folder.read(checkpoint).model


def _filtered(config: FilterConfig, asked: Asked) -> Iterator[tuple[str, Part]]:
    num, most = len(prompts.read(config.prompts)), config.rollout.max_tokens
    load = Load(config, config.rollout, min(num, config.shard_prompts), MAX_PROMPT_TOKENS + most)
    yield "prompts", Part(load, num / load.num_prompts, num * config.rollout.num_samples, _lengths(most, asked))


def _evaluated(config: EvaluateConfig, model: ModelConfig, world_size: int, asked: Asked) -> Iterator[tuple[str, Part]]:
    """Yield the part of each task, and of each length of RULER. Every response is a request of its own."""
    context = model.max_position_embeddings
    for name, task in config.tasks.items():
        kind = kind_of(name, task)
        if kind == "ruler":
            wanted = task.ruler or RulerConfig()
            most = max(sub_task.max_tokens for sub_task in SUB_TASKS.values())
            required = f"over {most} (a response), at most {context} (the model's context)"
            unfit = [length for length in wanted.lengths if not most < length <= context]
            raise_problems([Problem(f"tasks.{name}.ruler.lengths", str(length), required) for length in unfit])
            num = ruler_task.num_questions(task) * len(ruler_task.sub_tasks(wanted)) * tasks.protocol_of(task, PROTOCOL).num_samples
            for length in wanted.lengths:
                assumed = Lengths(length - most, most, length - most, most)
                yield f"{name}/{length}", _part(config, num, assumed)
        elif kind == "questions":
            num, most = _size(name, task)
            yield name, _part(config, num, _lengths(most, asked, context))


def _size(name: str, task: TaskConfig) -> tuple[int, int]:
    """Return the responses of a task and the most tokens of one: of its file where that is there, else of the set as it is published."""
    set_name = task.set or name
    if set_name in published.SETS and (task.path is None or not task.path.is_file()):
        protocol = tasks.protocol_of(task, published.SETS[set_name].protocol)
        num = min(published.SETS[set_name].num_questions, task.limit or published.SETS[set_name].num_questions)
    else:
        read = tasks.read(name, task)
        protocol, num = read.protocol, len(read.questions)
    return num * protocol.num_samples, protocol.max_tokens


def _lengths(most: int, asked: Asked, context: int | None = None) -> Lengths:
    """Return the assumed lengths. context: of the model, which a prompt and its response share; a small one halves."""
    longest = MAX_PROMPT_TOKENS if context is None else min(MAX_PROMPT_TOKENS, context // 2)
    most = most if context is None else min(most, context - longest)
    response = min(most * SHARE if asked.response_tokens is None else asked.response_tokens, most)
    return Lengths(min(PROMPT_TOKENS, longest), response, longest, most)


def _part(config: EvaluateConfig, num: int, assumed: Lengths) -> Part:
    room = assumed.max_prompt + assumed.max_response
    rows = num_rows(config, room)
    how = SamplingConfig(
        engine=config.engine, mcore=config.mcore, vllm=config.vllm, num_samples=1, max_tokens=assumed.max_response, num_rows=rows
    )
    load = Load(config, how, max(1, min(num, config.shard_responses)), room)
    return Part(load, num / load.num_prompts, num, assumed)


def num_rows(config: EvaluateConfig, tokens: int) -> int:
    """Return the rows of a replica that decode together where a prompt and its response have this room, as eval/sample.py has them."""
    return config.num_rows if config.cache_tokens is None else max(1, min(config.num_rows, config.cache_tokens // tokens))
