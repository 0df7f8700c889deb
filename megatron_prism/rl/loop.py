"""The loop of reinforcement learning. A step trains on what its own weights sampled, or one step off, and its ratio is exactly 1.

Before the first step the trust gate compares sampler and trainer. A step: draw prompts, sample, grade, group -> log-probabilities of the
trainer, compared with the sampler's, and of the reference -> one step off: sample for the next step -> for each minibatch forward and backward,
measure, decide, apply -> the reference follows -> record, validate, save, stop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from megatron_prism.core import log
from megatron_prism.core.config import RLConfig
from megatron_prism.core.errors import Stopped
from megatron_prism.parallel.groups import Groups
from megatron_prism.rl import figures, gate, rollout, scoring
from megatron_prism.rl.ahead import Ahead, Taken, lag_of
from megatron_prism.rl.reference import Reference
from megatron_prism.rl.rollout import Encoded, Rollouts, Sampler
from megatron_prism.rl.sample import Sample
from megatron_prism.rl.scoring import Microbatches, Scorer
from megatron_prism.train import optim, safety, stop
from megatron_prism.train.guard import Guard, decide
from megatron_prism.train.memory import Memory
from megatron_prism.train.metrics import Recorder
from megatron_prism.train.objective import Objective
from megatron_prism.train.schedule import lr_at
from megatron_prism.train.step import Means, forward_backward, mean_of, read
from megatron_prism.train.timers import Pace, Timers, summary
from megatron_prism.train.watchdog import Watchdog


@dataclass
class Progress:
    """What a run counts beside its steps, kept in its checkpoints: the prompts drawn, with those ahead of their step, and the tokens trained on."""

    num_drawn: int = 0
    num_tokens: int = 0


@dataclass(frozen=True)
class Run:
    """Everything the loop works on.

    scorer: with the bound of the trust gate, and the observer, which looks at each step. reference: None without a KL term.
    """

    config: RLConfig
    groups: Groups
    chunks: Sequence[Any]
    optimizer: Any
    sampler: Sampler
    prompts: Sequence[Encoded]
    valid_prompts: Sequence[Encoded]
    reference: Reference | None
    objective: Objective
    progress: Progress
    ahead: Ahead
    scorer: Scorer
    recorder: Recorder
    saver: safety.Saver
    guard: Guard
    stop: stop.StopRequest
    watchdog: Watchdog
    collect_garbage: Callable[[int], None]


def fit(run: Run, first_step: int) -> dict[str, dict[str, float | None]]:
    """Train from `first_step` (steps already done) to config.steps; return the validations {step: {metric: value}}, on rank 0 of earlier starts too.

    Raises: ResultFailure where the guard stops the run. Stopped at a signal or the time limit, once a step is saved, or before the first.
    """
    config, progress = run.config, run.progress
    safety.require_wanted(run, first_step)
    validations: dict[str, dict[str, float | None]] = {}
    for earlier, name, value in run.recorder.validations("valid"):
        validations.setdefault(str(earlier), {})[name] = value
    if run.scorer.bound is not None:
        _open_gate(run, run.scorer.bound)
    if first_step == 0:
        _validate(run, 0, validations)
    safety.require_wanted(run, first_step)
    timers, memory, since_log, longest_s = Timers(config.log.timers), Memory(), Pace(), 0.0
    for step in range(first_step + 1, config.steps + 1):
        run.watchdog.doing(f"in step {step}")
        started = time.perf_counter()
        with optim.settled(run.chunks, config.parallel):
            run.scorer.observer.begins(step)
            with timers.phase("rollout"):
                rollouts, taken = _collect(run, step)
            with timers.phase("log_probs"):
                scored = run.scorer.score(rollouts, step)
            if config.rollout.lag and step < config.steps:
                with timers.phase("rollout"):
                    _sample_ahead(run, step)
        lr = lr_at(step, config.steps, config.optimizer.lr, config.schedule)
        needed_s = 2 * max(longest_s, time.perf_counter() - started) + run.saver.longest_s
        updated = _update(run, step, lr, scored.minibatches, timers, needed_s)
        if updated.num_taken:
            _follow(run, step)
        run.scorer.observer.ends()
        progress.num_tokens += updated.means.num_tokens
        if config.rollout.keep and run.groups.rank == 0:
            rollout.write(config.run_dir, step, rollouts.groups)
        since_log = since_log.plus(updated.means.num_tokens, time.perf_counter() - started - updated.saving_s)
        if safety.due(step, config.log.interval, config.steps):
            values = _metrics(updated, lr, since_log) | memory.metrics(step) | {"entropy": scored.entropy}
            values |= _of_rollouts(rollouts, step) | taken.figures()
            if not rollouts.kept and run.groups.rank == 0:
                log.get().warning("step %d: no group has right and wrong responses: nothing is trained on", step)
            values |= summary(timers.read(), since_log.num_steps) if config.log.timers else {}
            run.recorder.record(step, values)
            since_log = Pace()
        else:
            run.recorder.advance(step)
        validate = partial(_validate, run, step, validations) if safety.due(step, config.validation.interval, config.steps) else None
        safety.save_and_validate(run, step, timers, updated.stop_reason, validate, partial(_facts, run))
        run.collect_garbage(step)
        longest_s = max(longest_s, time.perf_counter() - started)
        if updated.stop_reason and step < config.steps:
            why = stop.name(updated.stop_reason)
            raise Stopped(f"stopped by {why} after step {step}, which is saved; the same command goes on from there")
    run.watchdog.doing("waiting for the last checkpoint")
    run.saver.finish()
    return validations


@dataclass(frozen=True)
class Updated:
    """What a step's minibatches did to the weights: the means over all of them, the largest gradient norm, how many were taken and passed over.

    saving_s: what finishing a background save took meanwhile.
    """

    means: Means
    grad_norm: float
    num_taken: int
    num_passed_over: int
    stop_reason: float
    saving_s: float


def _update(run: Run, step: int, lr: float, minibatches: Sequence[Microbatches], timers: Timers, needed_s: float) -> Updated:
    """Take one optimizer step a minibatch. needed_s: what the run still needs before its time is up, to go on and to save.

    Raises: ResultFailure where the guard stops the run.
    """
    means, grad_norms, num_taken, num_passed_over, stop_reason, saving_s = [], [], 0, 0, 0.0, 0.0
    for microbatches in minibatches:
        sums = forward_backward(run.chunks, microbatches, run.objective, run.groups, timers)
        with timers.phase("optimizer", on_device=True):
            measured = optim.measure(run.optimizer)
            mean, grad_norm = read(sums, measured)
            means.append(mean)
            grad_norms.append(grad_norm)
            run.scorer.observer.measured(means[-1], grad_norms[-1], lr)
            decision = decide(run.guard, means[-1].loss, grad_norms[-1], run.stop.reason(needed_s), run.saver.is_writing())
            has_weight = means[-1].weight > 0  # no group to learn from: the step counts, and the weights stay
            if decision.is_taken and has_weight:
                num_taken += 1
                optim.apply(run.optimizer, measured, lr, run.config.optimizer.weight_decay)
        num_rewinds, decided = run.saver.num_rewinds, time.perf_counter()
        safety.remember(run, step, means[-1].loss if has_weight else None, decision, timers)
        saving_s += time.perf_counter() - decided
        num_passed_over, stop_reason = num_passed_over + (not decision.is_taken), max(stop_reason, decision.stop_reason)
        if run.saver.num_rewinds != num_rewinds:
            num_taken = 0  # of the weights that are given up, by which the other minibatches were scored
            break
    largest = max(grad_norms, key=lambda norm: (math.isnan(norm), norm))
    return Updated(mean_of(means), largest, num_taken, num_passed_over, stop_reason, saving_s)


def _facts(run: Run) -> dict[str, Any]:
    files = run.ahead.files(run.saver.num_rewinds, run.groups.rank == 0)
    return {"tokens": run.progress.num_tokens, "rl": vars(run.progress).copy(), "files": files}


def _open_gate(run: Run, bound: gate.Bound) -> None:
    run.watchdog.doing("comparing sampler and trainer")
    with optim.settled(run.chunks, run.config.parallel):
        scoring.open_gate(run.sampler, run.chunks, run.prompts, bound, run.groups)


def _collect(run: Run, step: int) -> tuple[Rollouts, Taken]:
    """Return a step's groups, and what was sampled ahead for it."""
    taken = run.ahead.take(step, run.config.rollout.lag, run.saver.num_rewinds)
    if run.groups.rank == 0:
        taken.say(step)
    rollouts = rollout.collect(run.sampler, run.prompts, run.progress.num_drawn, step, taken.groups, taken.speed)
    run.progress.num_drawn = rollouts.num_drawn
    return rollouts, taken


def _sample_ahead(run: Run, step: int) -> None:
    """Sample the responses of the step after this one, by the weights before this one's update, and begin to grade them."""
    sampled = rollout.draw(run.sampler, run.prompts, run.progress.num_drawn, run.config.rollout.num_prompts, step + 1, step - 1)
    run.progress.num_drawn = sampled.num_drawn
    if run.scorer.bound is not None:  # by the weights of this moment: in its own step they will be older
        some = gate.samples_of(sampled.rollouts, [one.tokens for one in sampled.prompts], gate.MAX_AHEAD)
        run.scorer.require_kl(some)
    run.ahead.begin(run.sampler, sampled, run.saver.num_rewinds)


def _samples(group: rollout.Group) -> list[Sample]:
    return [response.sample for response in group]


def _follow(run: Run, step: int) -> None:
    if run.reference is not None:
        with optim.settled(run.chunks, run.config.parallel):
            run.reference.update(step)


def _metrics(updated: Updated, lr: float, pace: Pace) -> dict[str, float | None]:
    means = updated.means
    is_empty = means.weight == 0  # nothing was trained on: its means are no numbers, rather than 0
    return {
        "loss": None if is_empty else means.loss,
        "lr": lr,
        "grad_norm": updated.grad_norm,
        "step_s": pace.seconds / pace.num_steps,
        "tokens_per_s": pace.num_tokens / pace.seconds,
        "trained_tokens": means.num_tokens,
        **{name: None if is_empty else value for name, value in means.reports.items()},
        **({"passed_over": float(updated.num_passed_over)} if updated.num_passed_over else {}),
    }


def _of_rollouts(rollouts: Rollouts, step: int) -> dict[str, float | None]:
    lags = [lag_of(group, step) for group in rollouts.kept]
    lag = {"lag": fmean(lags) if lags else None, "lag_max": float(max(lags)) if lags else None}
    return {**figures.of_rollouts(rollouts), **figures.by_domain(rollouts), **lag, "rollout_tokens_per_s": rollouts.speed.tokens_per_s()}


def _validate(run: Run, step: int, validations: dict[str, dict[str, float | None]]) -> None:
    """Add the validation after a step to `validations`."""
    if not run.valid_prompts:
        return
    run.watchdog.doing(f"validating after step {step}")
    with optim.settled(run.chunks, run.config.parallel):
        values = figures.of_validation([_samples(group) for group in rollout.validate(run.sampler, run.valid_prompts, step)])
    validations[str(step)] = dict(values)
    run.recorder.record_validation(step, values, "valid")
    log.get().info("step %d validation: %s", step, "  ".join(f"{name} {value:.4f}" for name, value in values.items()))
