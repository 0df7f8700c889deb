"""A Megatron model chunk's parameters as the residual blocks of blocks.py: references, not copies, so they follow training."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from megatron_prism.core.config import ModelConfig
from megatron_prism.core.errors import InputError, Problem
from megatron_prism.generate.blocks import MLP, Attention, Block, Mamba, Positions
from megatron_prism.models import mamba, rope
from megatron_prism.models.build import unwrap
from megatron_prism.models.spec import FC1_NORM, IN_PROJ_NORM, QKV_NORM
from megatron_prism.parallel import megatron_versions
from megatron_prism.parallel.groups import Groups

LOCAL_NORMS = QKV_NORM | FC1_NORM | IN_PROJ_NORM
Parameters = dict[str, Tensor]


def read(chunk: Any, model: ModelConfig, groups: Groups) -> tuple[list[Block], Parameters, Positions]:
    """Return a chunk's blocks in order, the parameters outside its layers, and its Positions.

    The parameters outside are `embedding`, `norm` and `output`, if the chunk has them.
    Raises: InputError naming a parameter that generation would ignore.
    """
    bare = unwrap(chunk)
    layers: dict[int, Parameters] = {}
    ends: Parameters = {}
    for name, parameter in bare.named_parameters():
        if layer := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", megatron_versions.weight_name(name)):
            layers.setdefault(int(layer[1]), {})[_fused_name(layer[2])] = parameter.detach()
        else:
            ends[name] = parameter.detach()
    blocks: list[Block] = []
    for number in sorted(layers):
        blocks += _blocks(layers[number], model, groups)
    tied = bare.shared_embedding_or_output_weight().detach() if bare.post_process and model.tie_word_embeddings else None
    outside = {
        "embedding": ends.pop("embedding.word_embeddings.weight", None),
        "norm": ends.pop("decoder.final_layernorm.weight", ends.pop("decoder.final_norm.weight", None)),
        "output": ends.pop("output_layer.weight", tied),
    }
    unread = [f"decoder.layers.{number}.{name}" for number, layer in layers.items() for name in layer] + [*ends]
    if unread:
        required = "attention, MLP and Mamba layers as megatron_prism.models.spec builds them"
        raise InputError([Problem(name, "a parameter that generation does not know", required) for name in unread[:8]])
    inverse_F = bare.rotary_pos_emb.inv_freq if model.position_embedding == "rope" else None
    dtype = bare.config.params_dtype
    positions = Positions(inverse_F, model.window_size, dtype, torch.float32 if bare.config.apply_rope_fusion else dtype)
    return blocks, {name: weight for name, weight in outside.items() if weight is not None}, positions


def _fused_name(name: str) -> str:
    """Return the Transformer Engine name of a layer's parameter. TE keeps a norm with the linear layer after it."""
    for local, fused in LOCAL_NORMS.items():
        if name.startswith(local):
            return fused + name.removeprefix(local)
    return name


def _blocks(layer: Parameters, model: ModelConfig, groups: Groups) -> list[Block]:
    """Take a Megatron layer's parameters out of `layer`, and return its one or two blocks."""
    blocks: list[Block] = []
    if "self_attention.linear_qkv.weight" in layer:
        blocks.append(_attention(layer, model, groups))
    if "mixer.in_proj.weight" in layer:
        blocks.append(_mamba(layer, model, groups))
    if "mlp.linear_fc1.weight" in layer:
        norm_D, fc1 = layer.pop("mlp.linear_fc1.layer_norm_weight"), layer.pop("mlp.linear_fc1.weight")
        blocks.append(MLP(norm_D, fc1, layer.pop("mlp.linear_fc2.weight"), is_gated=model.activation == "swiglu"))
    return blocks


def _attention(layer: Parameters, model: ModelConfig, groups: Groups) -> Attention:
    scale = rope.softmax_scale(model)
    return Attention(
        norm_D=layer.pop("self_attention.linear_qkv.layer_norm_weight"),
        qkv=layer.pop("self_attention.linear_qkv.weight"),
        bias=layer.pop("self_attention.linear_qkv.bias") if model.qkv_bias else None,
        out_DY=layer.pop("self_attention.linear_proj.weight"),
        num_groups=model.num_query_groups // groups.tp,
        head_dim=model.kv_channels,
        scale=model.kv_channels**-0.5 if scale is None else scale,
    )


def _mamba(layer: Parameters, model: ModelConfig, groups: Groups) -> Mamba:
    assert model.mamba is not None
    weight_WC = layer.pop("mixer.conv1d.weight").flatten(1).t().contiguous()  # copied in each call of generate(): 4 numbers per channel
    return Mamba(
        norm_D=layer.pop("mixer.in_proj.layer_norm_weight"),
        in_proj=layer.pop("mixer.in_proj.weight"),
        conv_CW=weight_WC.t(),
        conv_bias_C=layer.pop("mixer.conv1d.bias"),
        A_H=-layer.pop("mixer.A_log").float().exp(),
        D_H=layer.pop("mixer.D").float(),
        dt_bias_H=layer.pop("mixer.dt_bias").float(),
        gate_norm_Y=layer.pop("mixer.norm.weight"),
        out_DY=layer.pop("mixer.out_proj.weight"),
        num_groups=model.mamba.num_groups // groups.tp,
        head_dim=model.mamba.head_dim,
        state_dim=model.mamba.state_dim,
        chunk_size=model.mamba.chunk_size,
        kernels=mamba.kernels(),
    )
