"""From an architecture and a rank grid to this rank's Megatron-Core model chunks. No other module knows the model classes.

The class is GPTModel, or for a hybrid MambaModel (0.16) or HybridModel (0.19). models/spec.py defines their layers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from megatron_prism.core.check.model import padded_vocab_size
from megatron_prism.core.config import FP8Config, GangConfig, ModelConfig, OffloadConfig, ParallelConfig, RecomputeConfig
from megatron_prism.core.patch import replaced
from megatron_prism.models import chunked_loss, multipliers, rope, spec
from megatron_prism.models.norm import LocalFinalNorm
from megatron_prism.parallel import host, megatron_versions
from megatron_prism.parallel.groups import Groups, chunk_ends

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(model: ModelConfig, gang: GangConfig) -> Any:
    """Return Megatron-Core's TransformerConfig."""
    from megatron.core.activations import squared_relu
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnBackend

    fused = spec.use_transformer_engine()
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        window_size=None if model.window_size is None else (model.window_size - 1, 0),  # Megatron counts only the tokens before
        softmax_scale=rope.softmax_scale(model),
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=model.activation == "swiglu",
        activation_func=torch.nn.functional.silu if model.activation == "swiglu" else squared_relu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_method_std,
        params_dtype=DTYPES[gang.precision],
        pipeline_dtype=DTYPES[gang.precision],
        bf16=gang.precision == "bf16",
        calculate_per_token_loss=True,  # the mean over all tokens of the step, whatever the layout
        **(_hybrid_settings(model, gang.parallel.pp) if model.layer_pattern else _dense_settings(model, gang.parallel)),
        **_parallel_settings(gang.parallel),
        **_recompute_settings(gang.recompute),
        **_fp8_settings(gang.fp8),
        **_offload_settings(gang.offload),
        attention_backend=AttnBackend[gang.attention_backend],
        deterministic_mode=gang.deterministic,
        bias_activation_fusion=fused and model.activation == "swiglu",
        bias_dropout_fusion=fused,
        apply_rope_fusion=fused,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=fused
        and (_has_apex() if gang.fusion.gradient_accumulation is None else gang.fusion.gradient_accumulation),
        cross_entropy_loss_fusion=gang.fusion.cross_entropy != "none",
        cross_entropy_fusion_impl="te" if gang.fusion.cross_entropy == "te" else "native",
    )


def _has_apex() -> bool:
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def _parallel_settings(parallel: ParallelConfig) -> dict[str, Any]:
    """Return the parallel settings. Pipeline messages are batched; with model chunks (vpp) they are overlapped and sent one by one.

    With vpp at pp 2, two batched messages between the same two ranks are paired wrongly, and the gradients are silently wrong
    (Megatron-Core 0.16 and 0.19).
    """
    interleaved = parallel.vpp is not None
    # gloo may still be sending these outputs (wrong losses were seen); so may NCCL with model chunks before 0.19 (Megatron-LM's PR 4047)
    deallocates = parallel.pp > 1 and host.has_cuda() and (not interleaved or megatron_versions.core_version() >= (0, 19))
    return {
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": parallel.vpp,
        "context_parallel_size": parallel.cp,
        "cp_comm_type": parallel.cp_comm_type,
        "hierarchical_context_parallel_sizes": parallel.cp_sizes,
        "sequence_parallel": parallel.sequence_parallel,
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "deallocate_pipeline_outputs": deallocates,
    }


def _recompute_settings(recompute: RecomputeConfig) -> dict[str, Any]:
    whole = recompute.granularity == "full"
    return {
        "recompute_granularity": None if recompute.granularity == "none" else recompute.granularity,
        "recompute_method": ("uniform" if recompute.num_layers is None else "block") if whole else None,
        "recompute_num_layers": (recompute.num_layers or 1) if whole else None,
        "recompute_modules": list(recompute.modules),
    }


def _fp8_settings(fp8: FP8Config | None) -> dict[str, Any]:
    if fp8 is None:
        return {}
    return {
        "fp8": fp8.format,
        "fp8_recipe": fp8.recipe,
        "fp8_amax_history_len": fp8.amax_history_len,
        "fp8_amax_compute_algo": fp8.amax_compute_algo,
        "fp8_margin": fp8.margin,
        "first_last_layers_bf16": fp8.num_layers_at_start_in_bf16 + fp8.num_layers_at_end_in_bf16 > 0,
        "num_layers_at_start_in_bf16": fp8.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": fp8.num_layers_at_end_in_bf16,
        "fp8_param": fp8.param,
    }


def _offload_settings(offload: OffloadConfig) -> dict[str, Any]:
    if not offload.activation_layers:
        return {}
    return {
        "cpu_offloading": True,
        "cpu_offloading_num_layers": offload.activation_layers,
        "cpu_offloading_activations": True,
        "cpu_offloading_weights": False,
    }


def _dense_settings(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    return {"pipeline_model_parallel_layout": uneven_stages(model.num_layers, parallel.pp * (parallel.vpp or 1))}


def _hybrid_settings(model: ModelConfig, num_stages: int) -> dict[str, Any]:
    assert model.mamba is not None
    first, last = uneven_ends(model.num_layers, num_stages)
    return {
        "is_hybrid_model": True,
        "mamba_num_heads": model.mamba.num_heads,
        "mamba_head_dim": model.mamba.head_dim,
        "mamba_state_dim": model.mamba.state_dim,
        "mamba_num_groups": model.mamba.num_groups,
        "num_layers_in_first_pipeline_stage": first,
        "num_layers_in_last_pipeline_stage": last,
    }


def uneven_ends(num_layers: int, num_stages: int) -> tuple[int | None, int | None]:
    """Return the numbers of layers of the first and the last stage, where the stages cannot be equal. All others hold the same number.

    This is the only uneven split of a hybrid (megatron/core/ssm/mamba_block.py).
    """
    if num_layers % num_stages == 0:
        return None, None
    middle = -(-num_layers // num_stages)
    if num_layers - middle * (num_stages - 2) < 2:
        middle -= 1
    ends = num_layers - middle * (num_stages - 2)
    return ends - ends // 2, ends // 2


def uneven_stages(num_layers: int, num_stages: int) -> list[list[str]] | None:
    """Return each stage's layers, in Megatron's names. Earlier stages hold one layer more. None: all stages are equal."""
    each, more = divmod(num_layers, num_stages)
    if not more:
        return None
    stages = [["decoder"] * (each + (stage < more)) for stage in range(num_stages)]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def stages(model: ModelConfig, parallel: ParallelConfig) -> list[set[int]]:
    """Return the layers that each pipeline rank holds: every pp-th of the chunks."""
    each, more = divmod(model.num_layers, num_chunks := parallel.pp * (parallel.vpp or 1))
    sizes = [each + (chunk < more) for chunk in range(num_chunks)]
    if model.layer_pattern is not None and more:
        first, last = uneven_ends(model.num_layers, num_chunks)
        assert first is not None and last is not None
        sizes = [first, *[(model.num_layers - first - last) // max(num_chunks - 2, 1)] * (num_chunks - 2), last]
    ends = list(itertools.accumulate(sizes, initial=0))
    return [
        {layer for chunk in range(rank, num_chunks, parallel.pp) for layer in range(*ends[chunk : chunk + 2])}
        for rank in range(parallel.pp)
    ]


def build(model: ModelConfig, groups: Groups, gang: GangConfig) -> list[Any]:
    """Return this rank's model chunks (one, or vpp of them) on its device, randomly initialised, not yet wrapped."""
    config = transformer_config(model, gang)
    chunks = [_chunk(model, config, groups, *ends) for ends in chunk_ends(groups)]
    if gang.logits_chunk_tokens is not None and (last := unwrap(chunks[-1])).post_process:
        chunked_loss.install(last, gang.logits_chunk_tokens)
    return chunks


def _chunk(model: ModelConfig, config: Any, groups: Groups, vp_stage: int | None, first: bool, last: bool) -> Any:
    from megatron.core.transformer.module import Float16Module

    padded = padded_vocab_size(model.vocab_size, groups.tp)
    ends = {
        "config": config,
        "vocab_size": padded,
        "max_sequence_length": model.max_position_embeddings,
        "pre_process": first,
        "post_process": last,
        "share_embeddings_and_output_weights": model.tie_word_embeddings,
        "position_embedding_type": model.position_embedding,
        "rotary_base": model.rotary_base,
    }
    with _output_layer_without_apex(config.gradient_accumulation_fusion):
        chunk = _dense(model, ends, vp_stage) if model.layer_pattern is None else _hybrid(model, ends)
    rope.install(chunk, model)
    if last and not _has_apex():
        chunk.output_layer.gradient_accumulation_fusion = False
    multipliers.scale_ends(chunk, model, first, last)
    if last and padded > model.vocab_size:
        mask_padded_vocabulary(chunk, model.vocab_size, padded, groups)
    chunk.to(host.device())
    return Float16Module(config, chunk) if config.bf16 else chunk


@contextlib.contextmanager
def _output_layer_without_apex(is_fused: bool) -> Iterator[None]:
    """Within the block, let Megatron's output layer be built beside Transformer Engine's fused layers without apex's kernel.

    TE's layers need no apex for it, but ColumnParallelLinear looks at the whole model's switch (0.16 and 0.19).
    """
    from megatron.core.tensor_parallel import layers

    if not is_fused or _has_apex():
        yield
        return
    with replaced(layers, "_grad_accum_fusion_available", True):
        yield


def _dense(model: ModelConfig, ends: dict[str, Any], vp_stage: int | None) -> Any:
    from megatron.core.models.gpt import GPTModel

    scaling = model.rope_scaling
    return GPTModel(
        **ends,
        transformer_layer_spec=spec.dense(ends["config"], model, spec.use_transformer_engine(), vp_stage),
        rope_scaling=scaling is not None,
        rope_scaling_factor=scaling.factor if scaling else 1.0,
        vp_stage=vp_stage,
    )


def _hybrid(model: ModelConfig, ends: dict[str, Any]) -> Any:
    with_te, classes = spec.use_transformer_engine(), megatron_versions.hybrid_classes()
    stack = spec.hybrid(model, with_te)
    with contextlib.nullcontext() if with_te else classes.final_norm(LocalFinalNorm):
        return classes.model(**ends, **{classes.spec_key: stack, classes.pattern_key: model.layer_pattern})


def mask_padded_vocabulary(chunk: Any, vocab_size: int, padded: int, groups: Groups) -> None:
    """Mask the vocabulary's padding rows in every softmax, so that the loss is the unpadded model's.

    Otherwise each padding row adds exp(its logit) to the softmax, and the loss depends on tp.
    """
    rows = padded // groups.tp
    valid = min(max(vocab_size - groups.tp_rank * rows, 0), rows)  # of this rank's rows
    if valid == rows:
        return

    def hide(module: torch.nn.Module, args: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        logits_SBV, bias = output
        if (
            logits_SBV.shape[-1] != rows
        ):  # gathered by Megatron-Core's inference, whose sampler leaves the padding out (generate/dynamic.py)
            return output
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
