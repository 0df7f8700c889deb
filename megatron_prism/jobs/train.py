"""`prism train`: resolve the config, join the gang, build the model, fit.

Input: a checkpoint, a model from scratch, or the run's own last checkpoint (checkpoint/start.py), and a prepared mixture.
Output: a run folder (checkpoint/run_folder.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_prism.checkpoint import folder, frozen, run_folder, saving, sharded, start
from megatron_prism.checkpoint.start import Start
from megatron_prism.core import log
from megatron_prism.core.check.gang import data_parallel_size
from megatron_prism.core.check.optimizer import check_adam
from megatron_prism.core.check.precision import check_machine, check_variables
from megatron_prism.core.check.train import check_model, check_train
from megatron_prism.core.config import RLConfig, RunConfig, TrainConfig
from megatron_prism.core.errors import raise_problems
from megatron_prism.data import loader, segments
from megatron_prism.data.segments import Segment
from megatron_prism.families import registry
from megatron_prism.models import build, trainable
from megatron_prism.parallel import environment, hardware, host
from megatron_prism.parallel.groups import Groups, from_first, gang
from megatron_prism.planning.flops import flops_per_token
from megatron_prism.planning.gpus import peak_tflops
from megatron_prism.train import against_plan, garbage, kernels, loop, optim
from megatron_prism.train.against_plan import AgainstPlan
from megatron_prism.train.guard import Guard
from megatron_prism.train.metrics import Recorder, sample_log
from megatron_prism.train.stop import StopRequest
from megatron_prism.train.watchdog import Watchdog


@dataclass(frozen=True)
class Resolved:
    """A run before a process starts: where it starts, what it reads, and the figures that follow from its config."""

    config: TrainConfig
    start: Start
    mixtures: tuple[Segment, ...]
    figures: dict[str, Any]


def resolve(config: TrainConfig, world_size: int) -> Resolved:
    """Check everything that can be checked before a process starts, and return what a run needs to know.

    The machine is not checked: a run on GPUs can be planned where there is none. Nothing is written.
    Raises: InputError with every problem found.
    """
    mixtures, data_problems = start.attempt(partial(segments.read, config.data, config.batch.global_size, config.seed), "data.prepared")
    begin, start_problems = start.attempt(partial(start.resolve, config))
    problems = [*check_train(config, world_size), *run_folder.check_place(config), *start_problems, *data_problems]
    raise_problems(list(dict.fromkeys(problems)))
    assert mixtures is not None and begin is not None
    sizes, blend = registry.parameters(begin.model), segments.realised(mixtures, config.steps * config.batch.global_size)
    described = segments.describe(mixtures, config.batch.global_size)
    raise_problems(
        [
            *(check_model(begin.model, config) or trainable.check(config.trainable, sizes, begin.model, config.parallel)),
            *start.check_tokenizer(config, begin, [segment.prepared for segment in mixtures]),
            *loader.check_held_out(mixtures[0].prepared, config.data.seq_length),
            *segments.check_epochs(blend, config.data.max_epochs, "data.max_epochs"),
            *run_folder.check_resume(config, described),
        ]
    )
    if log.is_first():
        for sentence in [*segments.repeated(blend, mixtures), *segments.unvalidated(config.validation, mixtures)]:
            log.get().warning("%s", sentence)
    tokens_per_step, dp = config.batch.global_size * config.data.seq_length, data_parallel_size(config, world_size)
    flops = flops_per_token(begin.model, config.data.seq_length)
    figures = {
        "parameters": sum(sizes.values()),
        "trainable_parameters": sum(size for name, size in sizes.items() if trainable.is_trainable(name, config.trainable)),
        "world_size": world_size,
        "data_parallel": dp,
        "microbatches": config.batch.global_size // (config.batch.micro_size * dp),
        "tokens_per_step": tokens_per_step,
        "tokens": tokens_per_step * config.steps,
        "flops_per_token_causal": flops.causal,
        "flops_per_token_full": flops.full,
        "sources": [vars(source) for source in blend],
        "mixtures": described,
        "environment": environment.variables(config),
        "run_dir": str(config.run_dir),
        "resumes_at_step": begin.step,
    }
    return Resolved(config, begin, mixtures, figures)


def run(resolved: Resolved) -> dict[str, Any]:
    """Train; every rank of the gang calls this and returns the run's result.

    Raises: InputError before anything is written where this rank's machine cannot run the config.
    """
    return on_gang(resolved, train_in_gang)


def on_gang(resolved: Any, in_gang: Callable[[Any, Groups], dict[str, Any]]) -> dict[str, Any]:
    """Check this rank's machine, join the gang, and run on its grid what a training job resolved (jobs/rl.py's too).

    Raises: InputError before anything is written where this rank's machine cannot run the config.
    """
    config = resolved.config
    resolved = replace(resolved, figures={**resolved.figures, "environment": environment.set_variables(config)})
    machine = hardware.read()
    raise_problems([*check_variables(config, os.environ), *check_machine(config, machine), *check_adam(config, machine)])
    with gang(config, config.limits.collective_timeout_s) as groups:
        return in_gang(resolved, groups)


def train_in_gang(resolved: Resolved, groups: Groups) -> dict[str, Any]:
    """Train on an existing rank grid: hold the run folder, build the model, fit it.

    Raises: Stopped where the run was asked to stop, and is saved. ResultFailure, EnvironmentFault, CheckpointError.
    """
    config, is_first = resolved.config, groups.rank == 0
    begin = from_first(resolved.start)  # the ranks may have read the folder at different times
    with ExitStack() as stack:
        stop_request = stack.enter_context(StopRequest(config.limits.wall_clock_s))
        watchdog = stack.enter_context(Watchdog(config.limits.hang_timeout_s, groups.rank))
        if begin.weights is not None:
            sharded.require_whole(begin.weights)
        stack.enter_context(run_folder.begin(config, begin, _inputs(config), resolved.figures, groups))
        if is_first:
            _announce(resolved)
        chunks, optimizer, resumed = _build(config, begin, groups)
        first_step = resumed.step if resumed else 0
        note_kernels(config, chunks, optimizer, groups)
        dataset = loader.Sequences(resolved.mixtures, config.data.document_mask)
        position = loader.Position(groups.dp_rank, groups.dp)
        recorder = stack.enter_context(Recorder(config.run_dir, first_step, config.steps, enabled=is_first))
        contents = run_folder.Contents(config, begin, groups.world_size, partial(_read_until, config))
        saver = stack.enter_context(saving.Saver(config.run_dir, config.save, contents, chunks, optimizer, groups))
        train_batches = loader.batches(
            dataset, first_step, config.steps, config.batch, position, config.data.num_workers, pin_memory=host.has_cuda()
        )
        run = loop.Run(
            config=config,
            groups=groups,
            chunks=chunks,
            optimizer=optimizer,
            train_batches=stack.enter_context(closing(train_batches)),
            valid_batches=_valid_batches(resolved, position, groups),
            flops=flops_per_token(begin.model, config.data.seq_length),
            peak_tflops=config.log.peak_tflops or peak_tflops(host.device_name(), "fp8" if config.fp8 else config.precision),
            recorder=recorder,
            samples=sample_log(config, groups, first_step, dataset.describe),
            saver=saver,
            guard=Guard(config.guard, **(resumed.facts["guard"] if resumed else {})),
            stop=stop_request,
            watchdog=watchdog,
            against_plan=AgainstPlan(against_plan.prediction(begin.model, config, chunks, sharded.weights, groups), first_step),
            collect_garbage=stack.enter_context(garbage.collected(config.gc_interval)),
        )
        try:
            losses = loop.fit(run, first_step)
        finally:
            if is_first and (compared := run.against_plan.as_values()):
                run_folder.note(config.run_dir, against_plan=compared)
    return {
        "run_dir": str(config.run_dir),
        "checkpoint": str(run_folder.step_folder(config.run_dir, config.steps)),
        "tensorboard": str(config.run_dir / "tensorboard"),
        "steps": config.steps,
        "blend": resolved.figures["sources"],
        "valid_loss": losses,
    }


def note_kernels(config: TrainConfig | RLConfig, chunks: Any, optimizer: Any, groups: Groups) -> None:
    """Log which kernels a run computes with, and note them in its manifest. Raises: EnvironmentFault where they are slow in silence (train/kernels.py)."""
    computing = kernels.find(chunks, optimizer, config, groups)
    if groups.rank == 0:
        log.get().info("kernels: %s", kernels.in_words(computing))
        run_folder.note(config.run_dir, kernels=computing)


def _inputs(config: TrainConfig) -> list[Path]:
    prepared = dict.fromkeys((config.data.prepared, *(change.prepared for change in config.data.changes)))
    return [path / run_folder.MANIFEST for path in prepared if path]


def _read_until(config: TrainConfig, step: int) -> dict[str, Any]:
    """Return what a checkpoint says of the data that was read until a step."""
    sequences, data = step * config.batch.global_size, config.data
    return {
        "tokens": sequences * data.seq_length,
        "data": {"sequences": sequences, "seq_length": data.seq_length, "prepared": str(data.prepared)},
    }


def _announce(resolved: Resolved) -> None:
    """Log the run's size, environment and blend, and note the blend in its manifest: rank 0 alone."""
    config, figures = resolved.config, resolved.figures
    log.get().info("%s", "  ".join(f"{key} {figures[key]:,}" for key in ("parameters", "tokens_per_step", "tokens")))
    log.get().info("environment: %s", environment.in_words(environment.variables(config), figures["environment"]))
    log.get().info(
        "blend: %s", "  ".join(f"{part['name']} {part['share']:.2%} ({part['epochs']:.2f} epochs)" for part in figures["sources"])
    )
    run_folder.note(config.run_dir, realised_blend=figures["sources"])


def _build(config: TrainConfig, begin: Start, groups: Groups) -> tuple[Any, Any, folder.Checkpoint | None]:
    """Return (model chunks, optimizer, the run's newest whole checkpoint, whose state they hold; None where the run begins)."""
    chunks, optimizer, newest = build_from(config, begin, groups)
    return chunks, optimizer, resume(newest, config.steps, chunks, optimizer, groups)


def build_from(config: RunConfig, begin: Start, groups: Groups) -> tuple[Any, Any, Path | None]:
    """Return (model chunks, optimizer, the run's newest whole checkpoint). Where there is none, they hold what the run begins with."""
    newest = saving.newest_whole(config.run_dir)
    return *built(config, begin, groups, newest), newest


def built(config: RunConfig, begin: Start, groups: Groups, newest: Path | None) -> tuple[Any, Any]:
    """Return (model chunks, optimizer) of a run that goes on from a checkpoint of its own, or holds what it begins with."""
    bare = build.build(begin.model, groups, config)
    if begin.weights is not None:
        sharded.load_weights(begin.weights, bare)  # before the optimizer takes its fp32 copy
    trainable.freeze(bare, sharded.weights(bare), config.trainable)
    if source := newest or begin.weights:
        frozen.keep(source, bare)
    chunks = optim.wrap(bare, config)
    return chunks, optim.build(chunks, config.optimizer, config)


def resume(
    newest: Path | None, steps: int, chunks: Any, optimizer: Any, groups: Groups, beside: sharded.Beside | None = None
) -> folder.Checkpoint | None:
    """Load the state of a run's newest checkpoint, and return the checkpoint; None where the run begins."""
    if newest is None:
        return None
    sharded.load_training(newest, chunks, optimizer, groups, beside)
    resumed = folder.read(newest)
    log.get().info("continuing after step %d%s", resumed.step, ": the run is finished" if resumed.step == steps else "")
    return resumed


def _valid_batches(resolved: Resolved, position: loader.Position, groups: Groups) -> dict[str, Any]:
    """Return this rank's microbatches of each source's held-out documents, those of the first mixture."""
    config = resolved.config
    held_out = loader.held_out(resolved.mixtures[0].prepared, config.data.seq_length, config.seed, config.data.document_mask)
    multiple = groups.pp if groups.vpp else 1  # interleaving needs microbatches in multiples of pp
    return {
        name: loader.valid_batches(part, config.validation.sequences, config.batch.micro_size, position, multiple)
        for name, part in held_out.items()
    }
