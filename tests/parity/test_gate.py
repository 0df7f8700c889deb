"""The trust gate passes the cached engine for every family, and stops a sampler that is not the trainer's."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_prism.core.errors import InputError, ResultFailure
from megatron_prism.generate.engine import Sampling, ids_of, logprobs_of
from megatron_prism.parallel.groups import Groups
from megatron_prism.rl import gate
from megatron_prism.rl.batches import Shape
from megatron_prism.rl.sample import Sample

from .tiny import FAMILIES

HYBRIDS = ("granite_h_micro", "nemotron_h")
FAULTS = {
    "no logits scaling": ("granite", "granite_micro", "granite_h_micro"),
    "stale head": ("granite", "granite_h_micro"),  # tied to the embedding
    "leaking state": HYBRIDS,
    "packed without a mask": ("llama", *HYBRIDS),
}
CONTROLS = [(fault, family) for fault, families in FAULTS.items() for family in families]
PROMPTS = [[5, 9, 14, 200, 31, 7], [1], [60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70, 71], [250, 3, 250]]


def passes(groups: Groups, checkpoints: dict[str, str], faults: list[list[str]]) -> dict[str, Any]:
    """On a rank: the gate's figures of each family, and what it says of each fault."""
    from megatron_prism.checkpoint import folder, sharded
    from megatron_prism.core.config import GangConfig, ParallelConfig
    from megatron_prism.generate.cached import Cached
    from megatron_prism.models import build

    torch.set_num_threads(1)
    said: dict[str, Any] = {}
    for family, ckpt in checkpoints.items():
        parallel = ParallelConfig(tp=groups.tp, pp=groups.pp, sequence_parallel=groups.tp > 1)
        config = GangConfig(parallel=parallel, precision="fp32", seed=0)
        model = folder.read(Path(ckpt)).model
        chunks = build.build(model, groups, config)
        sharded.load_weights(Path(ckpt), chunks)
        said[family] = measured(chunks, model, groups, Cached(chunks, model, groups, num_rows=6))
        for fault in (fault for fault, touched in faults if touched == family):
            said[f"{fault} {family}"] = faulty(fault, chunks, model, groups)
    return said


def measured(chunks: list[Any], model: Any, groups: Groups, engine: Any) -> list[Any]:
    shape = Shape(seq_length=64, micro_size=2, token_multiple=groups.tp)
    trust = gate.measure(engine, chunks, PROMPTS, 3, Sampling(max_tokens=20, temperature=1.0), shape, groups)
    try:
        gate.require(trust, gate.BOUNDS["fp32"])
    except ResultFailure as failure:
        return [trust.kl, trust.difference, trust.num_tokens, str(failure)]
    return [trust.kl, trust.difference, trust.num_tokens, ""]


def faulty(fault: str, chunks: list[Any], model: Any, groups: Groups) -> list[Any]:
    """Build a fault into the sampler, or into how samples are packed, and measure."""
    from megatron_prism.generate import blocks, stage
    from megatron_prism.generate.cached import Cached
    from megatron_prism.rl import batches

    plan_microbatches, prefill, read = batches.microbatches, blocks.Mamba._prefill, stage.weights.read
    stale = chunks[0].shared_embedding_or_output_weight().detach().clone()

    def unmasked(*arguments: Any) -> Any:
        made = plan_microbatches(*arguments)
        return [{name: tensor for name, tensor in batch.items() if name != "document_ids"} for batch in made]

    def leaking(self: Any, xBC_TC: Any, dt_TH: Any, call: Any, conv_RWC: Any, ssm_RHPN: Any) -> Any:
        return prefill(self, xBC_TC, dt_TH, call, conv_RWC, ssm_RHPN.fill_(0.1))

    def with_stale_head(*arguments: Any) -> Any:
        parts, outside, positions = read(*arguments)
        return parts, outside | {"output": stale}, positions

    with torch.no_grad(), mock.patch.object(batches, "microbatches", unmasked if fault == "packed without a mask" else plan_microbatches):
        if fault == "no logits scaling":
            return measured(chunks, model, groups, Cached(chunks, dataclasses.replace(model, logits_scaling=1.0), groups))
        engine = Cached(chunks, model, groups)
        if fault == "leaking state":
            with mock.patch.object(blocks.Mamba, "_prefill", leaking):
                return measured(chunks, model, groups, engine)
        if fault == "stale head":
            weight = chunks[0].shared_embedding_or_output_weight()
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 1e-3)  # a step of the optimizer
            with mock.patch.object(stage.weights, "read", with_stale_head):
                return measured(chunks, model, groups, engine)
        return measured(chunks, model, groups, engine)


@pytest.fixture(scope="module")
def gated(run_distributed: Callable[..., list[Any]], folders: dict[str, Path]) -> Callable[[int, str], dict[str, Any]]:
    kept: dict[str, Any] = {}

    def of(num_ranks: int, layout: str) -> dict[str, Any]:
        if layout not in kept:
            parallel = json.loads(layout)
            families = {family: str(folders[family] / "ckpt") for family in FAMILIES if num_ranks == 1 or family in ("llama", "nemotron_h")}
            faults = CONTROLS if num_ranks == 1 else []
            results = run_distributed(passes, num_ranks, timeout_s=300.0, parallel=parallel, checkpoints=families, faults=faults)
            assert all(result == results[0] for result in results), "another figure on another rank"
            kept[layout] = results[0]
        return kept[layout]

    return of


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cached_engine_passes_for_every_family(gated: Any, family: str) -> None:
    kl, difference, num_tokens, failure = gated(1, "{}")[family]
    assert failure == "" and 0 <= kl < 1e-9 and difference < 1e-4 and num_tokens > 100


@pytest.mark.parametrize("layout", ['{"tp": 2, "sequence_parallel": true}', '{"pp": 2}', '{"distributed_optimizer": false}'])
@pytest.mark.parametrize("family", ["llama", "nemotron_h"])
def test_it_passes_on_layouts(gated: Any, layout: str, family: str) -> None:
    kl, _, num_tokens, failure = gated(2, layout)[family]
    assert failure == "" and 0 <= kl < 1e-9 and num_tokens > 100


@pytest.mark.parametrize(("fault", "family"), CONTROLS)
def test_a_sampler_that_is_not_the_trainers_is_stopped(gated: Any, fault: str, family: str) -> None:
    kl, _, _, failure = gated(1, "{}")[f"{fault} {family}"]
    assert kl > 1e-8, "a fault that hardly shows tests nothing"
    assert "sampler and trainer disagree" in failure and "token" in failure


def sample(logprobs: tuple[float, ...], number: int = 0) -> Sample:
    return Sample(
        prompt_id="p7", sample=number, domain="math", prompt_tokens=(1, 2), token_ids=ids_of(range(10, 10 + len(logprobs))),
        logprobs=logprobs_of(logprobs), ended="end_token", weights_step=0, outcome="right", reward=1.0,
    )  # fmt: skip


def test_the_figures_are_the_written_ones_and_the_worst_token_is_named() -> None:
    trust = gate.compare([sample((-1.0, -2.0)), sample((-0.5,), 3)], [torch.tensor([-1.0, -2.25]), torch.tensor([-0.25])])
    assert trust.num_tokens == 3
    assert trust.kl == pytest.approx((math.exp(-0.25) - 1 + 0.25 + math.exp(0.25) - 1 - 0.25) / 3)
    assert trust.difference == 0.25 and "prompt p7 sample 0: token 1 (id 11): sampler -2, trainer -2.25" in trust.worst


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_no_number_is_not_trusted(value: float) -> None:
    trust = gate.compare([sample((-1.0, -2.0)), sample((-0.5, -1.0), 1)], [torch.tensor([-1.0, -2.0]), torch.tensor([-0.5, value])])
    assert "sample 1: token 1 (id 11)" in trust.worst
    with pytest.raises(ResultFailure, match="sampler and trainer disagree"):
        gate.require(trust, gate.BOUNDS["bf16"])


def test_a_sampler_of_another_distribution_is_refused() -> None:
    wrong = gate.check_sampling(Sampling(max_tokens=1, temperature=0.0, top_k=5, top_p=0.9))
    assert [problem.where for problem in wrong] == ["rollout.temperature", "rollout.top_p", "rollout.top_k"]
    with pytest.raises(InputError):
        gate.measure(mock.Mock(), [], [], 1, Sampling(max_tokens=1, temperature=0.7), Shape(seq_length=8), mock.Mock())
