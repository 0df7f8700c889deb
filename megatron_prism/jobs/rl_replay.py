"""`prism rl replay RUN STEP`: compute a recorded step of a run again, and name the first thing that differs from its record.

The replay begins with the newest checkpoint before the step, or with what the run began with, and trains through the recorded steps by their
recorded responses. It reads the run's folder and writes nothing there.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from megatron_prism.checkpoint import fingerprint, folder, run_folder, sharded
from megatron_prism.core import log
from megatron_prism.core.config import ParallelConfig, RLConfig
from megatron_prism.core.errors import InputError, Problem, ResultFailure
from megatron_prism.core.load import load
from megatron_prism.grade import grader
from megatron_prism.jobs import rl, train
from megatron_prism.parallel.groups import Groups, from_first, on_first
from megatron_prism.rl import ahead, compare, loop, losses, record_files, rollout
from megatron_prism.rl.compare import Stage
from megatron_prism.rl.record import Step, Witness
from megatron_prism.rl.reference import Reference
from megatron_prism.rl.replay import Replayed
from megatron_prism.rl.scoring import Scorer
from megatron_prism.train.guard import Guard
from megatron_prism.train.metrics import Recorder
from megatron_prism.train.stop import StopRequest
from megatron_prism.train.watchdog import Watchdog

MAX_SHOWN = 8  # differences of a stage in the result


@dataclass(frozen=True)
class Resolved:
    """A replay before a process starts. run: its config is the run's, on this layout. begins: the step of the checkpoint, 0 for none.

    origin: where there is none, the checkpoint that the run began from.
    """

    run: rl.Resolved
    step: int
    begins: int
    checkpoint: Path | None
    origin: Path | None
    figures: Mapping[str, Any]

    @property
    def config(self) -> RLConfig:
        """Return the config, as on_gang reads it."""
        return self.run.config


def resolve(run_dir: Path, step: int, world_size: int) -> Resolved:
    """Check what a replay needs: the run, its records from the start of the replay on, and a layout. Nothing is written.

    world_size: 1 computes on one process, whatever the run's layout; any other must be the recorded one.
    Raises: InputError with every problem found.
    """
    path = run_dir / run_folder.CONFIG
    if not path.is_file():
        raise InputError(Problem(str(run_dir), "no run", "the folder of a `prism rl` run"))
    target = record_files.read(run_dir, step)
    ranks = target.platform["world_size"]
    if world_size not in (1, ranks):
        raise InputError(Problem("--nproc", str(world_size), f"1, or the recorded {ranks}"))
    recorded = load(path, RLConfig)
    parallel = recorded.parallel if world_size == ranks else _alone(recorded.parallel)
    is_sampled = world_size > 1 and recorded.mode != "train"
    sampling = recorded.rollout if is_sampled else replace(recorded.rollout, engine="cached")
    validation = replace(recorded.validation, prompts=None, interval=0)
    config = replace(recorded, run_dir=run_dir, world_size=None, parallel=parallel, rollout=sampling, validation=validation)
    begins, checkpoint = _begin(run_dir, step, min(one.sample.weights_step for one in target.responses))
    origin = None if checkpoint else _origin(run_dir, config)
    figures = {"run_dir": str(run_dir), "step": step, "from": str(checkpoint or origin), "steps": step - begins}
    return Resolved(rl.resolve(config, world_size), step, begins, checkpoint, origin, figures)


def _origin(run_dir: Path, config: RLConfig) -> Path | None:
    """Return the checkpoint that a run began from, as its start recorded it: `init.checkpoint` may name a run that has a newer one by now."""
    recorded = [Path(name) for start in reversed(run_folder.starts(run_dir)) for name in start.get("inputs", {})]
    return next((path.parent for path in recorded if path.name == folder.META), config.init.checkpoint)


def _begin(run_dir: Path, step: int, sampled_by: int) -> tuple[int, Path | None]:
    """Return the step of the checkpoint that a replay begins with, and its folder; 0 and None: what the run began with.

    It is the newest one at or before the weights that sampled the step's responses, or where records are missing between them, the newest one
    before the step: the responses that a checkpoint holds already are not sampled again.
    Raises: InputError where records are missing from there too.
    """
    saved = {number: path for number, path in run_folder.checkpoints(run_dir).items() if number < step}
    records = set(record_files.steps(run_dir))
    for newest in dict.fromkeys((sampled_by, step - 1)):
        begins = max((number for number in saved if number <= newest), default=0)
        missing = sorted(set(range(begins + 1, step)) - records)
        if not missing:
            return begins, saved.get(begins)
    fix = f"the step after a checkpoint needs no other record; this run has checkpoints of {', '.join(map(str, saved)) or 'no step before'}"
    raise InputError(Problem(f"step {missing[0]}", "no record", f"one of each step from {begins + 1} to {step}", fix))


def _alone(parallel: ParallelConfig) -> ParallelConfig:
    """Return the layout of one process."""
    return ParallelConfig(distributed_optimizer=parallel.distributed_optimizer, grad_reduce=parallel.grad_reduce)


def run(resolved: Resolved) -> dict[str, Any]:
    """Replay; every rank of the gang calls this and returns the result."""
    return train.on_gang(resolved, replay_in_gang)


class _Reached(Exception):
    """The loop has ended the step that is replayed."""


@dataclass
class _NoSaver:
    """Stands where a run has its saver: a replay saves nothing."""

    longest_s: float = 0.0
    num_rewinds: int = 0

    def begin(self, step: int, facts: Mapping[str, Any]) -> None:
        """Save nothing."""

    def is_saving(self) -> bool:
        """Say no."""
        return False

    def is_writing(self) -> bool:
        """Say no."""
        return False

    def finish(self) -> None:
        """Wait for nothing."""

    def rewind(self) -> int | None:
        """Refuse: the checkpoint that the run went back to need not be there."""
        raise ResultFailure("the guard takes the run back to a checkpoint in this step, which a replay does not do")


@dataclass
class _Walk:
    """Compares each step that the loop ends with its record, and stops the loop at the last one."""

    read: Any
    last: int
    precision: Any
    exact_before: int  # the step whose start was loaded, not computed
    stored: fingerprint.Fingerprints
    source: Replayed
    stages: dict[int, list[Stage]] = field(default_factory=dict)
    is_exact: bool = False
    platforms: tuple[Mapping[str, Any], ...] = ()

    def take(self, step: Step) -> None:
        recorded = self.read(step.step)
        if step.step == self.last:
            again = self.source.again
            step = replace(step, responses=[again.get((one.seed, one.sample.sample), one) for one in step.responses])
        if step.step == self.exact_before and self.stored:
            step = replace(step, tensors={"stored_weights": self.stored, **step.tensors})
        self.is_exact, self.platforms = recorded.platform == step.platform, (recorded.platform, step.platform)
        loaded = compare.BEFORE if step.step == self.exact_before else ()
        self.stages[step.step] = compare.compare(recorded, step, self.precision, self.is_exact, loaded)
        if step.step == self.last:
            raise _Reached


def replay_in_gang(resolved: Resolved, groups: Groups) -> dict[str, Any]:
    """Replay on an existing rank grid.

    Raises: CheckpointError where the checkpoint is damaged. InputError where a record is.
    """
    import torch

    config, begin = resolved.config, resolved.run.start
    read = cache(partial(record_files.read, config.run_dir))
    torch.set_num_threads(read(resolved.step).platform["num_threads"])  # a host's bits depend on it
    begin = replace(begin, weights=from_first(resolved.origin))
    with ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(config.limits.hang_timeout_s, groups.rank))
        if source := resolved.checkpoint or begin.weights:
            sharded.require_whole(source)
        kinds = {one.prompt.kind for one in resolved.run.prompts}
        grades = on_first(lambda: stack.enter_context(grader.Grader(config.grade, kinds)))
        chunks, optimizer = train.built(config, begin, groups, resolved.checkpoint)
        stored: fingerprint.Fingerprints = {}
        if resolved.checkpoint:  # what is exported; the fp32 weights in the optimizer's state take their place in training
            sharded.load_weights(resolved.checkpoint, chunks)
            stored = fingerprint.of_weights(chunks, begin.model)
        reference = Reference(chunks, config.reference) if config.algorithm.kl_beta > 0 else None
        resumed = train.resume(resolved.checkpoint, config.steps, chunks, optimizer, groups, reference)
        engine = rollout.engine(config, chunks, begin.model, begin.assets, groups)
        sampler = Replayed(config, resolved.run.spec, engine=engine, grader=grades, read=read, at=resolved.step)
        walk = _Walk(read, resolved.step, config.precision, resolved.begins + 1, stored, sampler)
        witness = Witness(config, begin.model, groups, chunks, optimizer, reference, lambda step: True, walk.take)
        running = loop.Run(
            config=replace(config, rollout=replace(config.rollout, keep=False)),
            groups=groups,
            chunks=chunks,
            optimizer=optimizer,
            sampler=sampler,
            prompts=resolved.run.prompts,
            valid_prompts=(),
            reference=reference,
            objective=losses.objective(config.algorithm),
            progress=rl.progress(resumed),
            ahead=ahead.restored(resumed.root) if resumed else ahead.Ahead(),
            recorder=stack.enter_context(Recorder(config.run_dir, resolved.begins, config.steps, enabled=False)),
            saver=_NoSaver(),
            guard=Guard(config.guard, **(resumed.facts["guard"] if resumed else {})),
            stop=stack.enter_context(StopRequest(None)),
            watchdog=watchdog,
            collect_garbage=lambda step: None,
            # no bound: a record that was changed is no sampler that is not the trainer's, and the comparison says so
            scorer=Scorer(config, chunks, groups, reference, None, witness),
        )
        try:
            loop.fit(running, resolved.begins)
        except _Reached:
            log.get().info("step %d is computed again", resolved.step)
    return _result(resolved, walk)


def _result(resolved: Resolved, walk: _Walk) -> dict[str, Any]:
    firsts = [difference for step in sorted(walk.stages) if (difference := compare.first(walk.stages[step])) is not None]
    recorded, here = walk.platforms
    return {
        **{name: value for name, value in resolved.figures.items() if name != "environment"},
        "exact": walk.is_exact,
        "other_platform": {key: f"{recorded.get(key)} recorded, {here[key]} here" for key in here if recorded.get(key) != here[key]},
        "first_difference": asdict(firsts[0]) if firsts else None,
        "verdict": str(firsts[0]) if firsts else "no difference",
        "differences": [asdict(one) for stage in walk.stages[resolved.step] if stage.judged for one in stage.differences[:MAX_SHOWN]],
        "stages": [_row(stage) for stage in walk.stages[resolved.step]],
    }


def _row(stage: Stage) -> dict[str, Any]:
    row: dict[str, Any] = {
        "stage": stage.name,
        "compared": stage.num_compared,
        "equal": stage.num_equal,
        "largest_difference": stage.largest,
    }
    row["different"] = len(stage.differences) if stage.judged else f"{stage.num_compared - stage.num_equal}, not judged"
    return row
