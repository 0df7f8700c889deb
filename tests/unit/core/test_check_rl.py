"""Every problem that an RL config's checks know: one change to a valid config each, named by its key."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_prism.core.check.rl import check_model, check_rl
from megatron_prism.core.config import ModelConfig, RLConfig
from megatron_prism.core.errors import InputError
from megatron_prism.core.load import build

VALUES: dict[str, Any] = {
    "run_dir": "r",
    "steps": 10,
    "init": {"checkpoint": "c"},
    "prompts": "p",
    "rollout": {"max_tokens": 16},
    "batch": {"seq_length": 64},
}
MODEL = ModelConfig(
    family="llama",
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=176,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=390,
    max_position_embeddings=128,
)


def config(**changes: Any) -> RLConfig:
    changed = {key: VALUES.get(key, {}) | value if isinstance(value, dict) else value for key, value in changes.items()}
    return build(VALUES | changed, RLConfig, str)


def named(given: RLConfig, world_size: int = 1) -> list[str]:
    return [problem.where for problem in check_rl(given, world_size)]


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        ({}, 1),
        ({}, 3),  # data parallel: a step's rows are dealt to any number of ranks
        ({"parallel": {"tp": 2, "pp": 2, "sequence_parallel": True}}, 4),
        ({"rollout": {"num_samples": 1}, "algorithm": {"advantage": "reinforce++"}}, 1),
        ({"rollout": {"max_tokens": 63}}, 1),
        ({"algorithm": {"overlong": "shape", "overlong_tokens": 16}}, 1),
        ({"rollout": {"lag": 1}}, 1),
        ({"mode": "rollout"}, 1),
        ({"batch": {"num_minibatches": 64}}, 1),
        ({"rollout": {"max_refills": 1}}, 1),
        ({"algorithm": {"keep_zero_variance": True}}, 1),
        ({"algorithm": {"normalization": "constant", "constant_tokens": 16}}, 1),
        ({"validation": {"interval": 5, "prompts": "p"}}, 1),
        ({"guard": {"on_spike": "rewind"}, "save": {"interval": 5}}, 1),
        # merely unused, and not refused
        ({"algorithm": {"kl_beta": 0.0}, "reference": {"interval": 3}}, 1),
        ({"rollout": {"vllm": {"tensor_parallel": 2}}}, 1),
        ({"mode": "train", "train_from": "other", "record": {"interval": 1}, "rollout": {"lag": 1}}, 1),
        ({"reference": {"alpha": 0.3}, "algorithm": {"kl_beta": 0.0}}, 1),
        ({"reference": {"alpha": 0.3, "interval": 0}}, 1),
        ({"optimizer": {"moments": "bf16"}}, 1),
    ],
)
def test_a_config_that_holds_has_no_problem(changes: dict[str, Any], world_size: int) -> None:
    given = config(**changes)
    assert named(given, world_size) == [] == check_model(MODEL, given)


@pytest.mark.parametrize(
    ("changes", "world_size", "key"),
    [
        ({"rollout": {"temperature": 0.7}}, 1, "rollout.temperature"),
        ({"rollout": {"num_samples": 1}}, 1, "rollout.num_samples"),
        ({"rollout": {"max_tokens": 64}}, 1, "rollout.max_tokens"),
        ({"log": {"samples": True}}, 1, "log.samples"),
        ({"algorithm": {"normalization": "constant"}}, 1, "algorithm.constant_tokens"),
        ({"algorithm": {"overlong": "shape", "overlong_tokens": 17}}, 1, "algorithm.overlong_tokens"),
        ({"rollout": {"lag": 1}, "algorithm": {"tis_cap": None}}, 1, "algorithm.tis_cap"),
        ({"mode": "rollout", "record": {"interval": 1}}, 1, "record.interval"),
        ({"mode": "rollout", "rollout": {"lag": 1}}, 1, "rollout.lag"),
        ({"mode": "rollout", "validation": {"prompts": "p"}}, 1, "validation.prompts"),
        ({"mode": "rollout", "train_from": "other"}, 1, "train_from"),
        ({"train_from": "other"}, 1, "train_from"),
        ({"mode": "train"}, 1, "train_from"),
        ({"mode": "train", "train_from": "r"}, 1, "train_from"),  # the run's own folder
        ({"mode": "train", "train_from": "other/../r"}, 1, "train_from"),
        ({"mode": "train", "train_from": "other", "validation": {"prompts": "p"}}, 1, "validation.prompts"),
        ({"reference": {"alpha": 0.3}}, 1, "reference.alpha"),  # in bf16, the default
        ({"reference": {"alpha": 0.5}}, 1, "reference.alpha"),  # half of the last bit is rounded to even
        ({"batch": {"num_minibatches": 65}}, 1, "batch.num_minibatches"),  # of 64 prompts
        ({"rollout": {"max_refills": 1}, "algorithm": {"keep_zero_variance": True}}, 1, "rollout.max_refills"),
        ({"rollout": {"max_refills": 1}, "algorithm": {"advantage": "reinforce++"}}, 1, "rollout.max_refills"),
        ({"algorithm": {"keep_zero_variance": True, "kl_beta": 0.0}}, 1, "algorithm.keep_zero_variance"),
        ({"algorithm": {"constant_tokens": 16}}, 1, "algorithm.constant_tokens"),
        ({"validation": {"interval": 5}}, 1, "validation.interval"),
        ({"guard": {"on_spike": "rewind"}}, 1, "guard.on_spike"),
        ({"guard": {"on_nonfinite": "rewind"}}, 1, "guard.on_nonfinite"),
        ({"init": {"checkpoint": "c", "rope_theta": 1e6}, "rollout": {"engine": "vllm"}}, 1, "init.rope_theta"),
        ({"parallel": {"tp": 2}}, 3, "parallel"),
        ({"init": {"tokenizer": "t"}}, 1, "init.tokenizer"),
        ({"schedule": {"warmup_steps": 11}}, 1, "schedule.warmup_steps"),
        ({"cuda_graphs": True}, 1, "cuda_graphs"),  # its passes have several shapes
        ({"optimizer": {"moments": "bf16", "beta2": 0.999}}, 1, "optimizer.beta2"),
    ],
)
def test_keys_that_do_not_hold_together_are_named(changes: dict[str, Any], world_size: int, key: str) -> None:
    assert [where.partition(" ")[0] for where in named(config(**changes), world_size)] == [key]


def test_all_problems_come_at_once() -> None:
    given = config(rollout={"temperature": 2.0, "num_samples": 1}, log={"samples": True}, algorithm={"normalization": "constant"})
    assert set(named(given)) == {"rollout.temperature", "rollout.num_samples", "log.samples", "algorithm.constant_tokens"}


def test_a_number_out_of_range_is_refused() -> None:
    for section, key, value in (("rollout", "temperature", 0.0), ("rollout", "num_prompts", 0), ("algorithm", "kl_beta", -1.0)):
        with_problem = named(config(**{section: {key: value}}))
        assert f"{section}.{key}" in with_problem


def test_an_unknown_algorithm_is_refused() -> None:
    with pytest.raises(InputError, match="found 'ppo'; required 'grpo'"):
        config(algorithm={"advantage": "ppo"})


def test_a_model_that_a_layout_does_not_divide_is_named() -> None:
    given = config(parallel={"tp": 4})
    assert named(given, 4) == []
    assert check_model(MODEL, given)[0].where.startswith("parallel.tp")
