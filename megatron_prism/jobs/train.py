"""`prism train`: from a checkpoint (or from scratch) and a prepared mixture to a run folder (checkpoint/run_folder.py)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prism.checkpoint import folder, run_folder
from megatron_prism.core import log
from megatron_prism.core.check.gang import data_parallel_size
from megatron_prism.core.check.precision import check_machine, check_variables
from megatron_prism.core.check.train import check_model, check_train
from megatron_prism.core.config import ModelConfig, TrainConfig
from megatron_prism.core.errors import InputError, PrismError, Problem, raise_problems
from megatron_prism.core.load import flat, to_dict
from megatron_prism.data import loader, segments, tokenizer
from megatron_prism.data.mixture import Prepared
from megatron_prism.families import registry
from megatron_prism.models import trainable
from megatron_prism.parallel import environment
from megatron_prism.planning.flops import flops_per_token, peak_tflops

if TYPE_CHECKING:
    from megatron_prism.parallel.groups import Groups
    from megatron_prism.train.metrics import SampleLog
    from megatron_prism.train.stop import StopRequest
    from megatron_prism.train.watchdog import Watchdog


def plan(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """Check everything that can be checked before a process starts; return the run's derived figures.

    The machine is not looked at: a run on GPUs can be planned where there is none.
    Raises: InputError with every problem found. Nothing is written.
    """
    mixtures, no_data = _read("data.prepared", partial(segments.read, config.data, config.batch.global_size, config.seed))
    raise_problems([*check_train(config, world_size), *run_folder.check_place(config), *_check_start(config), *no_data])
    model = origin_model(config)
    tokenizers = [problem for segment in mixtures for problem in _check_tokenizer(config, model, segment.prepared)]
    sources = segments.realised(mixtures, config.steps * config.batch.global_size)
    epochs = segments.check_epochs(sources, config.data.max_epochs, "data.max_epochs")
    wrong = check_model(model, config) or trainable.check(config.trainable, registry.parameters(model), model, config.parallel)
    raise_problems([*wrong, *dict.fromkeys(tokenizers), *epochs, *run_folder.check_resume(config)])
    tokens_per_step = config.batch.global_size * config.data.seq_length
    flops, sizes = flops_per_token(model, config.data.seq_length), registry.parameters(model)
    return {
        "parameters": sum(sizes.values()),
        "trainable_parameters": sum(size for name, size in sizes.items() if trainable.is_trainable(name, config.trainable)),
        "world_size": world_size,
        "data_parallel": data_parallel_size(config, world_size),
        "microbatches": config.batch.global_size // (config.batch.micro_size * data_parallel_size(config, world_size)),
        "tokens_per_step": tokens_per_step,
        "tokens": tokens_per_step * config.steps,
        "flops_per_token_causal": flops.causal,
        "flops_per_token_full": flops.full,
        "sources": [vars(source) for source in sources],
        "environment": environment.variables(config),
        "run_dir": str(config.run_dir),
        "resumes_at_step": run_folder.last_step(config.run_dir),
    }


def origin_model(config: TrainConfig) -> ModelConfig:
    """Return the architecture: of the run that is resumed, of the checkpoint it starts from, or of the config."""
    if run_folder.is_started(config.run_dir):
        return run_folder.origin(config.run_dir).model
    if config.init.checkpoint is not None:
        return config.init.extend(folder.read(config.init.checkpoint).model)
    assert config.model is not None  # check_train
    return config.model


def _read(key: str, read: Callable[[], Any]) -> tuple[Any, list[Problem]]:
    """Return what a key of the config names, and what is wrong with it: an error that ends its reading alone."""
    try:
        return read(), []
    except InputError as error:
        return None, [
            problem if problem.where.startswith(key) else replace(problem, where=f"{key} {problem.where}") for problem in error.problems
        ]


def _check_start(config: TrainConfig) -> list[Problem]:
    """The checkpoint that a run starts from must be one, and what is expected."""
    if config.init.checkpoint is None or run_folder.is_started(config.run_dir):  # a run that goes on has its own, and no need of the other
        return []
    return _read("init.checkpoint", partial(folder.read, config.init.checkpoint))[1] or _check_expected(config)


def _check_expected(config: TrainConfig) -> list[Problem]:
    """The checkpoint must be of the architecture that stands in `model`, where one does, and can be extended but not cut."""
    assert config.init.checkpoint is not None  # _check_start
    start = folder.read(config.init.checkpoint).model
    wanted, had = config.init.max_position_embeddings, start.max_position_embeddings
    if wanted is not None and wanted < had:
        return [
            Problem(
                "init.max_position_embeddings",
                str(wanted),
                f"at least the {had} of {config.init.checkpoint}",
                "a shorter data.seq_length needs no other model",
            )
        ]
    if config.model is None:
        return []
    expected, found = flat(config.model), flat(start)
    fix = "the checkpoint is the truth: correct model.* or leave it out; or is it another checkpoint?"
    keys = [key for key in dict.fromkeys((*expected, *found)) if expected.get(key) != found.get(key)]
    return [Problem(f"model.{key}", str(expected.get(key)), f"{found.get(key)}, as in {config.init.checkpoint}", fix) for key in keys]


def tokenizer_folder(config: TrainConfig) -> Path:
    """Return where the tokenizer is: of the run that is resumed, of the checkpoint it starts from, or of the config."""
    if run_folder.is_started(config.run_dir):
        return run_folder.origin(config.run_dir).assets
    if config.init.checkpoint is not None:
        return folder.read(config.init.checkpoint).assets
    assert config.init.tokenizer is not None  # check_train
    return config.init.tokenizer


def _check_tokenizer(config: TrainConfig, model: ModelConfig, prepared: Prepared) -> list[Problem]:
    """The data's ids must be rows of the embedding, and made by the tokenizer that the model is written back with."""
    where = str(config.data.prepared)
    if prepared.vocab_size > model.vocab_size:
        found, required = f"data of a tokenizer with {prepared.vocab_size} ids", f"at most the model's vocab_size {model.vocab_size}"
        return [Problem(where, found, required, "prepare it with the model's tokenizer")]
    assets = tokenizer_folder(config)
    absent_as_imported = config.init.checkpoint is not None and not (assets / "tokenizer.json").is_file()
    if absent_as_imported or tokenizer.load(assets, need_eos=False).sha256 == prepared.tokenizer_sha256:
        return []
    return [Problem(where, "data tokenized by another tokenizer", f"the one in {assets}", "prepare it again with that tokenizer")]


def run(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """Train; every rank of the gang calls this and returns the run's result.

    Raises: InputError before anything is written where the config does not hold, or not on this rank's machine.
    """
    figures = plan(config, world_size)
    figures["environment"] = environment.set_variables(config)

    from megatron_prism.parallel import hardware
    from megatron_prism.parallel.groups import gang

    raise_problems([*check_variables(config, os.environ), *check_machine(config, hardware.read())])
    with gang(config, config.limits.collective_timeout_s) as groups:
        return train_on(config, figures, groups)


def train_on(config: TrainConfig, figures: Mapping[str, Any], groups: Groups) -> dict[str, Any]:
    """Train on a rank grid that stands: lay out the run folder, build or resume, fit.

    Raises: Stopped where the run was asked to stop, and is saved. ResultFailure, EnvironmentFault, CheckpointError.
    """
    from megatron_prism.checkpoint import sharded
    from megatron_prism.parallel.groups import from_first
    from megatron_prism.train import stop, watchdog

    model, is_first = origin_model(config), groups.rank == 0
    with ExitStack() as stack:
        asked = stack.enter_context(stop.StopRequest(config.limits.wall_clock_s))
        dog = stack.enter_context(watchdog.Watchdog(config.limits.hang_timeout_s, groups.rank))
        if config.init.checkpoint is not None and from_first(not run_folder.is_started(config.run_dir)):
            sharded.require_whole(config.init.checkpoint)
        failed: PrismError | None = None
        if is_first:
            try:
                stack.enter_context(run_folder.begin(config, model, figures))
            except PrismError as error:
                failed = error
        if failed := from_first(failed):
            raise failed.agreed()
        if is_first:
            log.get().info("%s", "  ".join(f"{key} {figures[key]:,}" for key in ("parameters", "tokens_per_step", "tokens")))
            log.get().info("environment: %s", environment.in_words(environment.variables(config), figures["environment"]))
        return _train(config, model, groups, asked, dog)


def _train(config: TrainConfig, model: ModelConfig, groups: Groups, asked: StopRequest, dog: Watchdog) -> dict[str, Any]:
    import torch

    from megatron_prism.checkpoint import saving, sharded
    from megatron_prism.parallel import host
    from megatron_prism.train import guard, loop
    from megatron_prism.train.metrics import Recorder

    torch.use_deterministic_algorithms(config.deterministic)
    chunks, optimizer, start = _build_or_resume(config, model, groups)
    first_step = start.step if start else 0
    mixtures = segments.read(config.data, config.batch.global_size, config.seed)
    dataset = loader.Sequences(mixtures, config.data.document_mask)
    valid = loader.held_out(mixtures[0].prepared, config.data.seq_length, config.seed, config.data.document_mask)
    position = loader.Position(groups.dp_rank, groups.dp)
    even = groups.pp if groups.vpp else 1  # interleaving wants its microbatches in multiples of pp
    blend = segments.realised(mixtures, config.steps * config.batch.global_size)
    if groups.rank == 0:
        log.get().info("blend: %s", "  ".join(f"{part.name} {part.share:.2%} ({part.epochs:.2f} epochs)" for part in blend))
        run_folder.note(config.run_dir, realised_blend=[vars(part) for part in blend])
    saver = saving.Saver(
        config.run_dir,
        config.save,
        capture=lambda: sharded.training_state(chunks, optimizer, groups, is_loading=False),
        finish_folder=partial(_finish_folder, config, model, groups),
        restore=lambda path: sharded.load_training(path, chunks, optimizer, groups),
    )
    with Recorder(config.run_dir, first_step, config.steps, enabled=groups.rank == 0) as recorder, saver:
        run = loop.Run(
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
            flops=flops_per_token(model, config.data.seq_length),
            peak_tflops=config.log.peak_tflops or peak_tflops(host.device_name(), "fp8" if config.fp8 else config.precision),
            recorder=recorder,
            samples=_sample_log(config, dataset, groups, first_step),
            saver=saver,
            guard=guard.Guard(config.guard, **(start.facts["guard"] if start else {})),
            stop=asked,
            watchdog=dog,
        )
        losses = loop.fit(run, first_step)
    return {
        "run_dir": str(config.run_dir),
        "checkpoint": str(run_folder.step_folder(config.run_dir, config.steps)),
        "tensorboard": str(config.run_dir / "tensorboard"),
        "steps": config.steps,
        "blend": [vars(part) for part in blend],
        "valid_loss": losses,
    }


def _sample_log(config: TrainConfig, dataset: loader.Sequences, groups: Groups, first_step: int) -> SampleLog | None:
    """Return where this rank notes what it reads; None where that is not wanted, or another rank reads the same."""
    from megatron_prism.train.metrics import SampleLog

    if not config.log.samples or groups.tp_rank or groups.cp_rank or groups.pp_rank:
        return None
    return SampleLog(config.run_dir, first_step, groups.dp_rank, groups.dp, dataset.describe)


def _build_or_resume(config: TrainConfig, model: ModelConfig, groups: Groups) -> tuple[Any, Any, folder.Checkpoint | None]:
    """Return (model chunks, optimizer, the run's last whole checkpoint, which they are of; None where the run begins)."""
    from megatron_prism.checkpoint import saving, sharded
    from megatron_prism.models import build
    from megatron_prism.train import optim

    found = saving.newest(config.run_dir)
    bare = build.build(model, groups, config)
    if found is None and config.init.checkpoint is not None:
        sharded.load_weights(config.init.checkpoint, bare)  # before the optimizer takes its fp32 copy
    trainable.freeze(bare, sharded.weights(bare), config.trainable)
    chunks = optim.wrap(bare, config)
    optimizer = optim.build(chunks, config.optimizer, config)
    if found is None:
        return chunks, optimizer, None
    sharded.load_training(found, chunks, optimizer, groups)
    start = folder.read(found)
    log.get().info("continuing after step %d%s", start.step, ": the run is finished" if start.step == config.steps else "")
    return chunks, optimizer, start


def _finish_folder(config: TrainConfig, model: ModelConfig, groups: Groups, path: Path, step: int, guard: Mapping[str, Any]) -> None:
    """Add to a checkpoint what it is, what it was made from, and the Hugging Face files: rank 0's."""
    origin = run_folder.origin(config.run_dir)
    sequences = step * config.batch.global_size
    facts = folder.describe(
        model,
        step,
        origin.tokens + sequences * config.data.seq_length,
        dtype=origin.facts["dtype"],
        world_size=groups.world_size,
        parallel=to_dict(config.parallel),
        data={"sequences": sequences, "seq_length": config.data.seq_length, "prepared": str(config.data.prepared)},
        generators=f"of {groups.world_size} ranks, in {folder.STATE}",
        guard=guard,
        manifest=run_folder.this_start(config.run_dir),
    )
    folder.copy_hf(origin.root, path)
    folder.write_meta(path, facts)
