"""The loop of reinforcement learning. A step trains on what its own weights sampled, or one step off, and its ratio is exactly 1.

Before the first step the trust gate compares sampler and trainer. A step: draw prompts, sample, grade, group -> log-probabilities of the
trainer, compared with the sampler's, and of the reference -> one step off: sample for the next step -> forward and backward, measure, decide,
apply -> the reference follows -> record, validate, save, stop. Shape legend: B rows of a microbatch, S tokens of a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from megatron_prism.core import log
from megatron_prism.core.config import RLConfig
from megatron_prism.core.errors import Stopped
from megatron_prism.generate.engine import Sampling
from megatron_prism.models.forward import log_probs, log_probs_and_entropies
from megatron_prism.parallel.groups import Groups, gather
from megatron_prism.rl import batches, figures, gate, rollout
from megatron_prism.rl.advantages import advantages, group_of
from megatron_prism.rl.ahead import Ahead, Taken, lag_of
from megatron_prism.rl.record import Observer
from megatron_prism.rl.reference import Reference
from megatron_prism.rl.rollout import Encoded, Rollouts, Sampler
from megatron_prism.rl.sample import Sample
from megatron_prism.train import optim, safety, stop
from megatron_prism.train.guard import Guard, decide
from megatron_prism.train.metrics import Recorder
from megatron_prism.train.objective import Objective
from megatron_prism.train.schedule import lr_at
from megatron_prism.train.step import Means, forward_backward
from megatron_prism.train.timers import Timers, summary
from megatron_prism.train.watchdog import Watchdog

Microbatches = list[dict[str, torch.Tensor]]


@dataclass
class Progress:
    """What a run counts beside its steps, kept in its checkpoints: the prompts drawn, with those ahead of their step, and the tokens trained on."""

    num_drawn: int = 0
    num_tokens: int = 0


@dataclass(frozen=True)
class Run:
    """Everything the loop works on.

    reference: None without a KL term. bound: of the trust gate; None where the responses come from records. observer: looks at each step.
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
    bound: gate.Bound | None
    observer: Observer
    recorder: Recorder
    saver: safety.Saver
    guard: Guard
    stop: stop.StopRequest
    watchdog: Watchdog
    collect_garbage: Callable[[int], None]


def fit(run: Run, first_step: int) -> dict[str, dict[str, float]]:
    """Train from `first_step` (steps already done) to config.steps; return the validations {step: {metric: value}}.

    Raises: ResultFailure where the guard stops the run. Stopped at a signal or at the time limit, once the step is saved.
    """
    config, progress = run.config, run.progress
    validations: dict[str, dict[str, float]] = {}
    if run.bound is not None:
        _open_gate(run, run.bound)
    if first_step == 0:
        _validate(run, 0, validations)
    timers, longest_s = Timers(), 0.0
    for step in range(first_step + 1, config.steps + 1):
        run.watchdog.doing(f"in step {step}")
        started = time.perf_counter()
        with optim.settled(run.chunks, config.parallel):
            run.observer.begins(step)
            with timers.phase("rollout"):
                rollouts, taken = _collect(run, step)
            rollout_s = time.perf_counter() - started
            with timers.phase("log_probs"):
                microbatches, entropy = _scored(run, rollouts, step)
            if config.rollout.lag and step < config.steps:
                with timers.phase("rollout"):
                    _sample_ahead(run, step)
        lr = lr_at(step, config.steps, config.optimizer.lr, config.schedule)
        means = forward_backward(run.chunks, microbatches, run.objective, run.groups, timers)
        with timers.phase("optimizer", on_device=True):
            grad_norm = optim.measure(run.optimizer)
            run.observer.measured(means, float(grad_norm), lr)
            stop_reason = run.stop.reason(2 * longest_s + run.saver.longest_s)
            decision = decide(run.guard, means.loss, float(grad_norm), stop_reason, run.saver.is_writing())
            if decision.is_taken and means.weight > 0:  # no group to learn from: the step counts, and the weights stay
                optim.apply(run.optimizer, grad_norm, lr, config.optimizer.weight_decay)
        safety.remember(run, step, means.loss, decision, timers)
        _follow(run, step)
        run.observer.ends()
        progress.num_tokens += means.num_tokens
        if config.rollout.keep and run.groups.rank == 0:
            rollout.write(config.run_dir, step, rollouts.groups)
        seconds = time.perf_counter() - started
        if safety.due(step, config.log.interval, config.steps):
            values = _metrics(means, lr, float(grad_norm), seconds) | {"entropy": entropy}
            values |= _of_rollouts(rollouts, rollout_s, step) | taken.figures()
            values |= ({} if decision.is_taken else {"passed_over": 1.0}) | (summary(timers.read(), 1) if config.log.timers else {})
            run.recorder.record(step, values)
        else:
            run.recorder.advance(step)
        if safety.due(step, config.validation.interval, config.steps):
            _validate(run, step, validations)
        if safety.due(step, config.save.interval, config.steps) or decision.stop_reason:
            safety.save(run, step, timers, bool(decision.stop_reason) or not config.save.background, **_facts(run))
        run.collect_garbage(step)
        longest_s = max(longest_s, time.perf_counter() - started)
        if decision.stop_reason and step < config.steps:
            why = stop.name(decision.stop_reason)
            raise Stopped(f"stopped by {why} after step {step}, which is saved; the same command goes on from there")
    run.watchdog.doing("waiting for the last checkpoint")
    run.saver.finish()
    return validations


def _facts(run: Run) -> dict[str, Any]:
    return {"tokens": run.progress.num_tokens, "rl": vars(run.progress).copy(), "files": run.ahead.files()}


def _open_gate(run: Run, bound: gate.Bound) -> None:
    """Compare sampler and trainer on a few prompts. Raises: ResultFailure where they are not the same."""
    run.watchdog.doing("comparing sampler and trainer")
    config = run.config
    sampling = Sampling(max_tokens=config.rollout.max_tokens, temperature=config.rollout.temperature, end_ids=run.sampler.spec.end_ids)
    prompts = [one.tokens for one in run.prompts]
    with optim.settled(run.chunks, config.parallel):
        trust = gate.at_start(run.sampler.engine, run.chunks, prompts, sampling, shape(config), run.groups)
    gate.require(trust, bound)
    if run.groups.rank == 0:
        said = f"KL {trust.kl:.2g}, largest difference {trust.difference:.2g} nats over {trust.num_tokens} tokens"
        log.get().info("sampler and trainer agree: %s", said)


def _collect(run: Run, step: int) -> tuple[Rollouts, Taken]:
    """Return a step's groups, and what was sampled ahead for it."""
    taken = run.ahead.take(step, run.config.rollout.lag, run.saver.num_rewinds)
    if run.groups.rank == 0:
        taken.say(step)
    rollouts = rollout.collect(run.sampler, run.prompts, run.progress.num_drawn, step, taken.groups)
    run.progress.num_drawn = rollouts.num_drawn
    return rollouts, taken


def _sample_ahead(run: Run, step: int) -> None:
    """Sample the responses of the step after this one, by the weights before this one's update, and begin to grade them."""
    sampled = rollout.draw(run.sampler, run.prompts, run.progress.num_drawn, run.config.rollout.num_prompts, step + 1, step - 1)
    run.progress.num_drawn = sampled.num_drawn
    run.ahead.begin(run.sampler, sampled, run.saver.num_rewinds)


def _scored(run: Run, rollouts: Rollouts, step: int) -> tuple[Microbatches, float]:
    """Return this rank's microbatches with the log-probabilities of trainer and reference, and the mean entropy of sampled tokens.

    Raises: ResultFailure where the weights of this very step sampled all of them, and the sampler's log-probabilities are not the trainer's.
    """
    grouped = [group_of(samples, run.config.algorithm) for samples in map(_samples, rollouts.kept)]
    values = [float(value) for group in advantages(grouped, run.config.algorithm) for value in group]
    counted = [bool(value) for group in grouped for value in group.is_counted_G]
    samples = rollout.samples(rollouts.kept)
    trained = [index for index, is_counted in enumerate(counted) if is_counted]
    chosen = [samples[index] for index in trained]
    plan = batches.plan(chosen, shape(run.config), run.groups.dp)
    microbatches = batches.microbatches(plan, run.groups.dp_rank, chosen, [values[index] for index in trained], {})
    scores = log_probs_and_entropies(run.chunks, microbatches, run.groups)
    if run.bound is not None and chosen and all(sample.weights_step == step - 1 for sample in chosen):
        old = batches.by_sample(plan, run.groups.dp_rank, [old_BS for old_BS, _ in scores])
        gate.require_kl(chosen, old, run.bound, run.groups)
    reference_BS = []
    if run.reference is not None:
        with run.reference.in_place():
            reference_BS = log_probs(run.chunks, microbatches, run.groups)
    sums = [0.0, 0.0]
    for index, (batch, (old_BS, entropy_BS)) in enumerate(zip(microbatches, scores, strict=True)):
        batch["old_log_probs"] = old_BS
        if reference_BS:
            batch["ref_log_probs"] = reference_BS[index]
        mask_BS = batch["loss_mask"].to(entropy_BS.device)
        sums = [sums[0] + float((entropy_BS * mask_BS).sum()), sums[1] + float(mask_BS.sum())]
    run.observer.scored(rollouts, plan, chosen, [values[index] for index in trained], microbatches)
    entropy, num_tokens = (sum(part) for part in zip(*gather(sums, run.groups.dp_cp_group), strict=True))
    return microbatches, entropy / max(num_tokens, 1.0)


def _samples(group: rollout.Group) -> list[Sample]:
    return [response.sample for response in group]


def shape(config: RLConfig) -> batches.Shape:
    """Return what microbatches must look like."""
    grid = config.parallel
    multiple = grid.tp if grid.sequence_parallel else 1
    return batches.Shape(seq_length=config.batch.seq_length, micro_size=config.batch.micro_size, token_multiple=multiple)


def _follow(run: Run, step: int) -> None:
    if run.reference is not None:
        with optim.settled(run.chunks, run.config.parallel):
            run.reference.update(step)


def _metrics(means: Means, lr: float, grad_norm: float, seconds: float) -> dict[str, float | None]:
    return {
        "loss": means.loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "step_s": seconds,
        "tokens_per_s": means.num_tokens / seconds,
        "trained_tokens": means.num_tokens,
        **means.reports,
    }


def _of_rollouts(rollouts: Rollouts, seconds: float, step: int) -> dict[str, float | None]:
    num_tokens = sum(len(sample.token_ids) for sample in rollout.samples(rollouts.groups))
    lags = [lag_of(group, step) for group in rollouts.kept] or [0]
    lag = {"lag": fmean(lags), "lag_max": float(max(lags))}
    return {**figures.of_rollouts(rollouts), **figures.by_domain(rollouts), **lag, "rollout_tokens_per_s": num_tokens / seconds}


def _validate(run: Run, step: int, validations: dict[str, dict[str, float]]) -> None:
    """Add the validation after a step to `validations`."""
    if not run.valid_prompts:
        return
    run.watchdog.doing(f"validating after step {step}")
    with optim.settled(run.chunks, run.config.parallel):
        values = figures.of_validation([_samples(group) for group in rollout.validate(run.sampler, run.valid_prompts, step)])
    validations[str(step)] = values
    run.recorder.record_validation(step, values, "valid")
    log.get().info("step %d validation: %s", step, "  ".join(f"{name} {value:.4f}" for name, value in values.items()))
