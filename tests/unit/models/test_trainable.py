"""Which parameters a pattern names, and what is refused before anything starts."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_prism.core.config import MambaConfig, ModelConfig, ParallelConfig
from megatron_prism.families import registry
from megatron_prism.models import trainable

LLAMA = ModelConfig(
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
NEMOTRON = dataclasses.replace(
    LLAMA,
    family="nemotron_h",
    activation="relu2",
    position_embedding="none",
    layer_pattern="M-*-M",
    mamba=MambaConfig(num_heads=8, head_dim=16, state_dim=16, num_groups=2),
)
ONE, TWO = ParallelConfig(), ParallelConfig(pp=2)


@pytest.mark.parametrize(
    ("model", "pattern", "number", "one_of_them"),
    [
        (LLAMA, "*", 33, "output_layer.weight"),
        (LLAMA, "*.self_attention.*", 15, "decoder.layers.4.self_attention.linear_qkv.layer_norm_weight"),
        (LLAMA, "decoder.layers.1.*", 6, "decoder.layers.1.mlp.linear_fc1.layer_norm_weight"),
        (LLAMA, "*.layers.[34].mlp.*", 6, "decoder.layers.3.mlp.linear_fc2.weight"),
        (NEMOTRON, "*.mixer.*", 18, "decoder.layers.0.mixer.in_proj.weight"),
    ],
)
def test_a_pattern_names(model: ModelConfig, pattern: str, number: int, one_of_them: str) -> None:
    named = [name for name in registry.parameters(model) if trainable.is_trainable(name, [pattern])]
    assert len(named) == number and one_of_them in named
    assert trainable.check([pattern], registry.parameters(model), model, ONE) == []


def test_parameters_are_whole_and_all() -> None:
    sizes = registry.parameters(NEMOTRON)
    assert sizes["decoder.layers.0.mixer.in_proj.weight"] == 64 * (2 * 128 + 2 * 32 + 8) and sum(sizes.values()) == registry.num_parameters(
        NEMOTRON
    )


@pytest.mark.parametrize(
    ("model", "pattern", "near"),
    [
        (LLAMA, "*.self_atention.*", "decoder.layers.*.self_attention."),
        (LLAMA, "decoder.layers.5.*", "decoder.layers.*."),
        (LLAMA, "*.mixer.*", "near: "),
        (LLAMA, "*.Self_Attention.*", "self_attention"),
        (NEMOTRON, "*.in_proj.weight.z", "mixer.in_proj.weight"),
    ],
)
def test_a_pattern_that_names_nothing_is_refused(model: ModelConfig, pattern: str, near: str) -> None:
    problem, *none = trainable.check(["embedding.*", pattern, "output_layer.*"], registry.parameters(model), model, ONE)
    assert problem.where == f"trainable: {pattern}" and near in problem.fix and none == []


@pytest.mark.parametrize(
    ("patterns", "tied", "parallel", "idle"),
    [
        (["embedding.*"], False, TWO, "[1] of 2"),
        (["embedding.*"], True, TWO, None),
        (["output_layer.weight"], False, TWO, "[0] of 2"),
        (["decoder.layers.2.*"], False, TWO, "[1] of 2"),
        (["decoder.layers.3.*"], False, TWO, "[0] of 2"),
        (["decoder.layers.[23].*"], False, TWO, None),
        (["decoder.layers.2.*"], False, ParallelConfig(pp=2, vpp=2), "[0] of 2"),
        ([], False, ONE, "[0] of 1"),
    ],
)
def test_a_stage_without_any_is_refused(patterns: list[str], tied: bool, parallel: ParallelConfig, idle: str | None) -> None:
    model = dataclasses.replace(LLAMA, tie_word_embeddings=tied)
    found = [problem.found for problem in trainable.check(patterns, registry.parameters(model), model, parallel)]
    assert found == ([] if idle is None else [f"nothing to train on pipeline stages {idle}"])
