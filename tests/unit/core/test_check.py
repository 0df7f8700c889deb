"""Every problem that the checks know: one change to a valid config each, named by its key."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prism.core.check import train
from megatron_prism.core.check.gang import check_gang, check_model_on_gang
from megatron_prism.core.check.model import check_architecture, padded_vocab_size
from megatron_prism.core.config import (
    FP8Config,
    GangConfig,
    InitConfig,
    Llama3Rope,
    MambaConfig,
    ModelConfig,
    ParallelConfig,
    RecomputeConfig,
    TrainConfig,
    YarnRope,
)
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.core.load import build, to_dict

MODEL = ModelConfig(
    family="llama",
    num_layers=5,
    hidden_size=64,
    ffn_hidden_size=176,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=390,
    max_position_embeddings=128,
)


def changed(values: dict[str, Any], changes: dict[str, Any]) -> TrainConfig:
    for key, value in changes.items():
        part, names = values, key.split(".")
        for name in names[:-1]:
            part = part.setdefault(name, {})
        part[names[-1]] = value
    return build(values, TrainConfig, str)


def keys(problems: list[Problem]) -> list[str]:
    return [problem.where for problem in problems]


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        ({}, 1),
        ({}, 4),
        ({"parallel": {"tp": 2, "pp": 2, "sequence_parallel": True}}, 4),
        ({"parallel": {"pp": 2, "vpp": 2}}, 2),
        ({"schedule": {"kind": "wsd", "wsd_decay_steps": 10}}, 1),
        ({"recompute": {"granularity": "full", "num_layers": 2}}, 1),
        ({"parallel": {"overlap_param_gather": True, "overlap_grad_reduce": True, "distributed_optimizer": True}}, 2),
        ({"parallel": {"cp": 2}}, 4),
        ({"parallel": {"tp": 2, "cp": 2, "sequence_parallel": True}}, 4),
        ({"parallel": {"cp": 4, "cp_comm_type": "a2a+p2p", "cp_a2a_size": 2}}, 4),
        ({"parallel": {"cp": 2, "cp_comm_type": "a2a"}}, 2),
        ({"init": {"tokenizer": "t"}, "model": to_dict(MODEL)}, 1),
        ({"model": to_dict(MODEL)}, 1),
        ({"world_size": 4}, 4),
        ({"optimizer.lr": 0.0, "schedule.warmup_steps": 100}, 1),
    ],
)
def test_a_config_that_holds_has_no_problem(values: dict, changes: dict, world_size: int) -> None:
    config = changed(values, changes)
    assert train.check_train(config, world_size) == [] == train.check_model(MODEL, config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.lr", -1.0),
        ("optimizer.lr", math.nan),
        ("optimizer.lr", math.inf),
        ("parallel.tp", 0),
        ("parallel.cp", -1),
        ("seed", 2**32),
    ],
)
def test_a_number_out_of_range_is_named(values: dict, key: str, value: float) -> None:
    """Of every key: test_keys.py."""
    assert key in keys(train.check_train(changed(values, {key: value}), 1))


@pytest.mark.parametrize(
    ("changes", "world_size", "key"),
    [
        ({"parallel": {"tp": 2}}, 3, "parallel"),
        ({"parallel": {"tp": 2, "pp": 2}}, 2, "parallel"),
        ({"batch.global_size": 6}, 2, "batch.global_size"),
        ({"batch.global_size": 1}, 1, "batch.global_size"),
        ({"parallel.cp": 2, "data.seq_length": 62}, 2, "data.seq_length"),
        ({"parallel": {"tp": 2, "cp": 4, "sequence_parallel": True}, "data.seq_length": 56}, 8, "data.seq_length"),
        ({"parallel.cp": 2, "batch.global_size": 2}, 4, "batch.global_size"),
        ({"parallel.cp": 2, "data.document_mask": True}, 2, "data.document_mask"),
        ({"parallel": {"cp": 2, "cp_comm_type": "a2a+p2p"}}, 2, "parallel.cp_a2a_size"),
        ({"parallel": {"cp": 2, "cp_a2a_size": 2}}, 2, "parallel.cp_a2a_size"),
        ({"parallel": {"cp": 4, "cp_comm_type": "a2a+p2p", "cp_a2a_size": 3}}, 4, "parallel.cp_a2a_size"),
        ({"parallel.sequence_parallel": True}, 2, "parallel.sequence_parallel"),
        ({"parallel": {"tp": 2, "sequence_parallel": True}, "data.seq_length": 63}, 2, "data.seq_length"),
        ({"parallel.overlap_param_gather": True}, 2, "parallel.overlap_param_gather"),
        (
            {"parallel": {"overlap_param_gather": True, "overlap_grad_reduce": True, "distributed_optimizer": False}},
            2,
            "parallel.overlap_param_gather",
        ),
        ({"parallel.vpp": 2}, 2, "parallel.vpp"),
        ({"parallel": {"pp": 2, "vpp": 1}}, 2, "parallel.vpp"),
        ({"parallel": {"pp": 2, "vpp": 2}, "batch.global_size": 6}, 2, "batch.global_size"),
        ({"recompute.num_layers": 1}, 1, "recompute.num_layers"),
        ({"save.timeout_s": 1800.0}, 1, "save.timeout_s"),
        ({"guard.on_spike": "rewind", "save.interval": 0}, 1, "guard.on_spike"),
        ({"guard.on_nonfinite": "rewind", "save.interval": 0}, 1, "guard.on_nonfinite"),
        ({"fp8": {"param": True}, "precision": "bf16"}, 1, "fp8.param"),  # it begins from a checkpoint
        ({"data.changes": [{"step": 100}]}, 1, "data.changes"),  # no step comes after it
        ({"data.changes": [{"step": 7}, {"step": 7}]}, 1, "data.changes"),
        ({"recompute": {"granularity": "full", "num_layers": 0}}, 1, "recompute.num_layers"),
        ({"recompute": {"granularity": "full", "modules": ["mlp"]}}, 1, "recompute.modules"),
        ({"recompute": {"granularity": "selective", "modules": []}}, 1, "recompute.modules"),
        ({"schedule.warmup_steps": 101}, 1, "schedule.warmup_steps"),
        ({"schedule.kind": "wsd"}, 1, "schedule.wsd_decay_steps"),
        ({"schedule": {"kind": "wsd", "wsd_decay_steps": 0}}, 1, "schedule.wsd_decay_steps"),
        ({"schedule": {"kind": "wsd", "wsd_decay_steps": 96, "warmup_steps": 5}}, 1, "schedule.wsd_decay_steps"),
        ({"schedule.wsd_decay_steps": 10}, 1, "schedule.wsd_decay_steps"),
        ({"world_size": 8}, 4, "world_size"),
        ({"init.tokenizer": "t"}, 1, "init.tokenizer"),
        ({"init": {"tokenizer": "t"}}, 1, "model"),
        ({"init": {}, "model": to_dict(MODEL)}, 1, "init.tokenizer"),
    ],
)
def test_keys_that_do_not_hold_together_are_named(values: dict, changes: dict, world_size: int, key: str) -> None:
    assert keys(train.check_train(changed(values, changes), world_size)) == [key]


def test_a_gang_is_checked_without_a_training_config() -> None:
    assert check_gang(GangConfig(parallel=ParallelConfig(tp=2, sequence_parallel=True)), 2) == []
    gang = GangConfig(precision="fp32", fp8=FP8Config(), recompute=RecomputeConfig(num_layers=2), environment={"PATH": "x"})
    assert keys(check_gang(gang, 1)) == ["recompute.num_layers", "precision", "environment.PATH"]
    assert keys(check_gang(GangConfig(parallel=ParallelConfig(tp=2)), 3)) == ["parallel"]
    assert keys(check_model_on_gang(MODEL, GangConfig(parallel=ParallelConfig(tp=4)))) == ["parallel.tp (num_query_groups 2)"]


def test_problems_of_several_kinds_come_together(values: dict) -> None:
    config = changed(values, {"optimizer.lr": -1.0, "parallel.tp": 2, "schedule.final_factor": 2.0})
    with pytest.raises(InputError) as caught:
        raise_problems(train.check_train(config, 3))
    assert keys(list(caught.value.problems)) == ["optimizer.lr", "schedule.final_factor", "parallel"]
    assert len(str(caught.value).splitlines()) == 3 and "start 2 processes" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"parallel.tp": 3}, "parallel.tp (num_attention_heads 4)"),
        ({"parallel.tp": 4}, "parallel.tp (num_query_groups 2)"),
        ({"parallel.tp": 32}, "parallel.tp (ffn_hidden_size 176)"),
        ({"parallel.pp": 6}, "parallel.pp"),
        ({"parallel": {"pp": 2, "vpp": 3}}, "parallel.pp"),
        ({"data.seq_length": 129}, "data.seq_length"),
        ({"parallel": {"cp": 4, "cp_comm_type": "a2a"}}, "parallel.cp_comm_type (num_query_groups 2)"),
        ({"parallel": {"tp": 2, "cp": 2, "cp_comm_type": "a2a"}}, "parallel.cp_comm_type (num_query_groups 2)"),
        ({"parallel": {"tp": 2, "cp": 4, "cp_comm_type": "a2a+p2p", "cp_a2a_size": 2}}, "parallel.cp_comm_type (num_query_groups 2)"),
    ],
)
def test_a_layout_that_the_model_lacks_is_named(values: dict, changes: dict, key: str) -> None:
    assert key in keys(train.check_model(MODEL, changed(values, changes)))


ORIGINAL = "original_max_position_embeddings"
YARN = YarnRope(factor=4.0, original_max_position_embeddings=64)
WINDOWED = dataclasses.replace(MODEL, window_size=16)


@pytest.mark.parametrize(
    ("model", "changes", "key"),
    [
        (MODEL, {"max_position_embeddings": 64}, "max_position_embeddings"),
        (MODEL, {"yarn": YARN}, "yarn.factor"),  # 4 x 64 positions, and the model keeps its 128
        (MODEL, {"yarn": dataclasses.replace(YARN, factor=3.0), "max_position_embeddings": 256}, "yarn.factor"),
        (MODEL, {"yarn": YarnRope(factor=1.0, original_max_position_embeddings=256), "max_position_embeddings": 256}, f"yarn.{ORIGINAL}"),
        (dataclasses.replace(MODEL, rope_scaling=Llama3Rope(factor=8.0)), {"yarn": YARN, "max_position_embeddings": 256}, "yarn"),
        (dataclasses.replace(MODEL, position_embedding="none"), {"rope_theta": 1e6}, "rope_theta"),
        (dataclasses.replace(MODEL, position_embedding="none"), {"yarn": YARN, "max_position_embeddings": 256}, "yarn"),
        (MODEL, {"window_size": 64}, "window_size"),
        (WINDOWED, {"window_size": 8}, "window_size"),
    ],
)
def test_a_model_that_cannot_be_extended_so_is_named(model: ModelConfig, changes: dict, key: str) -> None:
    assert keys(train.check_extension(InitConfig(checkpoint=Path("c"), **changes), model)) == [f"init.{key}"]


def test_the_ends_of_what_is_allowed(values: dict) -> None:
    longest = changed(values, {"data.seq_length": 128, "data.changes": [{"step": 1}, {"step": 99}], "limits.hang_timeout_s": 1800.0})
    assert longest.limits.collective_timeout_s == 1800.0 and MODEL.max_position_embeddings == 128 and longest.steps == 100
    assert train.check_train(longest, 1) == [] == train.check_model(MODEL, longest)
    whole = InitConfig(checkpoint=Path("c"), max_position_embeddings=256, yarn=YarnRope(factor=2.0, original_max_position_embeddings=128))
    assert not list(train.check_extension(whole, MODEL))
    same = InitConfig(checkpoint=Path("c"), window_size=16)
    assert not list(train.check_extension(same, WINDOWED)) and not list(train.check_sampler(same, "cached"))
    assert keys(list(train.check_sampler(same, "vllm"))) == ["init.window_size"]


def test_an_extended_model() -> None:
    """A window as wide as all positions is none; without a key of init nothing changes."""
    wide = InitConfig(checkpoint=Path("c"), max_position_embeddings=256, yarn=YARN, rope_theta=1e6, window_size=256)
    assert not list(train.check_extension(wide, WINDOWED)) and wide.extends
    expected = dataclasses.replace(WINDOWED, max_position_embeddings=256, yarn=YARN, rotary_base=1e6, window_size=None)
    assert wide.extend(WINDOWED) == expected
    assert InitConfig(checkpoint=Path("c"), window_size=32).extend(WINDOWED) == dataclasses.replace(WINDOWED, window_size=32)
    none = InitConfig(checkpoint=Path("c"))
    assert none.extend(WINDOWED) == WINDOWED and not none.extends and not list(train.check_extension(none, WINDOWED))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"num_query_groups": 3}, "num_query_groups"),
        ({"num_query_groups": 0}, "num_query_groups"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"kv_channels": 0}, "kv_channels"),
        ({"rope_scaling": Llama3Rope(factor=8.0, low_freq_factor=2.0)}, "rope_scaling"),
        ({"rope_scaling": Llama3Rope(factor=8.0, original_max_position_embeddings=4096)}, "rope_scaling"),
        ({"yarn": YARN, "position_embedding": "none"}, "yarn"),
        ({"yarn": YARN, "rope_scaling": Llama3Rope(factor=8.0)}, "yarn"),
        ({"yarn": dataclasses.replace(YARN, beta_fast=0.5)}, "yarn.beta_fast"),
        ({"yarn": dataclasses.replace(YARN, mscale=1.0)}, "yarn.mscale, mscale_all_dim"),
        ({"yarn": dataclasses.replace(YARN, factor=0.5)}, "yarn.factor"),
        ({"yarn": YARN, "rotary_base": 1.0}, "rotary_base"),
    ],
)
def test_an_architecture_that_cannot_be_is_named(changes: dict, key: str) -> None:
    assert keys(check_architecture(dataclasses.replace(MODEL, **changes))) == [f"model.{key}"]


HYBRID = dataclasses.replace(
    MODEL, layer_pattern="M-*-M", mamba=MambaConfig(num_heads=8, head_dim=16, state_dim=16, num_groups=2), num_layers=5
)
ONE_GROUP = dataclasses.replace(HYBRID, mamba=MambaConfig(num_heads=8, head_dim=16, state_dim=16, num_groups=1))


@pytest.mark.parametrize(
    ("model", "changes", "key"),
    [
        (HYBRID, {"parallel.tp": 4}, "parallel.tp (mamba.num_groups 2)"),
        (ONE_GROUP, {"parallel.tp": 2}, "parallel.tp (mamba.num_groups 1)"),
        (HYBRID, {"parallel": {"pp": 2, "vpp": 2}}, "parallel.vpp"),
        (HYBRID, {"recompute": {"granularity": "full"}}, "recompute.granularity"),
    ],
)
def test_what_a_hybrid_cannot_is_named(values: dict, model: ModelConfig, changes: dict, key: str) -> None:
    assert train.check_model(model, values_held := changed(values, {})) == [] and values_held.parallel.tp == 1
    assert key in keys(train.check_model(model, changed(values, changes)))


def test_a_window_wants_all_keys_on_a_rank(values: dict) -> None:
    model = dataclasses.replace(MODEL, window_size=16)
    found = {
        kind: keys(train.check_model(model, changed(values, {"parallel": {"cp": 2, "cp_comm_type": kind}})))
        for kind in ("p2p", "a2a", "all_gather")
    }
    assert found == {"p2p": ["parallel.cp_comm_type"], "a2a": [], "all_gather": []}
    assert train.check_model(model, changed(values, {"parallel": {"cp": 1}})) == []


@pytest.mark.parametrize(
    ("groups", "tp", "cp", "holds"),
    [(1, 1, 8, True), (2, 1, 4, True), (4, 1, 2, True), (4, 2, 4, True), (1, 1, 3, False), (4, 1, 16, False), (4, 2, 8, False)],
)
def test_mamba_heads_are_split_over_cp(values: dict, groups: int, tp: int, cp: int, holds: bool) -> None:
    model = dataclasses.replace(HYBRID, num_query_groups=4, mamba=MambaConfig(num_heads=8, head_dim=16, state_dim=16, num_groups=groups))
    assert keys(train.check_model(model, changed(values, {"parallel": {"tp": tp, "cp": cp}}))) == ([] if holds else ["parallel.cp"])


def test_one_group_points_to_what_works(values: dict) -> None:
    assert "use pipeline or data parallelism instead" in str(train.check_model(ONE_GROUP, changed(values, {"parallel.tp": 2}))[0])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"mamba": None}, "mamba"),
        ({"layer_pattern": None}, "mamba"),
        ({"layer_pattern": "M-*-E"}, "layer_pattern"),
        ({"layer_pattern": "M-*-"}, "layer_pattern"),
        ({"norm_epsilon": 1e-6}, "norm_epsilon"),
        ({"window_size": 16}, "rope_scaling, window_size"),
        ({"mamba": MambaConfig(num_heads=8, head_dim=0, state_dim=16, num_groups=2)}, "mamba.head_dim"),
        ({"mamba": MambaConfig(num_heads=8, head_dim=16, state_dim=16, num_groups=3)}, "mamba.num_groups"),
    ],
)
def test_a_hybrid_that_cannot_be_is_named(changes: dict, key: str) -> None:
    assert check_architecture(HYBRID) == []
    assert keys(check_architecture(dataclasses.replace(HYBRID, **changes))) == [f"model.{key}"]


@given(vocab_size=st.integers(1, 10**6), tp=st.sampled_from([1, 2, 4, 8]))
def test_padded_vocabulary_is_the_least_multiple(vocab_size: int, tp: int) -> None:
    padded = padded_vocab_size(vocab_size, tp)
    assert padded % (128 * tp) == 0 and 0 <= padded - vocab_size < 128 * tp
