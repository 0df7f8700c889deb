"""`prism rl`: resolve the config, join the gang, build the model, its reference and the engine on it, and fit.

Input: a checkpoint, or the run's own last one, and a prompt set (`prism prompts`). Output: a run folder, as training's.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from megatron_prism.checkpoint import folder, run_folder, saving, sharded, start
from megatron_prism.checkpoint.start import Start
from megatron_prism.core import log
from megatron_prism.core.check.gang import data_parallel_size
from megatron_prism.core.check.rl import check_model, check_rl
from megatron_prism.core.config import RLConfig
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.core.manifest import sha256_file
from megatron_prism.data import tokenizer
from megatron_prism.data.prompts import FILE
from megatron_prism.families import registry
from megatron_prism.generate import engines
from megatron_prism.generate.cached import unsupported
from megatron_prism.grade import grader
from megatron_prism.jobs import rl_rollout, train
from megatron_prism.models import trainable
from megatron_prism.parallel import environment
from megatron_prism.parallel.groups import Groups, from_first, on_first
from megatron_prism.rl import ahead, gate, loop, losses, record_files, replay, rollout
from megatron_prism.rl import encoded as encoded_sets
from megatron_prism.rl import prompts as prompt_set
from megatron_prism.rl.prompts import Prompt
from megatron_prism.rl.record import Observer, Step, Unobserved, Witness
from megatron_prism.rl.reference import Reference
from megatron_prism.rl.replay import Recorded
from megatron_prism.rl.rollout import Encoded, Sampler
from megatron_prism.rl.scoring import Scorer
from megatron_prism.train import garbage
from megatron_prism.train.guard import Guard
from megatron_prism.train.metrics import Recorder
from megatron_prism.train.stop import StopRequest
from megatron_prism.train.watchdog import Watchdog


@dataclass(frozen=True)
class Resolved:
    """A run before a process starts: where it starts, its prompts as tokens, and the figures that follow from its config."""

    config: RLConfig
    start: Start
    spec: tokenizer.TokenizerSpec
    prompts: tuple[Encoded, ...]
    valid_prompts: tuple[Encoded, ...]
    figures: dict[str, Any]


def resolve(config: RLConfig, world_size: int) -> Resolved:
    """Check everything that can be checked before a process starts, and return what a run needs to know. Nothing is written.

    Raises: InputError with every problem found.
    """
    begin, start_problems = start.attempt(partial(start.resolve, config))
    prompts, problems = start.attempt(partial(prompt_set.read, config.prompts), "prompts")
    valid, valid_problems = start.attempt(partial(_read_valid, config), "validation.prompts")
    grid = config.parallel
    problems = [*check_rl(config, world_size), *run_folder.check_place(config), *start_problems, *problems, *valid_problems]
    raise_problems(list(dict.fromkeys([*problems, *unsupported(grid.vpp, grid.cp, config.fp8 is not None)])))
    assert begin is not None and prompts is not None and valid is not None
    is_sampling = config.mode != "train"
    if is_sampling:
        grader.require(prompt.kind for prompt in (*prompts, *valid))
    sizes, sums = registry.parameters(begin.model), _sums(config)
    room = rollout.max_context(config, begin.model) - config.rollout.max_tokens
    sets = {"prompts": prompts, "validation.prompts": valid}
    spec, (encoded, valid_encoded), unfit = encoded_sets.encode(sets, begin.assets, begin.model, room)
    raise_problems(
        [
            *(check_model(begin.model, config) or trainable.check(config.trainable, sizes, begin.model, config.parallel)),
            *(engines.check(config.rollout, begin.model, world_size, grid.tp, grid.pp) if is_sampling else ()),
            *unfit,
            *run_folder.check_resume(config, ()),
            *_check_same_prompts(config, sums["prompts"]),
            *(replay.check(config, sums["prompts"]) or replay.check_next(config, begin.step, encoded, spec)),
            *(rl_rollout.check(config, begin, sums["prompts"]) if config.mode == "rollout" else ()),
        ]
    )
    sampling = config.rollout
    figures = {
        "parameters": sum(sizes.values()),
        "trainable_parameters": sum(size for name, size in sizes.items() if trainable.is_trainable(name, config.trainable)),
        "world_size": world_size,
        "data_parallel": data_parallel_size(config, world_size),
        "num_prompts": len(prompts),
        "num_valid_prompts": len(valid),
        "responses_per_step": sampling.num_prompts * sampling.num_samples,
        "responses": sampling.num_prompts * sampling.num_samples * config.steps,
        "epochs": sampling.num_prompts * config.steps / len(prompts),
        "longest_prompt_tokens": max(len(one.tokens) for one in encoded),
        "domains": {name: sum(prompt.domain == name for prompt in prompts) for name in sorted({prompt.domain for prompt in prompts})},
        "prompts_sha256": sums,
        "environment": environment.variables(config),
        "run_dir": str(config.run_dir),
        "resumes_at_step": begin.step,
    }
    return Resolved(config, begin, spec, encoded, valid_encoded, figures)


def _read_valid(config: RLConfig) -> tuple[Prompt, ...]:
    path = config.validation.prompts
    return () if path is None else prompt_set.read(path)


def _sums(config: RLConfig) -> dict[str, str]:
    places = {"prompts": config.prompts, "validation": config.validation.prompts}
    return {name: sha256_file(path / FILE) for name, path in places.items() if path is not None}


def _check_same_prompts(config: RLConfig, sha256: str) -> list[Problem]:
    """A resumed run draws from the prompts that it began with."""
    before = run_folder.last_start(config.run_dir).get("plan", {}).get("prompts_sha256", {}).get("prompts")
    if not run_folder.is_started(config.run_dir) or before in (None, sha256):
        return []
    return [
        Problem("prompts", f"{config.prompts}, another set", "the prompts that the run began with", "or start another run: another run_dir")
    ]


def run(resolved: Resolved) -> dict[str, Any]:
    """Train; every rank of the gang calls this and returns the run's result.

    Raises: InputError before anything is written where this rank's machine cannot run the config.
    """
    config = resolved.config
    if config.mode != "train":
        raise_problems(engines.check_machine(config.rollout, resolved.start.model, config.precision))
    return train.on_gang(resolved, rl_rollout.sample_in_gang if config.mode == "rollout" else train_in_gang)


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
        on_first(lambda: rl_rollout.forget(config.run_dir))
        grades = _grader(resolved, stack) if config.train_from is None else None
        chunks, optimizer, newest = train.build_from(config, begin, groups)
        reference = Reference(chunks, config.reference) if config.algorithm.kl_beta > 0 else None
        resumed = train.resume(newest, config.steps, chunks, optimizer, groups, reference)
        train.note_kernels(config, chunks, optimizer, groups)
        contents = run_folder.Contents(config, begin, groups.world_size, lambda step: {})
        first_step = resumed.step if resumed else 0
        bound = None if config.train_from else gate.bound_of(config.precision, config.rollout)
        running = loop.Run(
            config=config,
            groups=groups,
            chunks=chunks,
            optimizer=optimizer,
            sampler=_sampler(config, chunks, begin, groups, resolved.spec, grades),
            prompts=resolved.prompts,
            valid_prompts=resolved.valid_prompts,
            reference=reference,
            objective=losses.objective(config.algorithm),
            progress=progress(resumed),
            ahead=ahead.restored(resumed.root) if resumed else ahead.Ahead(),
            scorer=Scorer(
                config, chunks, groups, reference, bound, _observer(config, begin, groups, chunks, optimizer, reference, first_step)
            ),
            recorder=stack.enter_context(Recorder(config.run_dir, first_step, config.steps, enabled=is_first)),
            saver=stack.enter_context(saving.Saver(config.run_dir, config.save, contents, chunks, optimizer, groups, reference)),
            guard=Guard(config.guard, **(resumed.facts["guard"] if resumed else {})),
            stop=stop_request,
            watchdog=watchdog,
            collect_garbage=stack.enter_context(garbage.collected(config.gc_interval)),
        )
        if is_first:
            shown = ("parameters", "num_prompts", "responses_per_step", "responses")
            log.get().info("%s", "  ".join(f"{key} {resolved.figures[key]:,}" for key in shown))
        validations = loop.fit(running, first_step)
    return {
        "run_dir": str(config.run_dir),
        "checkpoint": str(run_folder.step_folder(config.run_dir, config.steps)),
        "tensorboard": str(config.run_dir / "tensorboard"),
        "steps": config.steps,
        "validation": validations,
    }


def _grader(resolved: Resolved, stack: ExitStack) -> grader.Grader | None:
    """Return rank 0's grader. Raises: on every rank, why a kind of prompt cannot be graded there."""
    kinds = {one.prompt.kind for one in (*resolved.prompts, *resolved.valid_prompts)}
    return on_first(lambda: stack.enter_context(grader.Grader(resolved.config.grade, kinds)))


def _sampler(
    config: RLConfig, chunks: Any, begin: Start, groups: Groups, spec: tokenizer.TokenizerSpec, grades: grader.Grader | None
) -> Sampler:
    """Return what gives the steps their responses: the engine on the model and the grader, or another run's records alone."""
    if config.train_from is not None:
        return Recorded(config, spec, read=lru_cache(2)(partial(record_files.read, config.train_from)))
    return Sampler(config, rollout.engine(config, chunks, begin.model, begin.assets, groups), spec, grades)


def _observer(
    config: RLConfig, begin: Start, groups: Groups, chunks: Any, optimizer: Any, reference: Reference | None, first_step: int
) -> Observer:
    """Return what keeps records, where the config asks for some."""
    interval = config.record.interval
    if interval == 0:
        return Unobserved()
    if groups.rank == 0:
        record_files.begin(config.run_dir, first_step)

    def take(step: Step) -> None:
        if groups.rank == 0:
            record_files.write(config.run_dir, step, config.record.keep_last)

    return Witness(config, begin.model, groups, chunks, optimizer, reference, lambda step: (step - 1) % interval == 0, take)


def _inputs(config: RLConfig) -> list[Path]:
    return [path / FILE for path in (config.prompts, config.validation.prompts) if path is not None]


def progress(resumed: folder.Checkpoint | None) -> loop.Progress:
    """Return what the run has counted. Raises: InputError where the checkpoint is of another kind of run."""
    if resumed is None:
        return loop.Progress()
    if "rl" not in resumed.facts:
        raise InputError(Problem("run_dir", f"{resumed.root}, of another kind of run", "a run of `prism rl`"))
    return loop.Progress(**resumed.facts["rl"])
