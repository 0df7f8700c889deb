"""What the tests of the vLLM engine run on the ranks of a gang. A family a gang: vLLM keeps its process groups for the life of a process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_prism.core.errors import ResultFailure
from megatron_prism.generate.engine import Sampling
from megatron_prism.parallel.groups import Groups
from megatron_prism.rl import gate
from megatron_prism.rl.batches import Shape

PROMPTS = [[5, 9, 14, 200, 31, 7], [1], [60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70, 71], [250, 3, 250]]
SAMPLING = Sampling(max_tokens=20, temperature=1.0)
CONTEXT = 64
NUM_DRAWN = 1000


def built(groups: Groups, ckpt: str, precision: str) -> tuple[list[Any], Any]:
    from megatron_prism.checkpoint import folder, sharded
    from megatron_prism.core.config import GangConfig, ParallelConfig
    from megatron_prism.models import build

    torch.set_num_threads(1)
    parallel = ParallelConfig(tp=groups.tp, pp=groups.pp, sequence_parallel=groups.tp > 1)
    model = folder.read(Path(ckpt)).model
    chunks = build.build(model, groups, GangConfig(parallel=parallel, precision=precision, seed=0))  # type: ignore[arg-type]
    sharded.load_weights(Path(ckpt), chunks)
    return chunks, model


def engine_on(groups: Groups, ckpt: str, chunks: list[Any], model: Any, precision: str, tensor_parallel: int = 1) -> Any:
    from megatron_prism.checkpoint import folder
    from megatron_prism.generate.vllm import VLLM

    own = {"num_rows": 16, "tensor_parallel": tensor_parallel, "memory_share": 0.004}
    return VLLM(chunks, model, groups, folder.read(Path(ckpt)).assets, precision, CONTEXT, **own)  # type: ignore[arg-type]


def measured(engine: Any, chunks: list[Any], groups: Groups) -> list[float]:
    trust = gate.measure(engine, chunks, PROMPTS, 3, SAMPLING, Shape(seq_length=64, micro_size=2, token_multiple=groups.tp), groups)
    return [trust.kl, trust.difference, trust.num_tokens]


@torch.no_grad()
def step(chunks: list[Any], seed: int) -> None:
    """Change every weight as an optimizer's step does, the same on every layout that holds it whole."""
    for parameter in chunks[0].parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.01
        parameter.mul_(0.95) if parameter.dim() == 1 else parameter.add_(noise.to(parameter.dtype))


def trusted(groups: Groups, ckpt: str, precision: str = "fp32", tensor_parallel: int = 1, num_updates: int = 2) -> dict[str, Any]:
    """Measure at the start and after each update; then what the engine says of seeds, ends and what it cannot do."""
    chunks, model = built(groups, ckpt, precision)
    random_state = torch.get_rng_state()
    engine = engine_on(groups, ckpt, chunks, model, precision, tensor_parallel)
    trusts = [measured(engine, chunks, groups)]
    for number in range(num_updates):
        if groups.tp == groups.pp == 1:
            step(chunks, number)
        else:
            with torch.no_grad():
                [parameter.mul_(0.9) for parameter in chunks[0].parameters()]
        trusts.append(measured(engine, chunks, groups))
    seeds = list(range(10, 10 + len(PROMPTS)))
    first, again = (engine.generate(PROMPTS, 2, SAMPLING, seeds) for _ in range(2))
    other = engine.generate(PROMPTS, 2, SAMPLING, [seed + 1 for seed in seeds])
    alone = engine.generate(PROMPTS[2:3], 2, SAMPLING, seeds[2:3])
    greedy = engine.generate(PROMPTS, 1, Sampling(max_tokens=20), seeds)
    end = first[0].token_ids[4]
    ended = engine.generate(PROMPTS[:1], 2, Sampling(max_tokens=20, temperature=1.0, end_ids=(end,)), seeds[:1])[0]
    full = engine.generate([[3] * (CONTEXT - 5)], 1, SAMPLING, [1])[0]
    return {
        "trusts": trusts,
        "num_updates": engine.num_updates,
        "tokens": [rollout.token_ids.tolist() for rollout in first],
        "again": first == again,
        "other": [rollout.token_ids.tolist() for rollout in other],
        "order": [(rollout.prompt, rollout.sample) for rollout in first],
        "alone": [rollout.token_ids.tolist() for rollout in alone],
        "greedy": [rollout.token_ids.tolist() for rollout in greedy],
        "cached": cached_greedy(chunks, model, groups, seeds),
        "ended": [
            ended.ended,
            ended.token_ids == first[0].token_ids[: len(ended.token_ids)],
            ended.token_ids[-1] == end,
            ended.token_ids.count(end),
        ],
        "full": [full.ended, len(full.token_ids)],
        "generators": bool(torch.equal(random_state, torch.get_rng_state())),
        "distances": distances(engine, chunks, model, groups),
    }


def cached_greedy(chunks: list[Any], model: Any, groups: Groups, seeds: list[int]) -> list[list[int]]:
    from megatron_prism.generate.cached import Cached

    rollouts = Cached(chunks, model, groups, max_context=CONTEXT).generate(PROMPTS, 1, Sampling(max_tokens=20), seeds)
    return [rollout.token_ids.tolist() for rollout in rollouts]


def distances(engine: Any, chunks: list[Any], model: Any, groups: Groups) -> dict[str, list[float]]:
    """Compare the first tokens that vLLM and the cached engine draw by the same settings, and by vLLM's at another temperature.

    Returns the total variation distance of each pair of frequencies, and the log-probabilities that vLLM reports.
    """
    from megatron_prism.generate.cached import Cached

    cached = Cached(chunks, model, groups, max_context=CONTEXT)

    def frequencies(engine: Any, sampling: Sampling) -> Counter[int]:
        drawn = engine.generate(PROMPTS[:1], NUM_DRAWN, sampling, [5])
        return Counter(rollout.token_ids[0] for rollout in drawn)

    def distance(one: Counter[int], other: Counter[int]) -> float:
        return sum(abs(one[token] - other[token]) for token in {*one, *other}) / 2 / NUM_DRAWN

    said = {}
    for name, own in (("sharp", {"temperature": 0.1, "top_p": 0.7}), ("top_k", {"temperature": 1.0, "top_k": 5})):
        sampling = Sampling(max_tokens=1, **own)  # type: ignore[arg-type]
        ours, flat = frequencies(cached, sampling), Sampling(max_tokens=1, temperature=1.0)
        said[name] = [distance(ours, frequencies(engine, sampling)), distance(ours, frequencies(engine, flat))]
        said[name].append(len(engine.generate(PROMPTS[:1], 1, sampling, [5])[0].logprobs))
    return said


def faulty(groups: Groups, ckpt: str, faults: list[list[str]]) -> dict[str, Any]:
    """Build faults into what vLLM loads, one after another, and return what the engine says of each. A fault: two names to be swapped, or one lost."""
    from megatron_prism.generate import vllm_weights

    chunks, model = built(groups, ckpt, "fp32")
    engine = engine_on(groups, ckpt, chunks, model, "fp32")
    said: dict[str, Any] = {"start": measured(engine, chunks, groups)}
    summed = vllm_weights.SameProcess._summed
    for number, names in enumerate(faults):
        step(chunks, number)

        def wrong(self: Any, info: Any, names: list[str] = names) -> Iterator[tuple[str, torch.Tensor]]:
            tensors = dict(summed(self, info))
            if len(names) == 2:
                tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
            else:
                del tensors[names[0]]
            yield from tensors.items()

        with mock.patch.object(vllm_weights.SameProcess, "_summed", wrong):
            try:
                engine.generate(PROMPTS, 1, SAMPLING, [0] * len(PROMPTS))
                said[" ".join(names)] = ""
            except ResultFailure as failure:
                said[" ".join(names)] = str(failure)
    with mock.patch.object(engine, "_follow"):  # an engine that keeps its weights, which the gate must see
        step(chunks, 7)
        said["stale"] = measured(engine, chunks, groups)
    said["healed"] = measured(engine, chunks, groups)
    with mock.patch.object(vllm_weights, "repack_heads"):  # what vLLM alone leaves behind
        step(chunks, 8)
        said["no repacked head"] = measured(engine, chunks, groups)
    return said
