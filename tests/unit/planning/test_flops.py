"""FLOPs and parameters of LLaMA-3.1-8B and Nemotron-H-8B, against published and hand-made figures."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_prism.core.config import ModelConfig
from megatron_prism.families import registry
from megatron_prism.planning.flops import flops_per_token


def test_llama_8b_at_8192(llama_8b: ModelConfig) -> None:
    flops = flops_per_token(llama_8b, 8192)
    assert flops.causal / 1e9 == pytest.approx(51.5, rel=0.01)
    assert flops.full / 1e9 == pytest.approx(57.9, rel=0.01)


def test_without_attention_scores_it_is_six_a_matrix_parameter(llama_8b: ModelConfig) -> None:
    """The embedding is looked up, the norms are no matrices: everything else is multiplied once forward, twice backward."""
    matrices = registry.num_parameters(llama_8b) - 128256 * 4096 - (2 * 32 + 1) * 4096
    at_zero = flops_per_token(llama_8b, 0)
    assert at_zero.causal == at_zero.full == 6 * matrices


def test_a_hybrid_counts_each_layer_by_its_kind(nemotron_h_8b: ModelConfig) -> None:
    """At length 0 a hybrid is six a matrix parameter too, but for the scan; only its attention layers grow with the length."""
    model, pattern = nemotron_h_8b, nemotron_h_8b.layer_pattern
    assert pattern is not None
    inner, conv, num_mamba = 8192, 8192 + 2 * 8 * 128, pattern.count("M")
    # embedding, norms; dt_bias, A_log, D, gated norm, conv bias
    no_matrices = 131072 * 4096 + 53 * 4096 + num_mamba * (3 * 128 + inner + conv)
    scan = 3 * 7 * inner * 128 * num_mamba
    assert flops_per_token(model, 0).causal == 6 * (registry.num_parameters(model) - no_matrices) + scan
    at_8k = flops_per_token(model, 8192)
    assert at_8k.full - flops_per_token(model, 0).full == 3 * 4 * 8192 * 4096 * pattern.count("*")


def test_causal_is_half_of_the_scores_and_grows_with_the_length(llama_8b: ModelConfig) -> None:
    none, short, long = (flops_per_token(llama_8b, length) for length in (0, 4096, 8192))
    assert short.full - none.full == 2 * (short.causal - none.causal) == long.causal - none.causal > 0


def test_parameters_of_llama_8b(llama_8b: ModelConfig) -> None:
    assert registry.num_parameters(llama_8b) == 8_030_261_248
    assert registry.num_parameters(dataclasses.replace(llama_8b, tie_word_embeddings=True)) == 8_030_261_248 - 128256 * 4096
