"""The plan of a job that only samples, by hand: shards of many parts, the longest responses, rates, hours and the memory of a rank."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_prism.core.config import GangConfig, ModelConfig, ParallelConfig, SamplingConfig
from megatron_prism.planning import memory, rollout, sampling
from megatron_prism.planning.gpus import GIB, H100
from megatron_prism.planning.rollout import Lengths, Load
from megatron_prism.planning.stage import Stage

MODEL = ModelConfig(
    family="llama",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=384,
    max_position_embeddings=4096,
)
STAGE = Stage("*-*-", True, True, 1_000_000, 1_000_000, 1_000_000, 1_000_000, 0)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, sampling.Part]:
    """Return two parts on two GPUs; a shard takes a second for each 10 tokens of a response, and its cache a GiB for each 1,000 of context."""

    def seconds(stages: Any, model: Any, load: Any, world_size: int, lengths: Lengths, gpu: Any) -> float:
        return (lengths.response + lengths.prompt) / 10

    monkeypatch.setattr(rollout, "seconds", seconds)
    monkeypatch.setattr(rollout, "memory_bytes", lambda stages, index, model, load, dp, gpu: load.max_context / 1000 * GIB)
    gang = GangConfig(parallel=ParallelConfig(), precision="bf16", seed=0)
    loads = [Load(gang, SamplingConfig(max_tokens=1000), 8, max_context) for max_context in (1000, 3000)]
    return {
        "math": sampling.Part(loads[0], 2.5, 100, Lengths(50, 200, 100, 1000)),
        "code": sampling.Part(loads[1], 4, 40, Lengths(100, 400, 500, 2000)),
    }


def test_seconds_rates_and_hours(parts: dict[str, sampling.Part]) -> None:
    found = sampling.predict_sampling([STAGE], MODEL, parts, 2, H100)
    assert found.seconds == {"math": 2.5 * 25, "code": 4 * 50}, "shards, each as long as its responses"
    assert found.longest_s == {"math": 2.5 * 110, "code": 4 * 250}, "the most that prompt and response may have"
    tokens, total_s = 100 * 200 + 40 * 400, 62.5 + 200
    assert found.tokens_per_s_per_gpu == pytest.approx(tokens / 2 / total_s)
    shown = sampling.figures(found, parts, 2, 3.0)
    assert shown["responses"] == 140 and shown["tokens_per_s"] == pytest.approx(tokens / total_s)
    assert shown["hours"] == pytest.approx(total_s / 3600) and shown["hours_longest"] == pytest.approx((275 + 1000) / 3600)
    assert shown["gpu_hours"] == pytest.approx(2 * total_s / 3600) and shown["usd"] == pytest.approx(6 * total_s / 3600)
    assert shown["parts"]["code"]["hours"] == pytest.approx(200 / 3600) and shown["parts"]["code"]["response_tokens_assumed"] == 400


def test_a_rank_holds_its_weights_and_the_largest_cache(parts: dict[str, sampling.Part]) -> None:
    (found,) = sampling.predict_sampling([STAGE], MODEL, parts, 2, H100).memories
    assert (found.weights, found.cache) == (2_000_000, 3 * GIB), "bf16, and one part after the other"
    assert found.allowance == pytest.approx((memory.CONTEXT_GIB + memory.GROUP_GIB) * GIB + memory.FRAGMENTATION * 3 * GIB), "dp alone"
    assert found.total == found.weights + found.cache + found.allowance
