"""An architecture and a rank grid become this rank's Megatron-Core model chunks: the one place that knows GPTModel.

The layers come from Transformer Engine where CUDA and TE are present, else from Megatron-Core's local spec; names,
shapes and checkpoint keys are the same in both.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from megatron_prism.core.check import padded_vocab_size
from megatron_prism.core.config import ModelConfig, ParallelConfig, Precision, RecomputeConfig
from megatron_prism.models import scalars
from megatron_prism.parallel import host
from megatron_prism.parallel.groups import Groups, chunk_ends

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def use_transformer_engine() -> bool:
    """Say whether the layers come from Transformer Engine."""
    return host.has_cuda() and importlib.util.find_spec("transformer_engine") is not None


def transformer_config(model: ModelConfig, parallel: ParallelConfig, precision: Precision, recompute: RecomputeConfig) -> Any:
    """Return Megatron-Core's TransformerConfig.

    Pipeline messages: batched, but with model chunks (vpp) overlapped and one by one: two batched messages between
    the same two ranks are paired wrongly at pp 2, and the gradients are silently wrong (Megatron-Core 0.16 and 0.19).
    """
    from megatron.core.transformer import TransformerConfig

    fused, interleaved = use_transformer_engine(), parallel.vpp is not None
    whole = recompute.granularity == "full"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        window_size=None if model.window_size is None else (model.window_size - 1, 0),  # Megatron counts the tokens before
        softmax_scale=model.attention_multiplier,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_method_std,
        params_dtype=DTYPES[precision],
        pipeline_dtype=DTYPES[precision],
        bf16=precision == "bf16",
        calculate_per_token_loss=True,  # the mean over the tokens of the whole step, whatever the layout
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp,
        pipeline_model_parallel_layout=uneven_layout(model.num_layers, parallel.pp * (parallel.vpp or 1)),
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        deallocate_pipeline_outputs=parallel.pp > 1 and host.has_cuda(),  # gloo may still be sending them: wrong losses, seen
        recompute_granularity=None if recompute.granularity == "none" else recompute.granularity,
        recompute_method=("uniform" if recompute.num_layers is None else "block") if whole else None,
        recompute_num_layers=(recompute.num_layers or 1) if whole else None,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        apply_rope_fusion=fused,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=fused and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
    )


def uneven_layout(num_layers: int, num_stages: int) -> list[list[str]] | None:
    """Return Megatron's layer layout where the stages cannot be equal: the earlier ones hold one layer more."""
    each, more = divmod(num_layers, num_stages)
    if not more:
        return None
    stages = [["decoder"] * (each + (stage < more)) for stage in range(num_stages)]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def build(
    model: ModelConfig,
    groups: Groups,
    parallel: ParallelConfig,
    precision: Precision,
    recompute: RecomputeConfig | None = None,
) -> list[Any]:
    """Return this rank's model chunks (one, or vpp of them) on its device, randomly initialised, not yet wrapped."""
    config = transformer_config(model, parallel, precision, recompute or RecomputeConfig())
    return [_chunk(model, config, groups, *ends) for ends in chunk_ends(groups)]


def _chunk(model: ModelConfig, config: Any, groups: Groups, vp_stage: int | None, first: bool, last: bool) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import Float16Module

    scaling = model.rope_scaling
    padded = padded_vocab_size(model.vocab_size, groups.tp)
    chunk = GPTModel(
        config=config,
        transformer_layer_spec=layer_spec(config, model, vp_stage),
        vocab_size=padded,
        max_sequence_length=model.max_position_embeddings,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=model.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
        rope_scaling=scaling is not None,
        rope_scaling_factor=scaling.factor if scaling else 1.0,
        vp_stage=vp_stage,
    )
    scalars.scale_ends(chunk, model, first, last)
    if last and padded > model.vocab_size:
        mask_padded_vocabulary(chunk, model.vocab_size, padded, groups)
    chunk.to(host.device())
    return Float16Module(config, chunk) if config.bf16 else chunk


def layer_spec(config: Any, model: ModelConfig, vp_stage: int | None) -> Any:
    """Return the spec of this chunk's layers and of the final norm."""
    from megatron.core.models.gpt import gpt_layer_specs as specs

    if use_transformer_engine():
        layer = specs.get_gpt_layer_with_transformer_engine_spec()
        scalars.scale_residuals(layer, model.residual_multiplier)
        return layer
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    from megatron_prism.models.norm import LocalFinalNorm, LocalNorm

    layer = specs.get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = LocalNorm
    scalars.scale_residuals(layer, model.residual_multiplier)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=vp_stage),
        layer_norm=LocalFinalNorm,
    )


def mask_padded_vocabulary(chunk: Any, vocab_size: int, padded: int, groups: Groups) -> None:
    """Keep the rows that only pad the vocabulary out of every softmax, so that the loss is the unpadded model's.

    Without it each padded row adds exp(its logit) to the softmax: the loss would depend on tp.
    """
    rows = padded // groups.tp
    valid = min(max(vocab_size - groups.tp_rank * rows, 0), rows)  # of this rank's rows
    if valid == rows:
        return

    def hide(module: torch.nn.Module, args: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        logits_SBV, bias = output
        hidden = torch.arange(rows, device=logits_SBV.device) >= valid
        return logits_SBV.masked_fill(hidden, torch.finfo(logits_SBV.dtype).min), bias

    chunk.output_layer.register_forward_hook(hide)


def unwrap(chunk: Any) -> Any:
    """Return the GPTModel inside its wrappers (DistributedDataParallel, Float16Module)."""
    while isinstance(inner := getattr(chunk, "module", None), torch.nn.Module):
        chunk = inner
    return chunk


def num_parameters(chunks: list[Any]) -> int:
    """Return the parameters this rank holds."""
    return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
