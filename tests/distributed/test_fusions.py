"""Fused cross-entropy and gradients in bf16: what they change, beside the plain ones, on the model's own step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_prism.core.config import GangConfig, ModelConfig
from megatron_prism.core.load import build as read
from tests.distributed.test_chunked_loss import HYBRID, MODEL


def compared(grid: Any, model: dict[str, Any], layout: dict[str, Any], changes: dict[str, Any], control: dict[str, Any]) -> dict[str, Any]:
    """On a rank: loss and gradients of a bf16 step as it is, and of the same weights with `changes` (and in a model changed by `control`)."""
    from megatron_prism.models import build
    from megatron_prism.parallel import groups as gangs
    from megatron_prism.train import optim, step
    from megatron_prism.train.objective import CROSS_ENTROPY
    from megatron_prism.train.timers import Timers

    plain = read({"precision": "bf16", "parallel": {**layout, "distributed_optimizer": False}}, GangConfig, str)
    settings = {"precision": "bf16", **changes, "parallel": {**layout, "distributed_optimizer": False, **changes.get("parallel", {})}}
    fused = read(settings, GangConfig, str)
    one = build.build(read(model, ModelConfig, str), grid, plain)
    other = build.build(read(model | control, ModelConfig, str), grid, fused)
    for source, target in zip(one, other, strict=True):
        target.load_state_dict(source.state_dict())
    draw = torch.Generator().manual_seed(grid.dp_rank)
    drawn = [torch.randint(0, model["vocab_size"], (2, 16), generator=draw) for _ in range(4)]
    whole = {"position_ids": torch.arange(16).expand(2, 16), "loss_mask": torch.ones(2, 16).index_fill(1, torch.tensor([5]), 0.0)}
    batches = [{"tokens": tokens_BS, "labels": tokens_BS.roll(-1, 1), **whole} for tokens_BS in drawn]
    results = []
    for bare, config in ((one, plain), (other, fused)):
        chunks = optim.wrap(bare, config)
        loss = step.read(step.forward_backward(chunks, batches, CROSS_ENTROPY, grid, Timers()))[0].loss
        parts = [parameter.main_grad for chunk in chunks for parameter in chunk.parameters()]
        results.append((loss, torch.cat([part.float().flatten() for part in parts]), str(parts[0].dtype)))
    (loss, gradients, _), (new_loss, new_gradients, dtype) = results
    errors = [abs(new_loss - loss) / loss, float((new_gradients - gradients).norm() / gradients.norm())]
    return {"loss": max(gangs.gather(errors[0])), "gradients": max(gangs.gather(errors[1])), "dtype": dtype}


@pytest.mark.parametrize(
    ("model", "layout"), [(MODEL, {}), (HYBRID, {}), pytest.param(MODEL, {"tp": 2, "sequence_parallel": True}, marks=pytest.mark.slow)]
)
def test_the_fused_cross_entropy_is_the_plain_one(
    run_distributed: Callable[..., list[Any]], model: dict[str, Any], layout: dict[str, Any]
) -> None:
    arguments = {"model": model, "layout": layout, "changes": {"fusion": {"cross_entropy": "native"}}}
    told = run_distributed(compared, layout.get("tp", 1), parallel=layout, control={}, **arguments)[0]
    assert told["loss"] < 1e-6 and told["gradients"] < 1e-3, told


def test_a_scale_that_the_fused_cross_entropy_missed_would_be_seen(run_distributed: Callable[..., list[Any]]) -> None:
    arguments = {"model": MODEL, "layout": {}, "changes": {"fusion": {"cross_entropy": "native"}}, "control": {"logits_scaling": 1.0}}
    assert run_distributed(compared, 1, **arguments)[0]["gradients"] > 0.1


@pytest.mark.parametrize("layout", [{}, pytest.param({"pp": 2}, marks=pytest.mark.slow)])
def test_gradients_in_bf16_are_rounded_sums(run_distributed: Callable[..., list[Any]], layout: dict[str, Any]) -> None:
    arguments = {"model": MODEL, "layout": layout, "changes": {"parallel": {"grad_reduce": "bf16"}}, "control": {}}
    told = run_distributed(compared, layout.get("pp", 1), parallel=layout, **arguments)[0]
    assert told["dtype"] == "torch.bfloat16" and told["loss"] < 1e-6
    assert 1e-5 < told["gradients"] < 1e-2, told
