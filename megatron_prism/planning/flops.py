"""FLOPs of a token, in both conventions the field uses, and the peak a device could reach."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prism.core.config import ModelConfig, Precision

PEAK_TFLOPS_BF16 = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # dense, NVIDIA's data sheets (SXM)


@dataclass(frozen=True)
class Flops:
    """Forward and backward FLOPs of one token: attention counted causal (half the scores) or full.

    NVIDIA's published tables count full up to release 25.07 and causal from 25.09.
    """

    causal: float
    full: float


def flops_per_token(model: ModelConfig, seq_length: int) -> Flops:
    """Return the FLOPs of one token at a sequence length; backward counts twice the forward, recompute not at all.

    Source: 3 (L (2H(hq + 2kv)d + 2 hq d H + 6HF + c S hq d) + 2HV), c = 2 causal, 4 full.
    """
    hidden, head = model.hidden_size, model.kv_channels
    queries, keys = model.num_attention_heads * head, model.num_query_groups * head
    layer = 2 * hidden * (queries + 2 * keys) + 2 * queries * hidden + 6 * hidden * model.ffn_hidden_size
    scores = model.num_layers * seq_length * queries
    dense = model.num_layers * layer + 2 * hidden * model.vocab_size
    return Flops(causal=3.0 * (dense + 2 * scores), full=3.0 * (dense + 4 * scores))


def peak_tflops(device_name: str, precision: Precision) -> float | None:
    """Return a device's dense peak in TFLOP/s where it is known (bf16 on the GPUs listed), else None."""
    if precision != "bf16":
        return None
    return next((peak for name, peak in PEAK_TFLOPS_BF16.items() if name in device_name), None)
