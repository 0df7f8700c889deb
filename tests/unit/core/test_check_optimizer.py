"""The optimizer's moments against the rest of a run and its machine: one change to a valid config a rule, named by its key."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_prism.core.check import train
from megatron_prism.core.check.optimizer import LARGEST_DECAY, check_adam
from megatron_prism.core.check.precision import Machine
from megatron_prism.core.config import GangConfig, TrainConfig
from megatron_prism.core.load import build

H100 = Machine(has_cuda=True, capability=(9, 0), cuda=(12, 9), transformer_engine=(2, 11))
MODEL = {
    "family": "llama",
    "num_layers": 4,
    "hidden_size": 128,
    "ffn_hidden_size": 256,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 32,
    "vocab_size": 390,
    "max_position_embeddings": 128,
}


def bf16(values: dict[str, Any], **more: Any) -> TrainConfig:
    """Return a run with moments in bf16, and further sections."""
    optimizer = {"moments": "bf16", **more.get("optimizer", {})}
    return build({**values, "precision": "bf16", **more, "optimizer": optimizer}, TrainConfig, str)


@pytest.mark.parametrize(
    "more", [{}, {"fp8": {}}, {"optimizer": {"beta1": 0.0, "beta2": LARGEST_DECAY}}, {"parallel": {"grad_reduce": "bf16"}}]
)
def test_a_config_that_holds_has_no_problem(values: dict[str, Any], more: dict[str, Any]) -> None:
    config = bf16(values, **more)
    assert train.check_train(config, 2) == [] and list(check_adam(config, H100)) == []


@pytest.mark.parametrize(
    ("more", "where", "found"),
    [
        ({"precision": "fp32"}, "optimizer.moments", "bf16 with precision fp32"),
        ({"parallel": {"distributed_optimizer": False}}, "optimizer.moments", "bf16"),
        ({"offload": {"optimizer_fraction": 0.5}}, "optimizer.moments", "bf16 with offload.optimizer_fraction 0.5"),
        ({"optimizer": {"beta2": 0.999}}, "optimizer.beta2", "0.999 with optimizer.moments bf16"),
        ({"optimizer": {"beta1": 0.997}}, "optimizer.beta1", "0.997 with optimizer.moments bf16"),
        ({"fp8": {"param": True}, "init": {"tokenizer": "t"}, "model": MODEL}, "optimizer.moments", "bf16 with fp8.param"),
    ],
)
def test_what_moments_in_bf16_cannot_go_with_is_named(values: dict[str, Any], more: dict[str, Any], where: str, found: str) -> None:
    (problem,) = train.check_train(bf16(values, **more), 2)
    assert (problem.where, problem.found) == (where, found) and problem.required
    of_fp32 = bf16(values, **more)
    of_fp32 = dataclasses.replace(of_fp32, optimizer=dataclasses.replace(of_fp32.optimizer, moments="fp32"))
    assert train.check_train(of_fp32, 2) == []


@pytest.mark.parametrize(
    ("machine", "found"),
    [
        (Machine(has_cuda=False), "bf16 on a machine without a CUDA device"),
        (dataclasses.replace(H100, transformer_engine=(2, 2)), "bf16 with Transformer Engine 2.2"),
    ],
)
def test_a_machine_that_cannot_is_named(values: dict[str, Any], machine: Machine, found: str) -> None:
    (problem,) = check_adam(bf16(values), machine)
    assert (problem.where, problem.found) == ("optimizer.moments", found)
    assert list(check_adam(build(values, TrainConfig, str), machine)) == []
    assert list(check_adam(bf16(values), dataclasses.replace(H100, transformer_engine=(2, 3)))) == []  # the first that can


def test_a_gang_that_trains_nothing_asks_for_no_optimizer() -> None:
    """As of `prism evaluate`, `rl filter` and `analyze cka`, on any machine."""
    assert list(check_adam(GangConfig(), Machine(has_cuda=False))) == []


def test_a_moment_in_bf16_falls_up_to_the_largest_decay_and_may_not_beyond() -> None:
    import torch

    every = torch.arange(0x3F80, 0x4000, dtype=torch.int16).view(torch.bfloat16)  # all of bf16 between 1 and 2
    falls = [bool(((every.float() * decay).bfloat16() < every).all()) for decay in (LARGEST_DECAY, 0.999)]
    assert falls == [True, False]
