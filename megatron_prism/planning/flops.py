"""FLOPs per token, in the field's two conventions."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prism.core.config import MambaConfig, ModelConfig


@dataclass(frozen=True)
class Flops:
    """Forward and backward FLOPs of one token, with attention counted causal (half the scores) or full.

    NVIDIA's published tables count full up to release 25.07 and causal from 25.09.
    """

    causal: float
    full: float


def flops_per_token(model: ModelConfig, seq_length: int) -> Flops:
    """Return the FLOPs of one token at a sequence length. Backward counts as twice the forward. Recompute does not count.

    Source: 3 (A (2H(hq + 2kv)d + 2 hq d H + c S hq d) + F(2 or 3 matrices of 2HF) + M (mixer) + 2HV) with A, F and M the layers of
    attention, MLP and Mamba, c = 2 causal, 4 full. A Mamba mixer counts its projections, its convolution, and 7 per state element for
    the scan, as Megatron-LM does (megatron/training/training.py, mamba_layer_flops). The chunked form does more.
    """
    hidden, head = model.hidden_size, model.kv_channels
    queries, keys = model.num_attention_heads * head, model.num_query_groups * head
    pattern = model.layer_pattern or "*-" * model.num_layers
    matrices = 3 if model.activation == "swiglu" else 2
    attention = 2 * hidden * (queries + 2 * keys) + 2 * queries * hidden
    mlp = 2 * matrices * hidden * model.ffn_hidden_size
    dense = pattern.count("*") * attention + pattern.count("-") * mlp + 2 * hidden * model.vocab_size
    if model.mamba is not None:
        dense += pattern.count("M") * _mamba_forward(model.mamba, hidden)
    scores = pattern.count("*") * seq_length * queries
    return Flops(causal=3.0 * (dense + 2 * scores), full=3.0 * (dense + 4 * scores))


def _mamba_forward(mamba: MambaConfig, hidden: int) -> int:
    inner, states = mamba.num_heads * mamba.head_dim, mamba.num_groups * mamba.state_dim
    projections = 2 * hidden * (2 * inner + 2 * states + mamba.num_heads) + 2 * inner * hidden
    return projections + 2 * mamba.conv_kernel * (inner + 2 * states) + 7 * inner * mamba.state_dim
