"""The loop of an evaluation: what was not sampled before is sampled, shard by shard, and graded while the next shard is sampled.

Rank 0 has the questions, the grader and the folder; the other ranks only generate. A shard's responses are written whole, then graded in
parts, each written whole: a kill loses a shard at most, and nothing that was written is made again.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any, Protocol

from megatron_prism.core import log
from megatron_prism.core.errors import Stopped
from megatron_prism.data import tokenizer
from megatron_prism.data.tokenizer import TokenizerSpec
from megatron_prism.eval.judge import Judge
from megatron_prism.eval.requests import Request
from megatron_prism.generate.cached import Cached
from megatron_prism.generate.engine import Engine, Rollout
from megatron_prism.parallel.groups import Groups, agree, from_first, on_first
from megatron_prism.train import stop
from megatron_prism.train.watchdog import Watchdog

GRADED_TOGETHER = 64  # the responses of a part: what is lost of the grades at most
LOGPROB_DIGITS = 3  # kept of a mean log-probability: the last ones follow the layout's rounding
TICK_S = 20.0  # between two looks at a signal while the grader is waited for


class Sampler(Protocol):
    """What answers requests. Every rank of the gang calls it, rank 0 with the shard; rank 0 gets the responses, by key, and the faults in words."""

    def sample(self, shard: Sequence[Request] | None) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the responses of a shard as they are kept: {text, num_tokens, ended, mean_logprob}."""
        ...


@dataclass(frozen=True)
class Local:
    """The gang's own engine. cache_tokens: the most that the cached engine's rows hold together; None: num_rows whatever their length."""

    engine: Engine
    spec: TokenizerSpec
    cache_tokens: int | None = None

    def sample(self, shard: Sequence[Request] | None) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the responses of a shard."""
        given = None if shard is None else ([list(one.asked.tokens) for one in shard], shard[0].sampling, [one.seed for one in shard])
        given = from_first(given)
        assert given is not None
        prompts, sampling, seeds = given
        engine, longest = self.engine, max(map(len, prompts)) + sampling.max_tokens
        rollouts = (engine.within(self.cache_tokens, longest) if isinstance(engine, Cached) else engine).generate(
            prompts, 1, sampling, seeds
        )
        return ({} if shard is None else {one.key: self._kept(one, rollout) for one, rollout in zip(shard, rollouts, strict=True)}), {}

    def _kept(self, request: Request, rollout: Rollout) -> dict[str, Any]:
        return {
            "text": tokenizer.continuation(request.asked.tokens, rollout.token_ids, self.spec),
            "num_tokens": len(rollout.token_ids),
            "ended": rollout.ended,
            "mean_logprob": round(fmean(rollout.logprobs), LOGPROB_DIGITS) if rollout.logprobs else None,  # vLLM has none under top_p
        }


@dataclass(frozen=True)
class Work:
    """Everything the loop works on. judge: rank 0's alone."""

    groups: Groups
    judge: Judge | None
    stop: stop.StopRequest
    watchdog: Watchdog
    _pending: deque[Future[Counter[tuple[str, str]]]] = field(default_factory=deque)
    _counts: Counter[tuple[str, str]] = field(default_factory=Counter)


def run(work: Work, sampler: Sampler | None, shards: Sequence[Sequence[Request]], ungraded: Sequence[Request]) -> None:
    """Sample and grade shards, and grade what was sampled before. Every rank calls this; rank 0's shards and ungraded count.

    sampler: None where there are no shards.

    Raises: Stopped at a signal or at the time limit, once the shard is written. What the grader raises, on every rank.
    """
    num_shards, started, longest_s, num_tokens = from_first(len(shards)), time.perf_counter(), 0.0, 0
    pool = ThreadPoolExecutor(1, "grade")
    try:
        _submit(work, pool, ungraded)
        for number in range(num_shards):
            _stop_if_asked(work, 1.2 * longest_s, f"{number} of {num_shards} shards are sampled")
            work.watchdog.doing(f"in shard {number + 1} of {num_shards}")
            began = time.perf_counter()
            shard = shards[number] if work.judge is not None else None
            assert sampler is not None
            samples, faults = sampler.sample(shard)
            on_first(partial(_keep, work, shard or (), samples, faults))
            seconds = time.perf_counter() - began
            longest_s = max(longest_s, seconds)
            _await(work, 1 if shard is None else -(-len(shard) // GRADED_TOGETHER))
            if shard is not None:
                _submit(work, pool, [one for one in shard if one.key in samples])
                num_tokens = sum(value["num_tokens"] for value in samples.values())
                left_s = (time.perf_counter() - started) / (number + 1) * (num_shards - number - 1)
                _tell(work, shard[0].task, number + 1, num_shards, num_tokens / seconds, left_s)
        _await(work, 0)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def pause(work: Work, doing: str) -> None:
    """Tell the watchdog what begins, and heed a signal. Every rank calls this. Raises: Stopped."""
    work.watchdog.doing(doing)
    _stop_if_asked(work, 0.0, f"in {doing}")


def _submit(work: Work, pool: ThreadPoolExecutor, requests: Sequence[Request]) -> None:
    if work.judge is not None:
        for first in range(0, len(requests), GRADED_TOGETHER):
            work._pending.append(pool.submit(work.judge.grade, requests[first : first + GRADED_TOGETHER]))


def _keep(work: Work, shard: Sequence[Request], samples: Mapping[str, Any], faults: Mapping[str, str]) -> None:
    assert work.judge is not None
    work.judge.samples.write(samples)
    work.judge.faults.update(faults)
    work._counts.update((one.task, "fault") for one in shard if one.key in faults)


def _await(work: Work, num_left: int) -> None:
    """Wait until the grader has at most so many parts before it. Every rank calls this. Raises: what the grader raised; Stopped."""
    is_waiting = True
    while is_waiting:
        on_first(lambda: _collect(work, num_left))
        is_waiting = bool(agree([float(len(work._pending) > num_left)])[0])
        if is_waiting:
            work.watchdog.doing("waiting for the grader")
            _stop_if_asked(work, 0.0, "all that was asked for so far is sampled")


def _collect(work: Work, num_left: int) -> None:
    ends = time.monotonic() + TICK_S
    while len(work._pending) > num_left and (left_s := ends - time.monotonic()) > 0:
        if wait([work._pending[0]], timeout=left_s).done:
            work._counts.update(work._pending.popleft().result())


def _stop_if_asked(work: Work, reserve_s: float, done: str) -> None:
    if reason := agree([work.stop.reason(reserve_s)])[0]:
        raise Stopped(f"stopped by {stop.name(reason)}: {done}; the same command goes on from there")


def _tell(work: Work, task: str, number: int, num_shards: int, tokens_per_s: float, left_s: float) -> None:
    counts = {outcome: count for (name, outcome), count in work._counts.items() if name == task}
    num_faults, num_judged = counts.pop("fault", 0), sum(counts.values())
    log.get().info(
        "%s  shard %d/%d  right %.3f of %d so far  faults %d  truncated %.3f  tokens/s %.0f  left %s",
        task,
        number,
        num_shards,
        counts.get("right", 0) / max(num_judged, 1),
        num_judged,
        num_faults,
        counts.get("truncated", 0) / max(num_judged, 1),
        tokens_per_s,
        log.duration(left_s),
    )
