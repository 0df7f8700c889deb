"""The filter's loop: the responses to each prompt of a set, shard by shard, become pass counts. And the figures of what came of it.

A response's random numbers depend on the seed, its prompt's id and its own number: not on the other prompts, their order, or the shards.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from megatron_prism.core import log
from megatron_prism.core.config import FilterConfig
from megatron_prism.core.errors import PrismError, Stopped
from megatron_prism.data.prompts import Prompt
from megatron_prism.data.tokenizer import TokenizerSpec
from megatron_prism.generate.engine import Engine, Rollout, Sampling, seed_of
from megatron_prism.grade.outcome import Graded, Outcome
from megatron_prism.parallel.groups import Groups, agree
from megatron_prism.rl import gate, rollout
from megatron_prism.rl.batches import Shape
from megatron_prism.rl.passes import Folder, PassCount
from megatron_prism.rl.rollout import Encoded, Grades, Sampled
from megatron_prism.train import stop
from megatron_prism.train.watchdog import Watchdog


@dataclass(frozen=True)
class Filter:
    """Everything the loop works on. folder, grader: rank 0's alone are used."""

    config: FilterConfig
    groups: Groups
    chunks: Sequence[Any]
    prompts: Sequence[Encoded]
    folder: Folder
    engine: Engine
    spec: TokenizerSpec
    grader: Grades | None
    stop: stop.StopRequest
    watchdog: Watchdog

    @property
    def is_first(self) -> bool:
        """Whether this rank writes and speaks."""
        return self.groups.rank == 0


def seed(run_seed: int, prompt_id: str) -> int:
    """Return the seed of a prompt's responses; engine.Sampling draws each response's own from it."""
    return seed_of(run_seed, int.from_bytes(hashlib.blake2b(prompt_id.encode("utf-8", "backslashreplace"), digest_size=8).digest(), "big"))


def run(work: Filter, missing: Sequence[int]) -> None:
    """Sample and grade the shards that are missing. Every rank calls this with the same ones. A shard is graded while the next one is sampled.

    Raises: Stopped at a signal or at the time limit, once what was sampled is written. ResultFailure where the engine is not the model.
    """
    config, prompts = work.config, work.prompts
    _open_gate(work)
    started, longest_s, num_responses = time.perf_counter(), 0.0, config.rollout.num_samples
    grading: list[_Grading] = []  # of the shard before
    with ThreadPoolExecutor(1, "grade") as pool:
        for number, shard in enumerate(missing, 1):
            if reason := agree([work.stop.reason(1.2 * longest_s)])[0]:
                _write(work, grading)
                done = work.folder.num_shards - len(missing) + number - 1
                counted = f"{done} of {work.folder.num_shards} shards are counted; the same command goes on from there"
                raise Stopped(f"stopped by {stop.name(reason)}: {counted}")
            work.watchdog.doing(f"in shard {shard} of {work.folder.num_shards}")
            began = time.perf_counter()
            chosen = [prompts[place] for place in work.folder.places(shard)]
            seeds = [seed(config.seed, one.prompt.id) for one in chosen]
            sampled = rollout.sample(work.engine, work.spec, config.rollout, chosen, num_responses, seeds, weights_step=0)
            _write(work, grading)
            left_s = (time.perf_counter() - started) / number * (len(missing) - number)
            place = work.folder.num_shards - len(missing) + number
            grading = [_Grading(shard, place, sampled, pool.submit(rollout.grade, work.grader, sampled.items), left_s)]
            longest_s = max(longest_s, time.perf_counter() - began)
        _write(work, grading)


@dataclass(frozen=True)
class _Grading:
    """A shard that rank 0 grades: its number, which one of all it is, its responses, what comes of them, and what was left once it was sampled."""

    shard: int
    place: int
    sampled: Sampled
    outcomes: Future[dict[str, Graded] | PrismError]
    left_s: float


def _write(work: Filter, grading: Sequence[_Grading]) -> None:
    """Wait for the grades of a shard, if there is one, and write it. Every rank calls this."""
    for one in grading:
        counts = count(one.sampled, rollout.agreed(one.outcomes.result()))
        if work.is_first:
            work.folder.write(one.shard, counts)
            log.get().info(
                "shard %d/%d  right %.3f  faults %d  truncated %.3f  tokens/s %.0f  left %s",
                one.place,
                work.folder.num_shards,
                sum(each.num_right for each in counts) / len(one.sampled.items),
                sum(each.num_faults for each in counts),
                sum(each.num_truncated for each in counts) / len(one.sampled.items),
                one.sampled.speed.tokens_per_s() or 0.0,
                log.duration(one.left_s),
            )


def _open_gate(work: Filter) -> None:
    """Compare the engine with the model's own pass on a few prompts, at temperature 1: a wrong engine's counts would look like a weak model's."""
    work.watchdog.doing("comparing sampler and model")
    config, tp = work.config, work.config.parallel.tp
    sampling = Sampling(max_tokens=config.rollout.max_tokens, temperature=1.0, end_ids=work.spec.end_ids)
    tokens = max(len(one.tokens) for one in work.prompts) + gate.START_TOKENS
    shape = Shape(seq_length=-(-tokens // tp) * tp, micro_size=1, token_multiple=tp if config.parallel.sequence_parallel else 1)
    trust = gate.at_start(work.engine, work.chunks, [one.tokens for one in work.prompts], sampling, shape, work.groups)
    gate.require(trust, gate.bound_of(config.precision, config.rollout))
    if work.is_first:
        log.get().info("sampler and model agree: KL %.2g over %d tokens", trust.kl, trust.num_tokens)


def count(sampled: Sampled, outcomes: Mapping[str, Graded]) -> list[PassCount]:
    """Return the pass counts of graded responses, a prompt each."""
    by_prompt: list[list[tuple[Rollout, Outcome]]] = [[] for _ in sampled.prompts]
    for response, item in zip(sampled.rollouts, sampled.items, strict=True):
        by_prompt[response.prompt].append((response, outcomes[item.id].outcome))
    return [
        PassCount(
            id=one.prompt.id,
            num_right=sum(outcome == "right" for _, outcome in responses),
            num_samples=len(responses),
            num_faults=sum(outcome == "fault" for _, outcome in responses),
            num_truncated=sum(response.ended != "end_token" for response, _ in responses),
            mean_tokens=fmean(len(response.token_ids) for response, _ in responses),
        )
        for one, responses in zip(sampled.prompts, by_prompt, strict=True)
    ]


def by_domain(prompts: Iterable[Prompt], counts: Iterable[PassCount], num_samples: int) -> dict[str, dict[str, Any]]:
    """Return the figures of each domain. histogram: the prompts with 0, 1, ... num_samples right answers; those with a fault are not in it."""
    domain_of = {prompt.id: prompt.domain for prompt in prompts}
    grouped: dict[str, list[PassCount]] = {}
    for one in counts:
        grouped.setdefault(domain_of[one.id], []).append(one)
    figures = {}
    for domain, of_domain in sorted(grouped.items()):
        judged = [one.num_right for one in of_domain if not one.num_faults]
        num_verdicts = sum(one.num_samples - one.num_faults for one in of_domain)
        figures[domain] = {
            "prompts": len(of_domain),
            "prompts_with_faults": len(of_domain) - len(judged),
            "right": sum(one.num_right for one in of_domain) / max(num_verdicts, 1),
            "truncated": sum(one.num_truncated for one in of_domain) / (len(of_domain) * num_samples),
            "mean_tokens": fmean(one.mean_tokens for one in of_domain),
            "histogram": [judged.count(num_right) for num_right in range(num_samples + 1)],
        }
    return figures
