"""What must hold between the values of a training config: pure functions that return every problem, before anything starts."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_prism.core.check import precision
from megatron_prism.core.config import ModelConfig, ParallelConfig, RecomputeConfig, TrainConfig
from megatron_prism.core.errors import Problem

VOCAB_MULTIPLE = 128  # rows of a vocabulary shard, as in Megatron-LM


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Return the vocabulary rounded up to a multiple of 128 a tensor-parallel rank."""
    multiple = VOCAB_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


def data_parallel_size(config: TrainConfig, world_size: int) -> int:
    """Return the ranks left for data parallelism once tp, pp and cp are taken."""
    return world_size // (config.parallel.tp * config.parallel.pp * config.parallel.cp)


def check_train(config: TrainConfig, world_size: int) -> list[Problem]:
    """Return what is wrong between the keys of a training config on `world_size` ranks."""
    return [
        *check_origin(config),
        *_check_numbers(config),
        *_check_grid(config, world_size),
        *_check_schedule(config),
        *precision.check_keys(config),
    ]


def check_origin(config: TrainConfig) -> Iterator[Problem]:
    if config.init.checkpoint is None:
        if config.model is None:
            yield Problem(
                "model", "neither model nor init.checkpoint", "one of them", "set init.checkpoint, or model to train from scratch"
            )
        if config.init.tokenizer is None:
            yield Problem("init.tokenizer", "no value", "the tokenizer's folder when training from scratch")
        if config.init.max_position_embeddings is not None:
            yield Problem("init.max_position_embeddings", "a value without init.checkpoint", "null", "set model.max_position_embeddings")
    else:
        if config.init.tokenizer is not None:
            yield Problem(
                "init.tokenizer", "both tokenizer and init.checkpoint", "one of them", "a checkpoint brings its own tokenizer: remove it"
            )


def _check_numbers(config: TrainConfig) -> Iterator[Problem]:
    positive: dict[str, float] = {
        "steps": config.steps,
        "data.seq_length": config.data.seq_length,
        "batch.global_size": config.batch.global_size,
        "batch.micro_size": config.batch.micro_size,
        "parallel.tp": config.parallel.tp,
        "parallel.pp": config.parallel.pp,
        "parallel.cp": config.parallel.cp,
        "log.interval": config.log.interval,
        "save.keep_last": config.save.keep_last,
        "validation.sequences": config.validation.sequences,
        "guard.spike_window": config.guard.spike_window,
    }
    for key, value in positive.items():
        if value < 1:
            yield Problem(key, str(value), "at least 1")
    not_negative: dict[str, float] = {
        "data.num_workers": config.data.num_workers,
        "save.interval": config.save.interval,
        "save.keep_every": config.save.keep_every,
        "guard.max_events": config.guard.max_events,
        "validation.interval": config.validation.interval,
        "optimizer.lr": config.optimizer.lr,
        "optimizer.weight_decay": config.optimizer.weight_decay,
        "optimizer.clip_grad": config.optimizer.clip_grad,
        "schedule.warmup_steps": config.schedule.warmup_steps,
    }
    for key, value in not_negative.items():
        if not 0 <= value < math.inf:  # also catches nan
            yield Problem(key, str(value), "0 or more")
    if not 0 <= config.seed < 2**32:
        yield Problem("seed", str(config.seed), "0 to 2**32 - 1", "numpy takes no other")
    steps = [change.step for change in config.data.changes]
    if steps != sorted(set(steps)) or not all(0 < step < config.steps for step in steps):
        yield Problem("data.changes", f"changes at steps {steps}", f"steps that rise, between 1 and {config.steps - 1}")
    if config.log.peak_tflops is not None and not config.log.peak_tflops > 0:
        yield Problem("log.peak_tflops", str(config.log.peak_tflops), "more than 0, or null")
    yield from _check_times(config)
    for key, value in {"optimizer.beta1": config.optimizer.beta1, "optimizer.beta2": config.optimizer.beta2}.items():
        if not 0 <= value < 1:
            yield Problem(key, str(value), "at least 0 and below 1")
    if not config.optimizer.eps > 0:
        yield Problem("optimizer.eps", str(config.optimizer.eps), "more than 0")


def _check_times(config: TrainConfig) -> Iterator[Problem]:
    limits = config.limits
    above_zero = {
        "save.timeout_s": config.save.timeout_s,
        "limits.collective_timeout_s": limits.collective_timeout_s,
        "limits.hang_timeout_s": limits.hang_timeout_s,
        "limits.wall_clock_s": limits.wall_clock_s,
        "guard.spike_deviations": config.guard.spike_deviations,
    }
    for key, value in above_zero.items():
        if value is not None and not 0 < value < math.inf:
            yield Problem(key, str(value), "a number above 0")
    if config.save.timeout_s >= limits.collective_timeout_s:
        fix = "else the other ranks give up first, and do not say that it was a save"
        yield Problem("save.timeout_s", str(config.save.timeout_s), f"below limits.collective_timeout_s {limits.collective_timeout_s}", fix)
    if limits.hang_timeout_s is not None and limits.hang_timeout_s < limits.collective_timeout_s:
        fix = "the process group's error says more: let it come first"
        yield Problem(
            "limits.hang_timeout_s",
            str(limits.hang_timeout_s),
            f"at least limits.collective_timeout_s {limits.collective_timeout_s}, or null",
            fix,
        )


def _check_grid(config: TrainConfig, world_size: int) -> Iterator[Problem]:
    grid, batch = config.parallel, config.batch
    if config.world_size is not None and config.world_size != world_size:
        fix = f"start {config.world_size} (prism submit, torchrun, --nproc), or set world_size={world_size}"
        yield Problem("world_size", f"{config.world_size}, and {world_size} processes", "as many processes as the run is laid out for", fix)
        return
    ranks = grid.tp * grid.pp * grid.cp
    if min(grid.tp, grid.pp, grid.cp, batch.global_size, batch.micro_size) < 1:
        return
    if world_size % ranks:
        yield Problem(
            "parallel",
            f"tp {grid.tp} x pp {grid.pp} x cp {grid.cp} = {ranks}",
            f"a divisor of the world size {world_size}",
            f"start {ranks} processes (or a multiple), or change parallel.tp, pp, cp",
        )
        return
    dp = data_parallel_size(config, world_size)
    if batch.global_size % (batch.micro_size * dp):
        yield Problem("batch.global_size", str(batch.global_size), f"a multiple of micro_size {batch.micro_size} x data parallel {dp}")
    microbatches = batch.global_size // (batch.micro_size * dp)
    if grid.sequence_parallel and grid.tp == 1:
        yield Problem("parallel.sequence_parallel", "true with parallel.tp 1", "tp above 1", "remove it")
    yield from _check_context(config)
    if grid.overlap_param_gather and not (grid.distributed_optimizer and grid.overlap_grad_reduce):
        yield Problem("parallel.overlap_param_gather", "true", "distributed_optimizer and overlap_grad_reduce true too")
    if grid.vpp is not None:
        if grid.vpp < 2:
            yield Problem("parallel.vpp", str(grid.vpp), "2 or more model chunks a pipeline rank", "remove it for plain 1F1B")
        if grid.pp < 2:
            yield Problem("parallel.vpp", f"{grid.vpp} with parallel.pp {grid.pp}", "pp above 1", "remove it")
        elif microbatches % grid.pp:
            yield Problem("batch.global_size", f"{microbatches} microbatches a step", f"a multiple of parallel.pp {grid.pp} under vpp")
    recompute = config.recompute
    if recompute.num_layers is not None and (recompute.granularity != "full" or recompute.num_layers < 1):
        yield Problem(
            "recompute.num_layers",
            f"{recompute.num_layers} with granularity {recompute.granularity}",
            "at least 1 with granularity full, or null",
        )
    if not recompute.modules or (recompute.modules != RecomputeConfig().modules and recompute.granularity != "selective"):
        yield Problem(
            "recompute.modules",
            f"{list(recompute.modules)} with granularity {recompute.granularity}",
            "at least one, with granularity selective",
        )


def _check_context(config: TrainConfig) -> Iterator[Problem]:
    """A sequence's tokens are split over cp (two chunks a rank), and under sequence_parallel each rank's over tp again."""
    grid, length = config.parallel, config.data.seq_length
    tp, chunks = grid.tp if grid.sequence_parallel else 1, 2 * grid.cp if grid.cp > 1 else 1
    if length % (tp * chunks):
        parts = [f"parallel.tp {tp} under sequence_parallel"] * (tp > 1) + [f"2 x parallel.cp {grid.cp}"] * (chunks > 1)
        yield Problem("data.seq_length", str(length), f"a multiple of {' x '.join(parts)}")
    if grid.cp > 1 and config.data.document_mask:
        fix = "turn it off, or use parallel.tp, pp and recompute in place of cp"
        yield Problem(
            "data.document_mask", f"true with parallel.cp {grid.cp}", "false, or parallel.cp 1: documents are not split over ranks", fix
        )
    if (grid.cp_comm_type == "a2a+p2p") != (grid.cp_a2a_size is not None):
        yield Problem(
            "parallel.cp_a2a_size", f"{grid.cp_a2a_size} with cp_comm_type {grid.cp_comm_type}", "a number with a2a+p2p, else null"
        )
    elif grid.cp_a2a_size is not None and (grid.cp_a2a_size < 1 or grid.cp % grid.cp_a2a_size):
        yield Problem("parallel.cp_a2a_size", str(grid.cp_a2a_size), f"a divisor of parallel.cp {grid.cp}")


def _check_schedule(config: TrainConfig) -> Iterator[Problem]:
    schedule = config.schedule
    if schedule.warmup_steps > config.steps:
        yield Problem("schedule.warmup_steps", str(schedule.warmup_steps), f"at most steps {config.steps}")
    if not 0 <= schedule.final_factor <= 1:
        yield Problem("schedule.final_factor", str(schedule.final_factor), "between 0 and 1")
    if schedule.kind == "wsd":
        room = config.steps - schedule.warmup_steps
        if schedule.wsd_decay_steps is None or not 0 < schedule.wsd_decay_steps <= room:
            yield Problem("schedule.wsd_decay_steps", str(schedule.wsd_decay_steps), f"1 to {room} (steps less warm-up) under wsd")
    elif schedule.wsd_decay_steps is not None:
        yield Problem("schedule.wsd_decay_steps", f"a value with schedule.kind {schedule.kind}", "kind wsd", "remove it")


def check_model(model: ModelConfig, config: TrainConfig) -> list[Problem]:
    """Return what is wrong between an architecture and the training config that builds it."""
    grid = config.parallel
    problems = check_split(model, grid.tp, grid.pp * (grid.vpp or 1), "parallel.tp", "parallel.pp")
    problems += _check_context_of(model, grid)
    if model.layer_pattern is not None and grid.vpp is not None:
        problems.append(Problem("parallel.vpp", str(grid.vpp), "null", "Megatron-Core 0.16 cannot interleave a hybrid's pipeline"))
    if model.layer_pattern is not None and config.recompute.granularity == "full":
        fix = "Megatron-Core 0.16 does not recompute a hybrid's layers, and says nothing; use selective with recompute.modules=[mlp], or more parallel.pp"
        problems.append(Problem("recompute.granularity", "full", "none or selective for a hybrid", fix))
    if config.data.seq_length > model.max_position_embeddings:
        problems.append(
            Problem(
                "data.seq_length",
                str(config.data.seq_length),
                f"at most the model's max_position_embeddings {model.max_position_embeddings}",
            )
        )
    return [*problems, *precision.check_sizes(model, config), *check_architecture(model)]


def _check_context_of(model: ModelConfig, grid: ParallelConfig) -> Iterator[Problem]:
    """What Transformer Engine's attention and Megatron-Core's Mamba mixer ask of a model under context parallelism."""
    if min(grid.tp, grid.cp) < 1 or grid.cp == 1:
        return
    if model.window_size is not None and grid.cp_comm_type not in ("all_gather", "a2a"):
        yield Problem("parallel.cp_comm_type", grid.cp_comm_type, f"all_gather or a2a, for a model with a window ({model.window_size})")
    split = grid.tp * (grid.cp_a2a_size or grid.cp)  # over so many ranks a2a splits heads
    for name in ("num_attention_heads", "num_query_groups") if "a2a" in grid.cp_comm_type else ():
        if getattr(model, name) % split:
            where, fix = f"parallel.cp_comm_type ({name} {getattr(model, name)})", "take p2p or all_gather"
            yield Problem(where, grid.cp_comm_type, f"{name} a multiple of {split}", fix)
    if model.mamba is not None:
        each, groups = model.mamba.num_heads // grid.tp, model.mamba.num_groups // grid.tp
        if each % grid.cp or (groups and groups % grid.cp and grid.cp % groups):
            found, required = (
                f"cp {grid.cp}",
                f"a divisor of the {each} Mamba heads of a tp rank, and of their {groups} groups a divisor or a multiple",
            )
            yield Problem("parallel.cp", found, required, "Megatron-Core splits a Mamba layer's heads over cp")


def check_split(model: ModelConfig, tp: int, num_stages: int, tp_key: str, pp_key: str) -> list[Problem]:
    """Return what keeps an architecture from being split over `tp` ranks and `num_stages` pipeline stages."""
    sizes = {name: getattr(model, name) for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size")}
    if model.mamba is not None:
        sizes |= {"mamba.num_heads": model.mamba.num_heads, "mamba.num_groups": model.mamba.num_groups}
    problems = []
    for name, value in sizes.items():
        if tp >= 1 and value % tp:
            alone = "all its Mamba heads share one group, which cannot be split: use pipeline or data parallelism instead"
            problems.append(
                Problem(
                    f"{tp_key} ({name} {value})",
                    str(tp),
                    f"a divisor of {name} {value}",
                    alone if name == "mamba.num_groups" and value == 1 else "",
                )
            )
    if model.num_layers < num_stages:
        problems.append(Problem(pp_key, f"{num_stages} stages", f"at most num_layers {model.num_layers}"))
    return problems


def check_architecture(model: ModelConfig, prefix: str = "model.") -> list[Problem]:
    """Return what is wrong within an architecture; `prefix` stands before each key."""
    problems = []
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "vocab_size")
    for name in sizes:
        if not 1 <= getattr(model, name) < 2**31:
            problems.append(Problem(f"{prefix}{name}", str(getattr(model, name)), "at least 1, and below 2**31"))
    if not problems and model.num_attention_heads % model.num_query_groups:
        problems.append(
            Problem(
                f"{prefix}num_query_groups", str(model.num_query_groups), f"a divisor of num_attention_heads {model.num_attention_heads}"
            )
        )
    if model.window_size is not None and model.window_size < 1:
        problems.append(Problem(f"{prefix}window_size", str(model.window_size), "at least 1, or null"))
    for name in ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"):
        value = getattr(model, name)
        if value is not None and not (math.isfinite(value) and value):
            problems.append(Problem(f"{prefix}{name}", str(value), "a number other than 0"))
    problems += _check_hybrid(model, prefix)
    scaling = model.rope_scaling
    positive: dict[str, float] = {"norm_epsilon": model.norm_epsilon, "rotary_base": model.rotary_base}
    if scaling:
        positive["rope_scaling.factor"] = scaling.factor
    for name, value in positive.items():
        if not 0 < value < math.inf:  # also catches nan
            problems.append(Problem(f"{prefix}{name}", str(value), "a number above 0"))
    if not 0 <= model.init_method_std < math.inf:
        problems.append(Problem(f"{prefix}init_method_std", str(model.init_method_std), "0 or more"))
    if scaling and (scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings) != (1.0, 4.0, 8192):
        problems.append(Problem(f"{prefix}rope_scaling", str(scaling), "low 1, high 4, original 8192: Megatron-Core fixes these three"))
    return problems


def _check_hybrid(model: ModelConfig, prefix: str) -> Iterator[Problem]:
    if (model.layer_pattern is None) != (model.mamba is None):
        found = "a layer_pattern without mamba" if model.mamba is None else "mamba without a layer_pattern"
        yield Problem(f"{prefix}mamba", found, "both, for a hybrid, or neither")
    if model.layer_pattern is not None:
        if set(model.layer_pattern) - set("M*-") or len(model.layer_pattern) != model.num_layers:
            yield Problem(
                f"{prefix}layer_pattern",
                repr(model.layer_pattern),
                f"num_layers {model.num_layers} letters M (Mamba), * (attention) or - (MLP)",
            )
        if model.norm_epsilon != 1e-5:
            yield Problem(f"{prefix}norm_epsilon", str(model.norm_epsilon), "1e-5 for a hybrid: Megatron-Core fixes it in its Mamba mixer")
        if model.rope_scaling is not None or model.window_size is not None:
            yield Problem(f"{prefix}rope_scaling, window_size", f"{model.rope_scaling}, {model.window_size}", "null for a hybrid")
    if model.mamba is not None:
        sizes = vars(model.mamba)
        if min(sizes.values()) < 1:
            yield Problem(f"{prefix}mamba", str(sizes), "at least 1 each")
        elif model.mamba.num_heads % model.mamba.num_groups:
            yield Problem(f"{prefix}mamba.num_groups", str(model.mamba.num_groups), f"a divisor of mamba.num_heads {model.mamba.num_heads}")
