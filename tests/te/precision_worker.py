"""Asks Megatron-Core and Transformer Engine what they make of our precision settings: precision_worker.py FILE writes what it found as JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import standin
import torch
import torch.distributed as dist
import worker

from megatron_prism.core.config import FP8Config, GangConfig, MambaConfig, ModelConfig, OffloadConfig, OptimizerConfig, RecomputeConfig
from megatron_prism.models import build
from megatron_prism.parallel import groups
from megatron_prism.train import optim

DENSE = ModelConfig(
    family="llama",
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=160,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=384,
    max_position_embeddings=256,
)
HYBRID = ModelConfig(**vars(DENSE) | {"layer_pattern": "M-*-", "mamba": MambaConfig(num_heads=16, head_dim=16, state_dim=16, num_groups=2)})
RAGGED = dataclasses.replace(HYBRID, mamba=MambaConfig(num_heads=8, head_dim=16, state_dim=16, num_groups=2))  # 328 rows of in_proj
RECIPES = {
    "tensorwise": FP8Config(),
    "delayed": FP8Config(recipe="delayed", amax_history_len=7, amax_compute_algo="most_recent", margin=3, format="e4m3"),
    "blockwise": FP8Config(recipe="blockwise"),
}
ENDS = FP8Config(num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=1)
ADAM = OptimizerConfig()
WITHOUT_GRAPHS: tuple[dict[str, Any], ...] = (
    {"recompute": RecomputeConfig(granularity="full")},
    {"offload": OffloadConfig(activation_layers=2)},
)
TOLD = (
    "fp8_recipe",
    "fp8_param_gather",
    "optimizer_cpu_offload",
    "optimizer_offload_fraction",
    "overlap_cpu_optimizer_d2h_h2d",
    "use_precision_aware_optimizer",
)
HOLDS_WEIGHTS = "use_precision_aware_optimizer_no_fp8_or_ds_fp8"  # FusedAdam holds the main weights; else Megatron-Core does
OF_MOMENTS = (
    "use_precision_aware_optimizer",
    "exp_avg_dtype",
    "exp_avg_sq_dtype",
    "main_params_dtype",
    "store_param_remainders",
    HOLDS_WEIGHTS,
)
KINDS = {"bf16": None, "delayed": FP8Config(recipe="delayed"), "tensorwise": FP8Config()}
NVTE = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"


def main(target: Path) -> None:
    torch.set_num_threads(1)
    standin.install(Path(sys.prefix) / "transformer_engine_python")
    groups.join()
    with groups.grid(GangConfig()) as grid, worker.believing_te():
        found = {
            "recipes": {name: recipe(settings(fp8)) for name, fp8 in RECIPES.items()},
            "unknown": attempt(lambda: recipe(types.SimpleNamespace(**vars(settings(FP8Config())) | {"fp8_recipe": "nonsense"}))),
            "layers": {name: layers(model, grid) for name, model in {"dense": DENSE, "hybrid": HYBRID}.items()},
            "ragged": attempt(lambda: layers(RAGGED, grid)),
            "offloaded": attempt(lambda: layers(DENSE, grid, offload=OffloadConfig(activation_layers=2))),
            "hybrid offloaded": layers(HYBRID, grid, offload=OffloadConfig(activation_layers=2)),
            "too many offloaded": attempt(lambda: settings(None, offload=OffloadConfig(activation_layers=4))),
            "optimizer": optimizer(FP8Config(recipe="delayed", param=True), OffloadConfig(optimizer_fraction=0.5)),
            "plain optimizer": optimizer(None, OffloadConfig()),
            "moments": {kind: optimizer(fp8, OffloadConfig(), OptimizerConfig(moments="bf16"), OF_MOMENTS) for kind, fp8 in KINDS.items()},
            "graphs": [graphs(False), graphs(True)],
            "graphs refused": [attempt(lambda more=more: settings(None, cuda_graphs=True, **more)) for more in WITHOUT_GRAPHS],
            "deterministic": {value: deterministic(grid, value) for value in ("0", "1")},
            "machines": machines(),
        }
    dist.destroy_process_group()
    target.write_text(json.dumps(found))


def settings(fp8: FP8Config | None, **more: Any) -> Any:
    return build.transformer_config(DENSE, GangConfig(fp8=fp8, **more))


def recipe(config: Any) -> dict[str, Any]:
    """Return what Megatron-Core makes of a config's FP8 keys."""
    from megatron.core.fp8_utils import get_fp8_recipe

    made = get_fp8_recipe(config)
    names = ("margin", "amax_history_len", "amax_compute_algo")
    return {"class": family(made), "format": made.fp8_format.name, **{name: getattr(made, name) for name in names if hasattr(made, name)}}


def family(made: Any) -> str:
    from transformer_engine.common import recipe as te

    return next(
        name
        for name in ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")
        if isinstance(made, getattr(te, name))
    )


def layers(model: ModelConfig, grid: groups.Groups, **more: Any) -> dict[str, Any]:
    """Return which layers of a model with bf16 ends stay outside FP8, and whether its weights are ordinary."""
    from megatron.core.fp8_utils import get_fp8_context

    fp8 = None if more else ENDS
    chunk = build.unwrap(build.build(model, grid, GangConfig(fp8=fp8, **more))[0])
    contexts = [get_fp8_context(chunk.config, layer.layer_number - 1) for layer in chunk.decoder.layers]
    return {
        "in_bf16": [isinstance(context, contextlib.nullcontext) for context in contexts],
        "dtypes": sorted({str(parameter.dtype) for parameter in chunk.parameters()}),
        "offloads": not isinstance(getattr(chunk.decoder, "offload_context", contextlib.nullcontext()), contextlib.nullcontext),
    }


def optimizer(fp8: FP8Config | None, offload: OffloadConfig, adam: OptimizerConfig = ADAM, names: tuple[str, ...] = TOLD) -> dict[str, Any]:
    """Return what Megatron-Core's optimizer and data-parallel wrapper are told."""
    made = types.SimpleNamespace(scale_loss=None)
    told: dict[str, Any] = {}

    def remember(config: Any, chunks: Any) -> Any:
        told.update(vars(config))
        return made

    def remember_wrapper(config: Any, ddp: Any, chunk: Any, disable_bucketing: bool) -> Any:
        told.update(vars(ddp))
        return chunk

    chunk = types.SimpleNamespace(config=types.SimpleNamespace())
    with (
        mock.patch("megatron.core.optimizer.get_megatron_optimizer", remember),
        mock.patch("megatron.core.distributed.DistributedDataParallel", remember_wrapper),
    ):
        gang = GangConfig(fp8=fp8, offload=offload)
        optim.build(optim.wrap([chunk], gang), adam, gang)
    return {name: str(told[name]) if isinstance(told[name], torch.dtype) else told[name] for name in names}


def graphs(is_on: bool) -> list[Any]:
    """Return what Megatron-Core makes of cuda_graphs: whose graphs, of which modules (none named: whole layers). The second name is 0.19's."""
    made = settings(None, cuda_graphs=is_on)
    return [made.cuda_graph_impl, getattr(made, "cuda_graph_modules", None) or made.cuda_graph_scope or []]


def deterministic(grid: groups.Groups, value: str) -> Any:
    with mock.patch.dict(os.environ, {NVTE: value}):
        return attempt(lambda: build.build(DENSE, grid, GangConfig(deterministic=True))[0].config.deterministic_mode)


def machines() -> list[dict[str, Any]]:
    """Return what TE itself says of each recipe on a device of this compute capability and CUDA."""
    from transformer_engine.common import recipe as te
    from transformer_engine.pytorch import quantization

    vars(sys.modules["transformer_engine_torch"])["get_cublasLt_version"] = lambda: 130000
    made = {"delayed": te.DelayedScaling(), "tensorwise": te.Float8CurrentScaling(), "blockwise": te.Float8BlockScaling()}
    found = []
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0)):
        for cuda in ("12.8", "12.9", "13.0"):
            for check in (quantization.check_fp8_support, quantization.check_fp8_block_scaling_support):
                check.cache_clear()
            with (
                mock.patch.object(quantization, "get_device_compute_capability", lambda answer=capability: answer),
                mock.patch("torch.version.cuda", cuda),
            ):
                verdicts = {
                    name: attempt(lambda asked=asked: quantization.check_recipe_support(asked)) is None for name, asked in made.items()
                }
            found.append({"capability": capability, "cuda": cuda, "verdicts": verdicts})
    return found


def attempt(ask: Any) -> Any:
    try:
        return ask()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
