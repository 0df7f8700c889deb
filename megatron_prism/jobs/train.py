"""`prism train`: resolve the config, join the gang, build the model, fit.

Input: a checkpoint, a model from scratch, or the run's own last checkpoint (checkpoint/start.py), and a prepared mixture.
Output: a run folder (checkpoint/run_folder.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron_prism.checkpoint import folder, run_folder, start
from megatron_prism.checkpoint.start import Start
from megatron_prism.core import log
from megatron_prism.core.check.gang import data_parallel_size
from megatron_prism.core.check.precision import check_machine, check_variables
from megatron_prism.core.check.train import check_model, check_train
from megatron_prism.core.config import TrainConfig
from megatron_prism.core.errors import Problem, raise_problems
from megatron_prism.data import loader, segments, tokenizer
from megatron_prism.data.mixture import Prepared, SourcePlan
from megatron_prism.data.segments import Segment
from megatron_prism.families import registry
from megatron_prism.models import trainable
from megatron_prism.parallel import environment
from megatron_prism.planning.flops import flops_per_token, peak_tflops

if TYPE_CHECKING:
    from megatron_prism.parallel.groups import Groups
    from megatron_prism.train.loop import Run
    from megatron_prism.train.metrics import SampleLog
    from megatron_prism.train.stop import StopRequest
    from megatron_prism.train.watchdog import Watchdog


@dataclass(frozen=True)
class Resolved:
    """A checked run, before any process starts: its start, its data, and the figures that follow from its config."""

    config: TrainConfig
    start: Start
    mixtures: tuple[Segment, ...]
    figures: dict[str, Any]


def run(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """Train. Every rank of the gang calls this and returns the run's result.

    Raises: InputError, before anything is written, where the config is invalid, or invalid on this rank's machine.
    """
    resolved = resolve(config, world_size)
    resolved = replace(resolved, figures={**resolved.figures, "environment": environment.set_variables(config)})

    from megatron_prism.parallel import hardware
    from megatron_prism.parallel.groups import gang

    raise_problems([*check_variables(config, os.environ), *check_machine(config, hardware.read())])
    with gang(config, config.limits.collective_timeout_s) as groups:
        return train_on(resolved, groups)


def resolve(config: TrainConfig, world_size: int) -> Resolved:
    """Check everything that can be checked before a process starts, and return the resolved run. This writes nothing.

    It does not look at the machine, so a run on GPUs can be planned on a machine without one.
    Raises: InputError with every problem.
    """
    mixtures, of_data = start.attempt(partial(segments.read, config.data, config.batch.global_size, config.seed), "data.prepared")
    begins, of_start = start.attempt(partial(start.resolve, config))
    raise_problems(list(dict.fromkeys([*check_train(config, world_size), *run_folder.check_place(config), *of_start, *of_data])))
    assert mixtures is not None and begins is not None
    sizes, blend = registry.parameters(begins.model), segments.realised(mixtures, config.steps * config.batch.global_size)
    raise_problems(
        [
            *(check_model(begins.model, config) or trainable.check(config.trainable, sizes, begins.model, config.parallel)),
            *dict.fromkeys(problem for segment in mixtures for problem in _check_tokenizer(config, begins, segment.prepared)),
            *segments.check_epochs(blend, config.data.max_epochs, "data.max_epochs"),
            *run_folder.check_resume(config),
        ]
    )
    return Resolved(config, begins, mixtures, _figures(config, begins, sizes, blend, world_size))


def _check_tokenizer(config: TrainConfig, begins: Start, prepared: Prepared) -> list[Problem]:
    """Check that the data's ids are rows of the embedding, and that the model's own tokenizer made them."""
    where, path = str(config.data.prepared), begins.assets / tokenizer.FILE
    absent_as_imported = config.init.checkpoint is not None and not path.is_file()
    is_same = not absent_as_imported and tokenizer.load(begins.assets).sha256 == prepared.tokenizer_sha256
    if prepared.vocab_size > begins.model.vocab_size:
        if is_same:
            return tokenizer.check_vocabulary(path, begins.model.vocab_size)
        ids, required = f"data of a tokenizer with {prepared.vocab_size} ids", f"at most the model's vocab_size {begins.model.vocab_size}"
        return [Problem(where, ids, required, "prepare it with the model's tokenizer")]
    if absent_as_imported or is_same:
        return []
    return [Problem(where, "data tokenized by another tokenizer", f"the one in {begins.assets}", "prepare it again with that tokenizer")]


def _figures(config: TrainConfig, begins: Start, sizes: Mapping[str, int], blend: Sequence[SourcePlan], world_size: int) -> dict[str, Any]:
    tokens_per_step, dp = config.batch.global_size * config.data.seq_length, data_parallel_size(config, world_size)
    flops = flops_per_token(begins.model, config.data.seq_length)
    return {
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
        "environment": environment.variables(config),
        "run_dir": str(config.run_dir),
        "resumes_at_step": begins.step,
    }


def train_on(resolved: Resolved, groups: Groups) -> dict[str, Any]:
    """Train on an existing rank grid: lock the run folder, build the model, fit it.

    Raises: Stopped after a request to stop, with the state saved. ResultFailure, EnvironmentFault, CheckpointError.
    """
    from megatron_prism.checkpoint import sharded
    from megatron_prism.parallel.groups import from_first
    from megatron_prism.train import loop, stop, watchdog

    config, begins = resolved.config, from_first(resolved.start)  # the ranks may have read the folder at different times
    with ExitStack() as stack:
        asked = stack.enter_context(stop.StopRequest(config.limits.wall_clock_s))
        dog = stack.enter_context(watchdog.Watchdog(config.limits.hang_timeout_s, groups.rank))
        if begins.weights is not None:
            sharded.require_whole(begins.weights)
        stack.enter_context(run_folder.begin(config, begins, resolved.figures, groups))
        if groups.rank == 0:
            _say(resolved)
        chunks, optimizer, resumed = _build(config, begins, groups)
        run = stack.enter_context(_assemble(resolved, begins, groups, chunks, optimizer, resumed, asked, dog))
        losses = loop.fit(run, resumed.step if resumed else 0)
    return {
        "run_dir": str(config.run_dir),
        "checkpoint": str(run_folder.step_folder(config.run_dir, config.steps)),
        "tensorboard": str(config.run_dir / "tensorboard"),
        "steps": config.steps,
        "blend": resolved.figures["sources"],
        "valid_loss": losses,
    }


def _say(resolved: Resolved) -> None:
    """Log what the run is, and write the blend into its manifest (rank 0 only)."""
    config, figures = resolved.config, resolved.figures
    log.get().info("%s", "  ".join(f"{key} {figures[key]:,}" for key in ("parameters", "tokens_per_step", "tokens")))
    log.get().info("environment: %s", environment.in_words(environment.variables(config), figures["environment"]))
    log.get().info(
        "blend: %s", "  ".join(f"{part['name']} {part['share']:.2%} ({part['epochs']:.2f} epochs)" for part in figures["sources"])
    )
    run_folder.note(config.run_dir, realised_blend=figures["sources"])


def _build(config: TrainConfig, begins: Start, groups: Groups) -> tuple[Any, Any, folder.Checkpoint | None]:
    """Return (model chunks, optimizer, the checkpoint that they were resumed from, or None for a new run)."""
    import torch

    from megatron_prism.checkpoint import saving, sharded
    from megatron_prism.models import build
    from megatron_prism.train import optim

    torch.use_deterministic_algorithms(config.deterministic)
    newest = saving.newest(config.run_dir)
    bare = build.build(begins.model, groups, config)
    if begins.weights is not None:
        sharded.load_weights(begins.weights, bare)  # before the optimizer takes its fp32 copy
    trainable.freeze(bare, sharded.weights(bare), config.trainable)
    chunks = optim.wrap(bare, config)
    optimizer = optim.build(chunks, config.optimizer, config)
    if newest is None:
        return chunks, optimizer, None
    sharded.load_training(newest, chunks, optimizer, groups)
    resumed = folder.read(newest)
    log.get().info("continuing after step %d%s", resumed.step, ": the run is finished" if resumed.step == config.steps else "")
    return chunks, optimizer, resumed


@contextmanager
def _assemble(
    resolved: Resolved,
    begins: Start,
    groups: Groups,
    chunks: Sequence[Any],
    optimizer: Any,
    resumed: folder.Checkpoint | None,
    asked: StopRequest,
    dog: Watchdog,
) -> Iterator[Run]:
    """Yield everything that the loop uses: batches from the first step on, the recorder, the saver, the guard."""
    from megatron_prism.checkpoint import saving
    from megatron_prism.parallel import host
    from megatron_prism.train import guard, loop
    from megatron_prism.train.metrics import Recorder

    config, mixtures, first_step = resolved.config, resolved.mixtures, resumed.step if resumed else 0
    dataset = loader.Sequences(mixtures, config.data.document_mask)
    valid = loader.held_out(mixtures[0].prepared, config.data.seq_length, config.seed, config.data.document_mask)
    position = loader.Position(groups.dp_rank, groups.dp)
    even = groups.pp if groups.vpp else 1  # interleaving requires a multiple of pp microbatches
    contents = run_folder.Contents(config, begins, groups.world_size)
    with (
        Recorder(config.run_dir, first_step, config.steps, enabled=groups.rank == 0) as recorder,
        saving.Saver(config.run_dir, config.save, contents, chunks, optimizer, groups) as saver,
    ):
        yield loop.Run(
            config=config,
            groups=groups,
            chunks=chunks,
            optimizer=optimizer,
            train_batches=loader.batches(
                dataset, first_step, config.steps, config.batch, position, config.data.num_workers, pin_memory=host.has_cuda()
            ),
            valid_batches={
                name: loader.valid_batches(part, config.validation.sequences, config.batch.micro_size, position, even)
                for name, part in valid.items()
            },
            flops=flops_per_token(begins.model, config.data.seq_length),
            peak_tflops=config.log.peak_tflops or peak_tflops(host.device_name(), "fp8" if config.fp8 else config.precision),
            recorder=recorder,
            samples=_sample_log(config, dataset, groups, first_step),
            saver=saver,
            guard=guard.Guard(config.guard, **(resumed.facts["guard"] if resumed else {})),
            stop=asked,
            watchdog=dog,
        )


def _sample_log(config: TrainConfig, dataset: loader.Sequences, groups: Groups, first_step: int) -> SampleLog | None:
    """Return this rank's log of the samples it reads. None: log.samples is off, or another rank reads the same data."""
    from megatron_prism.train.metrics import SampleLog

    if not config.log.samples or groups.tp_rank or groups.cp_rank or groups.pp_rank:
        return None
    return SampleLog(config.run_dir, first_step, groups.dp_rank, groups.dp, dataset.describe)
