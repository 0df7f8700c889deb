"""The loop: batch, learning rate, forward and backward, measure, decide, apply; then log, validate, save, stop.

It knows no file format and no layout. The one objective that it names is the validation's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_prism.core import log
from megatron_prism.core.config import TrainConfig
from megatron_prism.core.errors import ResultFailure, Stopped
from megatron_prism.models.batch import Batch
from megatron_prism.parallel import groups
from megatron_prism.parallel.groups import Groups
from megatron_prism.planning.flops import Flops
from megatron_prism.train import optim, stop
from megatron_prism.train.against_plan import AgainstPlan
from megatron_prism.train.guard import Decision, Guard, Verdict, decide
from megatron_prism.train.metrics import Recorder, SampleLog
from megatron_prism.train.objective import CROSS_ENTROPY, Objective
from megatron_prism.train.schedule import lr_at
from megatron_prism.train.step import Means, evaluate, forward_backward
from megatron_prism.train.timers import Timers, summary
from megatron_prism.train.watchdog import Watchdog


class Saver(Protocol):
    """What writes the run's checkpoints, one at a time. All ranks call begin, finish and rewind together."""

    longest_s: float  # the longest save so far

    def begin(self, step: int, guard: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint of this step; `guard` is kept with it."""

    def is_saving(self) -> bool:
        """Return whether a save was begun and is not finished."""

    def is_writing(self) -> bool:
        """Return whether this rank's child processes still write it."""

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and make it the newest."""

    def rewind(self) -> int | None:
        """Load the newest checkpoint into model and optimizer. Return its step, None where there is none."""


@dataclass(frozen=True)
class Run:
    """Everything the loop works on. valid_batches: this rank's microbatches by source."""

    config: TrainConfig
    groups: Groups
    chunks: Sequence[Any]
    optimizer: Any
    train_batches: Iterator[Sequence[Batch]]
    valid_batches: Mapping[str, Sequence[Batch]]
    flops: Flops
    peak_tflops: float | None
    recorder: Recorder
    samples: SampleLog | None
    saver: Saver
    guard: Guard
    stop: stop.StopRequest
    watchdog: Watchdog
    against_plan: AgainstPlan
    collect_garbage: Callable[[int], None]
    objective: Objective = CROSS_ENTROPY


def fit(run: Run, first_step: int) -> dict[str, dict[str, float]]:
    """Train from `first_step` (steps already done) to config.steps; return validation losses {source: {step: loss}}.

    Raises: ResultFailure where the guard stops the run; no checkpoint is written after that. Stopped at a signal or at the time limit, once
    the step is saved.
    """
    config = run.config
    losses: dict[str, dict[str, float]] = {name: {} for name in run.valid_batches}
    if first_step == 0:
        _validate(run, 0, losses)
    timers, since_log, longest_s = Timers(), _Pace(), 0.0
    for step in range(first_step + 1, config.steps + 1):
        run.watchdog.doing(f"in step {step}")
        started = time.perf_counter()
        with timers.phase("data"):
            microbatches = next(run.train_batches)
        lr = lr_at(step, config.steps, config.optimizer.lr, config.schedule)
        means = forward_backward(run.chunks, microbatches, run.objective, run.groups, timers)
        with timers.phase("optimizer", on_device=True):
            grad_norm = optim.measure(run.optimizer)
            stop_reason = run.stop.reason(2 * longest_s + run.saver.longest_s)
            decision = decide(run.guard, means.loss, float(grad_norm), stop_reason, run.saver.is_writing())
            if decision.is_taken:
                optim.apply(run.optimizer, grad_norm, lr, config.optimizer.weight_decay)
        _remember(run, step, means.loss, decision, timers)
        seconds = time.perf_counter() - started
        run.against_plan.record(step, seconds)
        since_log = since_log.plus(means.num_tokens, seconds)
        if run.samples is not None:
            run.samples.record(step, microbatches)
        if _due(step, config.log.interval, config.steps):
            seconds_by_phase = summary(timers.read(), since_log.num_steps) if config.log.timers else {}
            passed_over = {} if decision.is_taken else {"passed_over": 1.0}
            run.recorder.record(step, _metrics(run, means, lr, float(grad_norm), since_log) | passed_over | seconds_by_phase)
            since_log = _Pace()
        else:
            run.recorder.advance(step)
        if _due(step, config.validation.interval, config.steps):
            _validate(run, step, losses)
        if _due(step, config.save.interval, config.steps) or decision.stop_reason:
            _save(run, step, timers, wait=bool(decision.stop_reason) or not config.save.background)
        run.collect_garbage(step)
        longest_s = max(longest_s, time.perf_counter() - started)
        if decision.stop_reason and step < config.steps:
            why = stop.name(decision.stop_reason)
            raise Stopped(f"stopped by {why} after step {step}, which is saved; the same command goes on from there")
    run.watchdog.doing("waiting for the last checkpoint")
    run.saver.finish()
    return losses


def _remember(run: Run, step: int, loss: float, decision: Decision, timers: Timers) -> None:
    """Finish a checkpoint that every rank has written, and record the decision in the guard."""
    if run.saver.is_saving() and not decision.is_writing:
        with timers.phase("save"):
            run.saver.finish()
    if decision.is_taken:
        run.guard.took(loss)
    else:
        _pass_over(run, step, decision.verdict, decision.why)


def _pass_over(run: Run, step: int, verdict: Verdict, why: str) -> None:
    """Handle a step that was not applied. The next step reads the next batch.

    Raises: ResultFailure where the run is to stop.
    """
    run.guard.passed_over()
    if verdict is Verdict.SKIP:
        _say(run, f"step {step}: {why}: not taken")
        return
    run.saver.finish()  # what is being written was whole before this step
    if verdict is Verdict.STOP:
        raise ResultFailure(f"step {step}: {why}; the weights did not take it; the last checkpoint is good")
    with optim.settled(run.chunks, run.config.parallel):
        _rewind(run, step, why)


def _rewind(run: Run, step: int, why: str) -> None:
    back = run.saver.rewind()
    if back is None:
        raise ResultFailure(f"step {step}: {why}; there is no checkpoint to go back to")
    _say(run, f"step {step}: {why}: back to the weights of step {back}; the data up to here is passed over")


def _say(run: Run, text: str) -> None:
    if run.groups.rank == 0:
        log.get().warning("%s", text)


def _save(run: Run, step: int, timers: Timers, wait: bool) -> None:
    run.watchdog.doing(f"saving step {step}")
    with timers.phase("save"):
        run.saver.finish()  # the one before
        with optim.settled(run.chunks, run.config.parallel):
            if groups.agree([not optim.are_finite(run.chunks)])[0]:
                _never_save(run, step)
            run.saver.begin(step, run.guard.state())
        if wait:
            run.saver.finish()


def _never_save(run: Run, step: int) -> None:
    """Handle NaN or inf weights found before a save: reload the last checkpoint, or stop."""
    why = "weights that are not finite"
    if run.config.guard.on_nonfinite == "stop" or run.guard.num_events >= run.config.guard.max_events:
        raise ResultFailure(f"step {step}: {why}; they were not saved; the last checkpoint is good")
    run.guard.passed_over()
    _rewind(run, step, why)


@dataclass(frozen=True)
class _Pace:
    """Steps, tokens and seconds since the last log line; validation and saving are not counted."""

    num_steps: int = 0
    num_tokens: int = 0
    seconds: float = 0.0

    def plus(self, num_tokens: int, seconds: float) -> _Pace:
        return _Pace(self.num_steps + 1, self.num_tokens + num_tokens, self.seconds + seconds)


def _due(step: int, interval: int, steps: int) -> bool:
    return step == steps or (interval > 0 and step % interval == 0)


def _metrics(run: Run, means: Means, lr: float, grad_norm: float, pace: _Pace) -> dict[str, float | None]:
    """Return a step's metrics. tokens_per_s is of all ranks, TFLOP/s and MFU are per rank, in the causal convention."""
    tokens_per_s = pace.num_tokens / pace.seconds
    tflops = tokens_per_s * run.flops.causal / run.groups.world_size / 1e12
    return {
        "loss": means.loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "step_s": pace.seconds / pace.num_steps,
        "tokens_per_s": tokens_per_s,
        "tflops_per_rank_causal": tflops,
        "mfu_causal": tflops / run.peak_tflops if run.peak_tflops else None,
        **means.reports,
    }


def _validate(run: Run, step: int, losses: dict[str, dict[str, float]]) -> None:
    """Add each source's validation loss after a step to `losses`, {source: {step: loss}}."""
    run.watchdog.doing(f"validating after step {step}")
    with optim.settled(run.chunks, run.config.parallel):
        by_source = {name: evaluate(run.chunks, batches, CROSS_ENTROPY, run.groups).loss for name, batches in run.valid_batches.items()}
    for name, loss in by_source.items():
        losses[name][str(step)] = loss
    if by_source:
        run.recorder.record_validation(step, by_source)
        log.get().info("step %d validation loss: %s", step, "  ".join(f"{name} {loss:.4f}" for name, loss in by_source.items()))
