"""FLOPs and parameters of LLaMA-3.1-8B, against published and hand-made figures."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_prism.core.config import MambaConfig, ModelConfig
from megatron_prism.families import registry
from megatron_prism.planning.flops import flops_per_token, peak_tflops

LLAMA_8B = ModelConfig(
    family="llama",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128256,
    max_position_embeddings=131072,
)


def test_llama_8b_at_8192() -> None:
    found = flops_per_token(LLAMA_8B, 8192)
    assert found.causal / 1e9 == pytest.approx(51.5, rel=0.01)
    assert found.full / 1e9 == pytest.approx(57.9, rel=0.01)


def test_without_attention_scores_it_is_six_a_matrix_parameter() -> None:
    """The embedding is looked up, the norms are no matrices: everything else is multiplied once forward, twice backward."""
    matrices = registry.num_parameters(LLAMA_8B) - 128256 * 4096 - (2 * 32 + 1) * 4096
    at_zero = flops_per_token(LLAMA_8B, 0)
    assert at_zero.causal == at_zero.full == 6 * matrices


def test_a_hybrid_counts_each_layer_by_its_kind() -> None:
    """At length 0 a hybrid is six a matrix parameter too, but for the scan; only its attention layers grow with the length."""
    mamba = MambaConfig(num_heads=128, head_dim=64, state_dim=128, num_groups=8)
    pattern = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
    model = ModelConfig(
        family="nemotron_h",
        num_layers=52,
        layer_pattern=pattern,
        hidden_size=4096,
        ffn_hidden_size=21504,
        activation="relu2",
        num_attention_heads=32,
        num_query_groups=8,
        kv_channels=128,
        vocab_size=131072,
        max_position_embeddings=8192,
        mamba=mamba,
        position_embedding="none",
    )
    inner, conv, num_mamba = 8192, 8192 + 2 * 8 * 128, pattern.count("M")
    no_matrices = (
        131072 * 4096 + 53 * 4096 + num_mamba * (3 * 128 + inner + conv)
    )  # embedding, norms; dt_bias, A_log, D, gated norm, conv bias
    scan = 3 * 7 * inner * 128 * num_mamba
    assert flops_per_token(model, 0).causal == 6 * (registry.num_parameters(model) - no_matrices) + scan
    at_8k = flops_per_token(model, 8192)
    assert at_8k.full - flops_per_token(model, 0).full == 3 * 4 * 8192 * 4096 * pattern.count("*")


def test_causal_is_half_of_the_scores_and_grows_with_the_length() -> None:
    none, short, long = (flops_per_token(LLAMA_8B, length) for length in (0, 4096, 8192))
    assert short.full - none.full == 2 * (short.causal - none.causal) == long.causal - none.causal > 0


def test_parameters_of_llama_8b() -> None:
    assert registry.num_parameters(LLAMA_8B) == 8_030_261_248
    assert registry.num_parameters(dataclasses.replace(LLAMA_8B, tie_word_embeddings=True)) == 8_030_261_248 - 128256 * 4096


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.0),
        ("NVIDIA H200", "bf16", 989.0),
        ("NVIDIA H100", "fp32", None),
        ("cpu", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "fp8", 1979.0),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
    ],
)
def test_peak_is_known_or_none(name: str, precision: str, peak: float | None) -> None:
    assert peak_tflops(name, precision) == peak
