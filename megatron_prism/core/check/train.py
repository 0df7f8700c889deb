"""Checks between the values of a training config: pure functions that return every problem, before anything starts."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_prism.core.check import precision
from megatron_prism.core.check.bounds import check_bounds
from megatron_prism.core.check.gang import check_gang, check_model_on_gang, check_size, data_parallel_size
from megatron_prism.core.check.model import check_architecture
from megatron_prism.core.check.optimizer import check_moments
from megatron_prism.core.config import InitConfig, ModelConfig, RunConfig, TrainConfig, YarnRope
from megatron_prism.core.errors import Problem


def check_train(config: TrainConfig, world_size: int) -> list[Problem]:
    """Return the problems of a training config's values on `world_size` ranks, and between them."""
    return [
        *check_run(config, world_size),
        *([] if check_size(config, world_size) else _check_batch(config, world_size)),
        *_check_sequence(config),
        *check_course(config),
    ]


EXTENDS = {  # keys of init, by the field of the model that they change
    "max_position_embeddings": "max_position_embeddings",
    "rope_theta": "rotary_base",
    "yarn": "yarn",
    "window_size": "window_size",
}


def check_run(config: RunConfig, world_size: int) -> list[Problem]:
    """Return the problems of the values, and of where any run begins and on what gang."""
    return [
        *check_bounds(config),
        *check_origin(config),
        *check_gang(config, world_size),
        *_check_fp8_weights(config),
        *check_moments(config),
    ]


def check_course(config: RunConfig) -> list[Problem]:
    """Return the problems of any run's schedule, of its times, and of its guard."""
    return [*_check_schedule(config), *_check_times(config), *_check_guard(config)]


def check_origin(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of a run's start: from a checkpoint, or from scratch."""
    init = config.init
    if init.checkpoint is None:
        if config.model is None:
            fix = "set init.checkpoint, or model to train from scratch"
            yield Problem("model", "neither model nor init.checkpoint", "one of them", fix)
        if init.tokenizer is None:
            yield Problem("init.tokenizer", "no value", "the tokenizer's folder when training from scratch")
        for key, field in EXTENDS.items():
            if getattr(init, key) is not None:
                yield Problem(f"init.{key}", "a value without init.checkpoint", "null", f"set model.{field}")
    elif init.tokenizer is not None:
        fix = "a checkpoint brings its own tokenizer: remove it"
        yield Problem("init.tokenizer", "both tokenizer and init.checkpoint", "one of them", fix)


def check_extension(init: InitConfig, before: ModelConfig) -> Iterator[Problem]:
    """Yield why a checkpoint's model cannot be extended as `init` says. It can be extended, but not cut."""
    after = init.extend(before)
    if after.max_position_embeddings < before.max_position_embeddings:
        required = f"at least the {before.max_position_embeddings} of {init.checkpoint}"
        fix = "a shorter data.seq_length needs no other model"
        yield Problem("init.max_position_embeddings", str(after.max_position_embeddings), required, fix)
    if before.position_embedding != "rope":
        for key in ("rope_theta", "yarn"):
            if getattr(init, key) is not None:
                yield Problem(f"init.{key}", "a value", f"null: the model of {init.checkpoint} has no rotary positions")
    if init.yarn is not None:
        yield from _check_yarn(init.yarn, before, after)
    if init.window_size is not None and (before.window_size is None or init.window_size < before.window_size):
        required = "null: the model has no window" if before.window_size is None else f"at least the model's {before.window_size}"
        yield Problem("init.window_size", str(init.window_size), required)


def check_sampler(init: InitConfig, engine: str) -> Iterator[Problem]:
    """Yield a problem for each change of the model that vLLM's own copy would not have: it reads the checkpoint's config.json."""
    for key in ("rope_theta", "yarn", "window_size"):
        if engine == "vllm" and getattr(init, key) is not None:
            fix = "extend it by a run of `prism train`, and begin from its checkpoint"
            yield Problem(f"init.{key}", "a value under rollout.engine vllm", "null: vLLM reads the checkpoint's config.json", fix)


def _check_yarn(yarn: YarnRope, before: ModelConfig, after: ModelConfig) -> Iterator[Problem]:
    original, longest = yarn.original_max_position_embeddings, before.max_position_embeddings
    if before.rope_scaling is not None:
        yield Problem("init.yarn", "a value for a model with llama3's rope_scaling", "null: both scale the same frequencies")
    if original > longest:
        yield Problem("init.yarn.original_max_position_embeddings", str(original), f"at most the model's max_position_embeddings {longest}")
    if yarn.factor * original != after.max_position_embeddings:
        found = f"{yarn.factor:g} x original_max_position_embeddings {original}"
        required = f"their product to be init.max_position_embeddings {after.max_position_embeddings}: readers take either"
        yield Problem("init.yarn.factor", found, required)


def _check_fp8_weights(config: RunConfig) -> Iterator[Problem]:
    if config.fp8 is not None and config.fp8.param and config.init.checkpoint is not None:
        fix = "Megatron-Core's fp32 weights would begin at random: it takes them from before the checkpoint was loaded"
        yield Problem("fp8.param", "true with init.checkpoint", "false, or a run from scratch", fix)


def _check_batch(config: TrainConfig, world_size: int) -> Iterator[Problem]:
    grid, batch = config.parallel, config.batch
    if min(grid.tp, grid.pp, grid.cp, batch.global_size, batch.micro_size) < 1:
        return
    dp = data_parallel_size(config, world_size)
    if batch.global_size % (batch.micro_size * dp):
        yield Problem("batch.global_size", str(batch.global_size), f"a multiple of micro_size {batch.micro_size} x data parallel {dp}")
    microbatches = batch.global_size // (batch.micro_size * dp)
    if grid.vpp is not None and microbatches % grid.pp:
        yield Problem("batch.global_size", f"{microbatches} microbatches a step", f"a multiple of parallel.pp {grid.pp} under vpp")


def _check_sequence(config: TrainConfig) -> Iterator[Problem]:
    """Check that a sequence divides over cp (two chunks per rank), and under sequence_parallel each rank's part over tp."""
    grid, length = config.parallel, config.data.seq_length
    tp, chunks = grid.tp if grid.sequence_parallel else 1, 2 * grid.cp if grid.cp > 1 else 1
    if min(tp, length) >= 1 and length % (tp * chunks):
        parts = [f"parallel.tp {tp} under sequence_parallel"] * (tp > 1) + [f"2 x parallel.cp {grid.cp}"] * (chunks > 1)
        yield Problem("data.seq_length", str(length), f"a multiple of {' x '.join(parts)}")
    if grid.cp > 1 and config.data.document_mask:
        found, required = f"true with parallel.cp {grid.cp}", "false, or parallel.cp 1: documents are not split over ranks"
        yield Problem("data.document_mask", found, required, "turn it off, or use parallel.tp, pp and recompute in place of cp")
    steps = [change.step for change in config.data.changes]
    if steps != sorted(set(steps)) or any(step >= config.steps for step in steps):
        yield Problem("data.changes", f"changes at steps {steps}", f"steps that rise, between 1 and {config.steps - 1}")


def _check_schedule(config: RunConfig) -> Iterator[Problem]:
    schedule = config.schedule
    if schedule.warmup_steps > config.steps:
        yield Problem("schedule.warmup_steps", str(schedule.warmup_steps), f"at most steps {config.steps}")
    room = config.steps - schedule.warmup_steps
    if schedule.kind == "wsd" and (schedule.wsd_decay_steps is None or schedule.wsd_decay_steps > room):
        yield Problem("schedule.wsd_decay_steps", str(schedule.wsd_decay_steps), f"1 to {room} (steps less warm-up) under wsd")
    if schedule.kind != "wsd" and schedule.wsd_decay_steps is not None:
        yield Problem("schedule.wsd_decay_steps", f"a value with schedule.kind {schedule.kind}", "kind wsd", "remove it")


def _check_guard(config: RunConfig) -> Iterator[Problem]:
    """An interval longer than the run is let pass: a recipe is tried with few steps."""
    for key in ("on_nonfinite", "on_spike"):
        if getattr(config.guard, key) == "rewind" and config.save.interval == 0:
            fix = f"set save.interval, or guard.{key}: skip"
            yield Problem(f"guard.{key}", "rewind with save.interval 0", "a checkpoint to go back to: only the last step is saved", fix)


def _check_times(config: RunConfig) -> Iterator[Problem]:
    save_s, limits = config.save.timeout_s, config.limits
    if save_s >= limits.collective_timeout_s:
        fix = "else the other ranks give up first, and do not say that it was a save"
        yield Problem("save.timeout_s", str(save_s), f"below limits.collective_timeout_s {limits.collective_timeout_s}", fix)
    if limits.hang_timeout_s is not None and limits.hang_timeout_s < limits.collective_timeout_s:
        required = f"at least limits.collective_timeout_s {limits.collective_timeout_s}, or null"
        fix = "the process group's error says more: let it come first"
        yield Problem("limits.hang_timeout_s", str(limits.hang_timeout_s), required, fix)


def check_model(model: ModelConfig, config: TrainConfig) -> list[Problem]:
    """Return the problems between an architecture and the training config that builds it."""
    problems = check_model_on_gang(model, config)
    longest, length = model.max_position_embeddings, config.data.seq_length
    if length > longest:
        problems.append(Problem("data.seq_length", str(length), f"at most the model's max_position_embeddings {longest}"))
    where = "batch.micro_size x data.seq_length (tokens of a microbatch)"
    problems += precision.check_tokens(config, config.batch.micro_size * length, where)
    return [*problems, *check_architecture(model)]
