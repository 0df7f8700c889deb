"""What an architecture's rotary fields mean: its frequencies, and the factor on its attention scores.

Megatron-Core's RotaryEmbedding computes the plain frequencies and LLaMA-3.1's. For yarn `install` puts ours in their place, and the
attention factor becomes part of the softmax's scale: queries and keys that are both multiplied by it are scores multiplied by its square.
So Megatron-Core's own yarn is not used. It reads attributes that its config does not declare, applies the factor in apply_rotary_pos_emb,
where the fused kernel for packed documents drops it without a word (0.16 and 0.19), and MambaModel does not have it.

Shape legend: F rotary frequencies, half of a head's channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_prism.core.config import Llama3Rope, ModelConfig, YarnRope
from megatron_prism.parallel import host


def inverse_frequencies(model: ModelConfig) -> torch.Tensor:
    """Return the rotary frequencies (F), radians a position, in fp32 and in the order of operations of transformers: the same bits.

    Source: transformers 5.24, modeling_rope_utils.py, _compute_llama3_parameters and _compute_yarn_parameters.
    """
    power_F = torch.arange(0, model.kv_channels, 2, dtype=torch.int64).float() / model.kv_channels
    turns_F = model.rotary_base**power_F
    if model.yarn is not None:
        return _yarn(turns_F, model.rotary_base, model.yarn)
    return 1.0 / turns_F if model.rope_scaling is None else _llama3(1.0 / turns_F, model.rope_scaling)


def _llama3(inverse_F: torch.Tensor, scaling: Llama3Rope) -> torch.Tensor:
    factor, low, high = scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor
    original, wavelength_F = scaling.original_max_position_embeddings, 2 * math.pi / inverse_F
    scaled_F = torch.where(wavelength_F > original / low, inverse_F / factor, inverse_F)
    smooth_F = (original / wavelength_F - low) / (high - low)
    is_between_F = ~(wavelength_F < original / high) * ~(wavelength_F > original / low)
    return torch.where(is_between_F, (1 - smooth_F) * scaled_F / factor + smooth_F * scaled_F, scaled_F)


def _yarn(turns_F: torch.Tensor, base: float, yarn: YarnRope) -> torch.Tensor:
    dim = 2 * len(turns_F)

    def place(num_turns: float) -> float:
        """Return the frequency, by its number, that turns so often within the original positions."""
        return dim * math.log(yarn.original_max_position_embeddings / (num_turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = place(yarn.beta_fast), place(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    kept_F = 1 - torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    return 1.0 / (yarn.factor * turns_F) * (1 - kept_F) + 1.0 / turns_F * kept_F


def attention_factor(model: ModelConfig) -> float:
    """Return the factor on queries and keys (on cosines and sines in transformers): 1 but for yarn."""
    yarn = model.yarn
    if yarn is None:
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    log = math.log(yarn.factor)
    return (0.1 * (yarn.mscale or 1.0) * log + 1) / (0.1 * (yarn.mscale_all_dim or 0.0) * log + 1)


def softmax_scale(model: ModelConfig) -> float | None:
    """Return the scale of the attention scores; None: 1 / sqrt(kv_channels)."""
    if model.yarn is None:
        return model.attention_multiplier
    scale = model.kv_channels**-0.5 if model.attention_multiplier is None else model.attention_multiplier
    return float(scale * attention_factor(model) ** 2)


def install(chunk: Any, model: ModelConfig) -> None:
    """Give a Megatron model chunk yarn's frequencies. It computes its table of angles from them at its first forward pass."""
    if model.yarn is not None:
        chunk.rotary_pos_emb.inv_freq = inverse_frequencies(model).to(host.device())
