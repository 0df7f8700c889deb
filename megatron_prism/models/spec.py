"""The layers of a model as Megatron-Core specs: Transformer Engine's (on CUDA) or Megatron's own (local), dense or hybrid.

All specs store the same names and shapes. TE fuses a norm into the following linear layer; the local layer's key map gives its norm the
same name. Source: megatron/core/models/gpt/gpt_layer_specs.py, models/mamba/mamba_layer_specs.py.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

from megatron_prism.core.config import MambaConfig, ModelConfig
from megatron_prism.models import local_attention, mamba, multipliers
from megatron_prism.models.norm import LocalFinalNorm, LocalNorm
from megatron_prism.parallel import host, megatron_versions

QKV_NORM = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
FC1_NORM = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
IN_PROJ_NORM = {"norm.": "mixer.in_proj.layer_norm_"}


def use_transformer_engine() -> bool:
    """Say whether the layers come from Transformer Engine."""
    return host.has_cuda() and importlib.util.find_spec("transformer_engine") is not None


def dense(config: Any, model: ModelConfig, with_te: bool, vp_stage: int | None) -> Any:
    """Return GPTModel's spec: this chunk's layers and the final norm."""
    layer = _transformer_layer(model, with_te)
    if with_te:
        return layer
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=vp_stage),
        layer_norm=LocalFinalNorm,
    )


def hybrid(model: ModelConfig, with_te: bool) -> Any:
    """Return the hybrid stack's spec: its Mamba, attention and MLP layers. The last two are halves of the dense layer."""
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    classes, whole = megatron_versions.hybrid_classes(), _transformer_layer(model, with_te).submodules
    norm = IdentityOp if with_te else LocalNorm
    attention = TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=whole.self_attention,
        self_attn_bda=whole.self_attn_bda,
        sharded_state_dict_keys_map={} if with_te else dict(QKV_NORM),
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=norm,
        mlp=whole.mlp,
        mlp_bda=whole.mlp_bda,
        sharded_state_dict_keys_map={} if with_te else dict(FC1_NORM),
    )
    assert model.mamba is not None
    return ModuleSpec(
        module=classes.stack,
        submodules=classes.submodules(
            mamba_layer=_mamba_layer(model.mamba, model.residual_multiplier, with_te, norm),
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        ),
    )


def _transformer_layer(model: ModelConfig, with_te: bool) -> Any:
    """Return the spec of an attention and MLP layer, with this model's residual addition."""
    from megatron.core.models.gpt import gpt_layer_specs as specs

    if with_te:
        layer = specs.get_gpt_layer_with_transformer_engine_spec()
    else:
        layer = specs.get_gpt_layer_local_spec(normalization="RMSNorm")
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = LocalNorm
        layer.submodules.sharded_state_dict_keys_map = QKV_NORM | FC1_NORM
        layer.submodules.self_attention.submodules.core_attention = local_attention.core_attention()
    add = multipliers.residual_addition(model.residual_multiplier)
    layer.submodules = dataclasses.replace(layer.submodules, self_attn_bda=add, mlp_bda=add)
    return layer


def _mamba_layer(sizes: MambaConfig, residual_multiplier: float, with_te: bool, norm: Any) -> Any:
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    mixer = mamba.mixer_module()
    in_proj, out_proj = _te_linears() if with_te else _local_linears()
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=norm,
            mixer=ModuleSpec(
                module=mixer.MambaMixer,
                params={"chunk_size": sizes.chunk_size, "d_conv": sizes.conv_kernel},
                submodules=mixer.MambaMixerSubmodules(in_proj=in_proj, out_proj=out_proj),
            ),
            mamba_bda=multipliers.residual_addition(residual_multiplier),
            sharded_state_dict_keys_map={} if with_te else dict(IN_PROJ_NORM),
        ),
    )


def _te_linears() -> tuple[Any, Any]:
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TERowParallelLinear

    return TELayerNormColumnParallelLinear, TERowParallelLinear


def _local_linears() -> tuple[Any, Any]:
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    return ColumnParallelLinear, RowParallelLinear
