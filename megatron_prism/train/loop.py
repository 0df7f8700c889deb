"""The loop around the step: learning rate, step, log, validate, save. It knows no file format and no layout."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_prism.core import log
from megatron_prism.core.config import TrainConfig
from megatron_prism.core.errors import ResultFailure
from megatron_prism.parallel.groups import Groups
from megatron_prism.planning.flops import Flops
from megatron_prism.train import optim
from megatron_prism.train.metrics import Recorder
from megatron_prism.train.schedule import lr_at
from megatron_prism.train.step import Batch, StepResult, train_step, validate


@dataclass(frozen=True)
class Run:
    """Everything the loop works on. valid_batches: this rank's microbatches by source; save: write a checkpoint at a step."""

    config: TrainConfig
    groups: Groups
    chunks: Sequence[Any]
    optimizer: Any
    train_batches: Iterator[Sequence[Batch]]
    valid_batches: Mapping[str, Sequence[Batch]]
    flops: Flops
    peak_tflops: float | None
    recorder: Recorder
    save: Callable[[int], None]


def fit(run: Run, first_step: int) -> dict[str, dict[str, float]]:
    """Train from `first_step` (steps already done) to config.steps; return validation losses {source: {step: loss}}.

    Raises: ResultFailure where the loss is not a number: no checkpoint is written after that.
    """
    config, losses = run.config, _Losses({name: {} for name in run.valid_batches})
    if first_step == 0:
        losses.add(0, _validate(run, 0))
    since_log = _Pace()
    for step in range(first_step + 1, config.steps + 1):
        started = time.perf_counter()
        lr = lr_at(step, config.steps, config.optimizer.lr, config.schedule)
        result = train_step(run.chunks, run.optimizer, next(run.train_batches), lr, config.optimizer.weight_decay, run.groups)
        if not math.isfinite(result.loss) or not math.isfinite(result.grad_norm):
            raise ResultFailure(f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: not a number; the last checkpoint is good")
        since_log = since_log.plus(result.num_tokens, time.perf_counter() - started)
        if _due(step, config.log.interval, config.steps):
            run.recorder.record(step, _metrics(run, result, lr, since_log))
            since_log = _Pace()
        else:
            run.recorder.advance(step)
        if _due(step, config.validation.interval, config.steps):
            losses.add(step, _validate(run, step))
        if _due(step, config.save.interval, config.steps):
            with optim.settled(run.chunks, config.parallel):
                run.save(step)
    return losses.by_source


@dataclass(frozen=True)
class _Pace:
    """Steps, tokens and seconds since the last log line; validation and saving are not counted."""

    num_steps: int = 0
    num_tokens: int = 0
    seconds: float = 0.0

    def plus(self, num_tokens: int, seconds: float) -> _Pace:
        return _Pace(self.num_steps + 1, self.num_tokens + num_tokens, self.seconds + seconds)


@dataclass(frozen=True)
class _Losses:
    by_source: dict[str, dict[str, float]]

    def add(self, step: int, found: Mapping[str, float]) -> None:
        for name, loss in found.items():
            self.by_source[name][str(step)] = loss


def _due(step: int, interval: int, steps: int) -> bool:
    return step == steps or (interval > 0 and step % interval == 0)


def _metrics(run: Run, result: StepResult, lr: float, pace: _Pace) -> dict[str, float | None]:
    """Return a step's metrics; rates are over all ranks, TFLOP/s and MFU a rank, MFU in the causal convention."""
    tokens_per_s = pace.num_tokens / pace.seconds
    tflops = tokens_per_s * run.flops.causal / run.groups.world_size / 1e12
    return {
        "loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        "step_s": pace.seconds / pace.num_steps,
        "tokens_per_s": tokens_per_s,
        "tflops_per_rank_causal": tflops,
        "mfu_causal": tflops / run.peak_tflops if run.peak_tflops else None,
    }


def _validate(run: Run, step: int) -> dict[str, float]:
    with optim.settled(run.chunks, run.config.parallel):
        found = {name: validate(run.chunks, batches, run.groups) for name, batches in run.valid_batches.items()}
    if found:
        run.recorder.record_validation(step, found)
        log.get().info("step %d validation loss: %s", step, "  ".join(f"{name} {loss:.4f}" for name, loss in found.items()))
    return found
