"""A decoder's architecture, in Megatron-Core's terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_prism.core.config.section import Range, Section

Size = Annotated[int, Range(ge=1, lt=2**31)]
Multiplier = Range(ne=0)


@dataclass(frozen=True, kw_only=True)
class Llama3Rope(Section):
    """LLaMA-3.1's rotary scaling (HF `rope_type: llama3`). Megatron-Core fixes all of it but `factor`."""

    factor: Annotated[float, Range(gt=0)]
    """How many times the original positions the model was extended to."""

    low_freq_factor: float = 1.0
    """Fixed at 1."""

    high_freq_factor: float = 4.0
    """Fixed at 4."""

    original_max_position_embeddings: int = 8192
    """Fixed at 8192: the positions that the model had before it was extended."""


@dataclass(frozen=True, kw_only=True)
class YarnRope(Section):
    """yarn's scaling of the rotary frequencies (HF `rope_type: yarn`), for a model that is extended to longer texts.

    Frequencies that turn often within the original positions stay, those that turn rarely are divided by `factor`, and the attention
    scores are multiplied by the square of an attention factor. Defaults are transformers' own.
    """

    factor: Annotated[float, Range(ge=1)]
    """How many times the original positions the model is extended to. max_position_embeddings is their product."""

    original_max_position_embeddings: Size
    """The positions that the model had before it was extended. It has no default: transformers takes the extended ones in silence."""

    beta_fast: Annotated[float, Range(gt=0)] = 32.0
    """A frequency that turns more often than this within the original positions stays."""

    beta_slow: Annotated[float, Range(gt=0)] = 1.0
    """A frequency that turns less often than this is divided by `factor`. Between the two: a linear ramp."""

    attention_factor: Annotated[float | None, Range(gt=0)] = None
    """The factor on cosines and sines. Null: 0.1 ln(factor) + 1, or what mscale and mscale_all_dim say."""

    mscale: Annotated[float | None, Range(gt=0)] = None
    """With mscale_all_dim: the attention factor is (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)."""

    mscale_all_dim: Annotated[float | None, Range(gt=0)] = None
    """See mscale. Both are given, or neither."""

    truncate: bool = True
    """The ends of the ramp are rounded to whole frequencies."""


@dataclass(frozen=True, kw_only=True)
class MambaConfig(Section):
    """A Mamba-2 mixer's sizes."""

    num_heads: Annotated[int, Range(ge=1)]
    """The heads of the mixer."""

    head_dim: Annotated[int, Range(ge=1)]
    """The channels of a head."""

    state_dim: Annotated[int, Range(ge=1)]
    """The size of the state, per channel."""

    num_groups: Annotated[int, Range(ge=1)]
    """The number of groups. The heads of one group share their B and C. It divides num_heads."""

    conv_kernel: Annotated[int, Range(ge=1)] = 4
    """The tokens that the convolution sees."""

    chunk_size: Annotated[int, Range(ge=1)] = 128
    """The tokens that the scan takes at a time. It changes speed and memory, not the result."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """A decoder's architecture, in Megatron-Core's terms. A family reads it from HF's config.json and writes it back.

    The multipliers are Granite's. They are applied when the model runs, and never folded into weights.
    """

    family: str
    """The name of the family that knows the architecture (a file of families/)."""

    num_layers: Size
    """Megatron-Core's number of layers: a dense layer is attention and MLP, a hybrid's layer is one letter of layer_pattern."""

    hidden_size: Size
    """The width of the residual stream."""

    ffn_hidden_size: Size
    """The width within an MLP."""

    num_attention_heads: Size
    """The query heads."""

    num_query_groups: Size
    """The heads of keys and values. It divides num_attention_heads."""

    kv_channels: Size
    """The channels of an attention head."""

    vocab_size: Size
    """The true size (HF's). The padding for tensor parallelism is derived when the model is built."""

    max_position_embeddings: Annotated[int, Range(ge=1)]
    """The longest sequence that the model takes."""

    layer_pattern: str | None = None
    """For a hybrid: one letter per layer, M for Mamba, * for attention, - for MLP. Null: num_layers of attention and MLP."""

    mamba: MambaConfig | None = None
    """For a hybrid: the sizes of its Mamba-2 mixers."""

    activation: Literal["swiglu", "relu2"] = "swiglu"
    """The MLP's activation: SwiGLU, or squared ReLU without a gate."""

    qkv_bias: bool = False
    """The attention's input projection has a bias."""

    norm_epsilon: Annotated[float, Range(gt=0)] = 1e-5
    """RMSNorm's epsilon. 1e-5 for a hybrid: Megatron-Core fixes it in its Mamba mixer."""

    position_embedding: Literal["rope", "none"] = "rope"
    """Rotary positions, or none."""

    rotary_base: Annotated[float, Range(gt=0)] = 10000.0
    """The base of the rotary frequencies (HF's rope_theta)."""

    rope_scaling: Llama3Rope | None = None
    """LLaMA-3.1's scaling of the rotary frequencies. Null: none."""

    yarn: YarnRope | None = None
    """yarn's scaling of the rotary frequencies, in place of rope_scaling. Null: none."""

    tie_word_embeddings: bool = False
    """The output layer has the embedding's weights."""

    init_method_std: Annotated[float, Range(ge=0)] = 0.02
    """The standard deviation of randomly initialised weights."""

    window_size: Annotated[int | None, Range(ge=1)] = None
    """The tokens that a token attends to, itself included (HF's sliding_window). Null: all before it."""

    attention_multiplier: Annotated[float | None, Multiplier] = None
    """The scale of the attention scores. Null: 1 / sqrt(kv_channels)."""

    embedding_multiplier: Annotated[float, Multiplier] = 1.0
    """The embedding's output is multiplied by it."""

    residual_multiplier: Annotated[float, Multiplier] = 1.0
    """What a layer adds to the residual stream is multiplied by it."""

    logits_scaling: Annotated[float, Multiplier] = 1.0
    """The logits are divided by it."""


@dataclass(frozen=True, kw_only=True)
class PresetConfig(Section):
    """A file of configs/models: an architecture alone."""

    model: ModelConfig
