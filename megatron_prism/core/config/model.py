"""A decoder's architecture, in Megatron-Core's words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_prism.core.config.section import Section


@dataclass(frozen=True, kw_only=True)
class Llama3Rope(Section):
    """LLaMA-3.1's rotary scaling (HF `rope_type: llama3`); Megatron-Core fixes all but `factor`."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, kw_only=True)
class MambaConfig(Section):
    """A Mamba-2 mixer's sizes; heads of one group share their B and C. chunk_size changes speed and memory, not the result."""

    num_heads: int
    head_dim: int
    state_dim: int
    num_groups: int
    conv_kernel: int = 4
    chunk_size: int = 128


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """A decoder's architecture, in Megatron-Core's words. A family reads it from HF's config.json and writes it back.

    family names the file of families/ that knows it.
    layer_pattern is a hybrid's, a letter a Megatron layer: M Mamba, * attention, - MLP; None: num_layers of attention and MLP.
    vocab_size is the true size (HF's); padding for tensor parallelism is derived when the model is built.
    window_size is the tokens a token attends to, itself included (HF's sliding_window); None: all before it.
    The multipliers are Granite's, applied at run time and never folded into weights; attention_multiplier is the scale
    of the attention scores, None: 1 / sqrt(kv_channels).
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    layer_pattern: str | None = None
    mamba: MambaConfig | None = None
    activation: Literal["swiglu", "relu2"] = "swiglu"
    qkv_bias: bool = False
    norm_epsilon: float = 1e-5
    position_embedding: Literal["rope", "none"] = "rope"
    rotary_base: float = 10000.0
    rope_scaling: Llama3Rope | None = None
    tie_word_embeddings: bool = False
    init_method_std: float = 0.02
    window_size: int | None = None
    attention_multiplier: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
