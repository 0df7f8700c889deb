"""The loop: batch, learning rate, forward and backward, measure, read, decide, apply; then log, validate, save, stop.

It knows no file format and no layout. The one objective that it names is the validation's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_prism.core import log
from megatron_prism.core.config import TrainConfig
from megatron_prism.core.errors import Stopped
from megatron_prism.models.batch import Batch
from megatron_prism.parallel.groups import Groups
from megatron_prism.planning.flops import Flops
from megatron_prism.train import optim, safety, stop
from megatron_prism.train.against_plan import AgainstPlan
from megatron_prism.train.guard import Guard, decide
from megatron_prism.train.memory import Memory
from megatron_prism.train.metrics import Recorder, SampleLog
from megatron_prism.train.objective import CROSS_ENTROPY, Objective
from megatron_prism.train.schedule import lr_at
from megatron_prism.train.step import Means, evaluate, forward_backward, read
from megatron_prism.train.timers import Pace, Timers, summary
from megatron_prism.train.watchdog import Watchdog


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
    saver: safety.Saver
    guard: Guard
    stop: stop.StopRequest
    watchdog: Watchdog
    against_plan: AgainstPlan
    collect_garbage: Callable[[int], None]
    objective: Objective = CROSS_ENTROPY


Losses = dict[str, dict[str, float | None]]
"""Validation losses, {source: {step: loss}}."""


def fit(run: Run, first_step: int) -> Losses:
    """Train from `first_step` (steps already done) to config.steps; return the validation losses, on rank 0 those of earlier starts too.

    Raises: ResultFailure where the guard stops the run; no checkpoint is written after that. Stopped at a signal or the time limit, once
    a step is saved, or at a signal before the first.
    """
    config = run.config
    safety.require_wanted(run, first_step)
    losses: Losses = {name: {} for name in run.valid_batches}
    for step, name, loss in run.recorder.validations():
        losses.setdefault(name, {})[str(step)] = loss
    if first_step == 0:
        _validate(run, 0, losses)
        safety.require_wanted(run, first_step)
    timers, memory, since_log, longest_s = Timers(config.log.timers), Memory(), Pace(), 0.0
    for step in range(first_step + 1, config.steps + 1):
        run.watchdog.doing(f"in step {step}")
        started = time.perf_counter()
        with timers.phase("data"):
            microbatches = next(run.train_batches)
        lr = lr_at(step, config.steps, config.optimizer.lr, config.schedule)
        sums = forward_backward(run.chunks, microbatches, run.objective, run.groups, timers)
        with timers.phase("optimizer", on_device=True):
            measured = optim.measure(run.optimizer)
            means, grad_norm = read(sums, measured)
            stop_reason = run.stop.reason(2 * max(longest_s, time.perf_counter() - started) + run.saver.longest_s)
            decision = decide(run.guard, means.loss, grad_norm, stop_reason, run.saver.is_writing())
            if decision.is_taken:
                optim.apply(run.optimizer, measured, lr, config.optimizer.weight_decay)
        seconds = time.perf_counter() - started  # without what a background save takes
        safety.remember(run, step, means.loss, decision, timers)
        run.against_plan.record(step, seconds)
        since_log = since_log.plus(means.num_tokens, seconds)
        if run.samples is not None:
            run.samples.record(step, microbatches)
        if safety.due(step, config.log.interval, config.steps):
            seconds_by_phase = summary(timers.read(), since_log.num_steps) if config.log.timers else {}
            passed_over = {} if decision.is_taken else {"passed_over": 1.0}
            run.recorder.record(
                step, _metrics(run, means, lr, grad_norm, since_log) | memory.metrics(step) | passed_over | seconds_by_phase
            )
            since_log = Pace()
        else:
            run.recorder.advance(step)
        validate = partial(_validate, run, step, losses) if safety.due(step, config.validation.interval, config.steps) else None
        safety.save_and_validate(run, step, timers, decision.stop_reason, validate)
        run.collect_garbage(step)
        longest_s = max(longest_s, time.perf_counter() - started)
        if decision.stop_reason and step < config.steps:
            why = stop.name(decision.stop_reason)
            raise Stopped(f"stopped by {why} after step {step}, which is saved; the same command goes on from there")
    run.watchdog.doing("waiting for the last checkpoint")
    run.saver.finish()
    return losses


def _metrics(run: Run, means: Means, lr: float, grad_norm: float, pace: Pace) -> dict[str, float | None]:
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


def _validate(run: Run, step: int, losses: Losses) -> None:
    """Add each source's validation loss after a step to `losses`."""
    by_source = {}
    with optim.settled(run.chunks, run.config.parallel):
        for name, batches in run.valid_batches.items():
            run.watchdog.doing(f"validating {name} after step {step}")
            by_source[name] = evaluate(run.chunks, batches, CROSS_ENTROPY, run.groups).loss
    for name, loss in by_source.items():
        losses[name][str(step)] = loss
    if (wrong := [name for name, loss in by_source.items() if not math.isfinite(loss)]) and run.groups.rank == 0:
        log.get().warning("step %d: the validation loss of %s is NaN or inf", step, ", ".join(wrong))
    if by_source:
        run.recorder.record_validation(step, by_source)
        log.get().info("step %d validation loss: %s", step, "  ".join(f"{name} {loss:.4f}" for name, loss in by_source.items()))
