"""Checks of FP8, offloading, determinism and the environment against a gang's section, an architecture and a machine: pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from megatron_prism.core.config import FP8Config, GangConfig, ModelConfig
from megatron_prism.core.errors import Problem

Version = tuple[int, int]
OF_DELAYED = ("amax_history_len", "amax_compute_algo", "margin")
LEAST_TE: dict[str, Version] = {"delayed": (1, 0), "tensorwise": (2, 2), "blockwise": (2, 3)}  # megatron/core/fp8_utils.py, get_fp8_recipe
LEAST_CAPABILITY: dict[str, Version] = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0)}  # TE's check_recipe_support
BLOCKWISE_CUDA: Version = (12, 9)  # TE's check_recipe_support
VARIABLE = re.compile(r"(NCCL|NVTE|CUDA|TORCH|PYTORCH|CUBLAS|GLOO|OMP|UCX|TRITON)_[A-Z0-9_]+")
# megatron/core/models/common/language_module/language_module.py asserts these values, and sets them
ATTENTION = {
    "auto": {"NVTE_FLASH_ATTN": "1", "NVTE_FUSED_ATTN": "1", "NVTE_UNFUSED_ATTN": "1"},
    "unfused": {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "0", "NVTE_UNFUSED_ATTN": "1"},
}
# Values that Megatron-Core vouches for (megatron/training/determinism.py of 0.19); NCCL_ALGO may list several.
DETERMINISTIC = {
    "NCCL_ALGO": ("Ring", "CollnetDirect", "CollnetChain", "^NVLS"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
}


@dataclass(frozen=True)
class Machine:
    """A rank's machine. Versions are (major, minor); None where the part is absent."""

    has_cuda: bool
    capability: Version | None = None
    cuda: Version | None = None
    transformer_engine: Version | None = None


def check_keys(gang: GangConfig) -> list[Problem]:
    """Return the problems between the keys of FP8, offloading, determinism and the environment."""
    return [*_check_fp8(gang), *_check_bf16(gang), *_check_offload(gang), *_check_names(gang), *check_variables(gang, gang.environment)]


def _check_fp8(gang: GangConfig) -> Iterator[Problem]:
    fp8 = gang.fp8
    if fp8 is None:
        return
    if fp8.recipe == "mxfp8":
        yield Problem(
            "fp8.recipe", "mxfp8", "tensorwise, delayed or blockwise", "mxfp8 is for Blackwell (sm100), and does not run on an H100"
        )
    if gang.precision != "bf16":
        yield Problem("precision", f"{gang.precision} with fp8", "bf16", "weights and what is not FP8 are in bf16")
    defaults = {item.name: item.default for item in fields(FP8Config)}
    for name in OF_DELAYED:
        if fp8.recipe != "delayed" and getattr(fp8, name) != defaults[name]:
            yield Problem(
                f"fp8.{name}", f"{getattr(fp8, name)} with recipe {fp8.recipe}", "recipe delayed", "remove it: the recipe does not read it"
            )
    if fp8.recipe == "delayed" and (fp8.num_layers_at_start_in_bf16 or fp8.num_layers_at_end_in_bf16):
        yield Problem(
            "fp8.num_layers_at_start_in_bf16, num_layers_at_end_in_bf16",
            "layers in bf16 with recipe delayed",
            "0 and 0",
            "Megatron-Core cannot leave delayed scaling within a step; use tensorwise",
        )
    if fp8.param and not gang.parallel.distributed_optimizer:
        yield Problem("fp8.param", "true", "parallel.distributed_optimizer true too", "another optimizer keeps no FP8 weights")


def _check_bf16(gang: GangConfig) -> Iterator[Problem]:
    if gang.precision != "bf16" and gang.parallel.grad_reduce == "bf16":
        yield Problem("parallel.grad_reduce", f"bf16 with precision {gang.precision}", "fp32, or precision bf16")
    if gang.precision != "bf16" and gang.fusion.cross_entropy == "native":
        yield Problem(
            "fusion.cross_entropy", f"native with precision {gang.precision}", "none or te, or precision bf16", "its gradient is in bf16"
        )


def _check_offload(gang: GangConfig) -> Iterator[Problem]:
    fraction, layers = gang.offload.optimizer_fraction, gang.offload.activation_layers
    if fraction and not gang.parallel.distributed_optimizer:
        yield Problem("offload.optimizer_fraction", str(fraction), "parallel.distributed_optimizer true too")
    if fraction and gang.fp8 is not None and gang.fp8.param and gang.fp8.recipe != "delayed":
        yield Problem(
            "offload.optimizer_fraction",
            f"{fraction} with fp8.param and recipe {gang.fp8.recipe}",
            "recipe delayed, or fp8.param false",
            "Megatron-Core offloads FP8 weights under delayed scaling only",
        )
    if layers > 0 and gang.parallel.pp > 1:
        yield Problem("offload.activation_layers", f"{layers} with parallel.pp {gang.parallel.pp}", "parallel.pp 1")
    if layers > 0 and gang.recompute.granularity != "none":
        found, fix = f"{layers} with recompute.granularity {gang.recompute.granularity}", "activations are kept elsewhere, or made again"
        yield Problem("offload.activation_layers", found, "one of them", fix)


def _check_names(gang: GangConfig) -> Iterator[Problem]:
    for name, value in gang.environment.items():
        if not VARIABLE.fullmatch(name):
            yield Problem(
                f"environment.{name}",
                "a name of another kind",
                "NCCL_*, NVTE_*, CUDA_*, TORCH_*, PYTORCH_*, CUBLAS_*, GLOO_*, OMP_*, UCX_* or TRITON_*",
                "export it where the job is started",
            )
        if name == "PYTORCH_CUDA_ALLOC_CONF":
            yield Problem(f"environment.{name}", "torch's older name", "PYTORCH_ALLOC_CONF", "the same values, for all devices")
        if not value.isprintable():
            yield Problem(f"environment.{name}", repr(value), "printable characters")


def _check_attention(gang: GangConfig, values: Mapping[str, str]) -> Iterator[Problem]:
    for name, accepted in ATTENTION[gang.attention_backend].items():
        if values.get(name, accepted) != accepted:
            required = f"{accepted}, or no value, with attention_backend {gang.attention_backend}"
            yield Problem(f"environment.{name}", values[name], required, "set attention_backend instead")


def _check_register(gang: GangConfig, values: Mapping[str, str]) -> Iterator[Problem]:
    name = "NCCL_GRAPH_REGISTER"
    if gang.cuda_graphs and values.get(name, "0") != "0":
        fix = "expandable segments may move what NCCL has registered"
        yield Problem(f"environment.{name}", values[name], "0, or no value, with cuda_graphs", fix)


def check_variables(gang: GangConfig, values: Mapping[str, str]) -> list[Problem]:
    """Return a problem for each variable in `values` that would undo `deterministic`, or that Megatron-Core does not accept."""
    return [*_check_attention(gang, values), *_check_register(gang, values)] + [
        Problem(f"environment.{name}", f"{values[name]} with deterministic", f"{' or '.join(accepted)}, or no value")
        for name, accepted in DETERMINISTIC.items()
        if gang.deterministic and name in values and not set(values[name].split(",")) <= set(accepted)
    ]


def check_sizes(model: ModelConfig, gang: GangConfig) -> list[Problem]:
    """Return why an architecture cannot use FP8, or the configured offloading."""
    return [*_check_fp8_layers(model, gang), *_check_fp8_sizes(model, gang), *_check_offloaded_layers(model, gang)]


def _check_fp8_layers(model: ModelConfig, gang: GangConfig) -> Iterator[Problem]:
    if gang.fp8 is None:
        return
    start, end = gang.fp8.num_layers_at_start_in_bf16, gang.fp8.num_layers_at_end_in_bf16
    of_a_stage = model.num_layers // max(gang.parallel.pp, 1)  # Megatron-Core's rule, which ignores chunks (vpp)
    for name, count in {"start": start, "end": end}.items():
        if count > of_a_stage:
            yield Problem(f"fp8.num_layers_at_{name}_in_bf16", str(count), f"at most {of_a_stage}, the layers of a pipeline stage")
    if start + end >= model.num_layers:
        yield Problem(
            "fp8", f"{start} + {end} layers in bf16", f"fewer than num_layers {model.num_layers}", "remove fp8, or leave it a layer"
        )


def _check_fp8_sizes(model: ModelConfig, gang: GangConfig) -> Iterator[Problem]:
    """Check that all dimensions of a rank's matrix products are multiples of 16 (of 128 where blockwise gathers blocks under sequence_parallel).

    Source: TE's documentation of autocast; assert_dim_for_fp8_exec and assert_dim_for_all_gather (transformer_engine/pytorch/utils.py);
    the checks on NVTE_BLOCK_SCALING_1D and 2D in transformer_engine/common/gemm/cublaslt_gemm.cu; megatron/core/ssm/mamba_mixer.py.
    """
    if gang.fp8 is None or gang.parallel.tp < 1:
        return
    sizes: list[tuple[str, float, int]] = [("model.hidden_size", model.hidden_size, _gathered(gang))]
    sizes += [(f"model.{name}", rows / gang.parallel.tp, 16) for name, rows in split_rows(model).items()]
    yield from _not_multiples(sizes, gang.fp8)


def check_tokens(gang: GangConfig, tokens: int, where: str) -> list[Problem]:
    """Return why FP8 cannot multiply a microbatch of `tokens` tokens. `where` names them in the message. Source: as for _check_fp8_sizes."""
    grid = gang.parallel
    if gang.fp8 is None or min(grid.tp, grid.cp) < 1:
        return []
    return [*_not_multiples([(where, tokens / grid.cp / (grid.tp if grid.sequence_parallel else 1), _gathered(gang))], gang.fp8)]


def _gathered(gang: GangConfig) -> int:
    """Return the number that must divide a dimension gathered by sequence parallelism."""
    return 128 if gang.fp8 is not None and gang.fp8.recipe == "blockwise" and gang.parallel.sequence_parallel else 16


def _not_multiples(sizes: Sequence[tuple[str, float, int]], fp8: FP8Config) -> Iterator[Problem]:
    for where, size, multiple in sizes:
        if size % multiple:
            yield Problem(where, f"{size:g} on a rank", f"a multiple of {multiple} under fp8.recipe {fp8.recipe}")


def split_rows(model: ModelConfig) -> dict[str, int]:
    """Return the rows (or columns) of each kind of linear layer that tensor parallelism splits."""
    pattern, head = model.layer_pattern or "*-", model.kv_channels
    rows = {}
    if "*" in pattern:
        rows["num_attention_heads x kv_channels"] = model.num_attention_heads * head
        rows["(num_attention_heads + 2 x num_query_groups) x kv_channels"] = (model.num_attention_heads + 2 * model.num_query_groups) * head
    if "-" in pattern:
        rows["ffn_hidden_size"] = model.ffn_hidden_size
    if model.mamba is not None:
        inner = model.mamba.num_heads * model.mamba.head_dim
        rows["mamba (out_proj)"] = inner
        rows["mamba (in_proj)"] = 2 * inner + 2 * model.mamba.num_groups * model.mamba.state_dim + model.mamba.num_heads
    return rows


def _check_offloaded_layers(model: ModelConfig, gang: GangConfig) -> Iterator[Problem]:
    layers = gang.offload.activation_layers
    if layers and model.layer_pattern is not None:
        yield Problem(
            "offload.activation_layers", str(layers), "0 for a hybrid", "Megatron-Core does not offload a hybrid's layers, and says nothing"
        )
    if layers >= model.num_layers:
        yield Problem("offload.activation_layers", str(layers), f"below num_layers {model.num_layers}")


def check_machine(gang: GangConfig, machine: Machine) -> list[Problem]:
    """Return what a rank's machine lacks for the run. Without CUDA or TE, Megatron-Core would silently ignore fp8."""
    asked = {
        "fp8": gang.fp8 is not None,
        "offload.optimizer_fraction": gang.offload.optimizer_fraction > 0,
        "offload.activation_layers": gang.offload.activation_layers > 0,
        "cuda_graphs": gang.cuda_graphs,
        "fusion.cross_entropy": gang.fusion.cross_entropy == "te",
        "fusion.gradient_accumulation": gang.fusion.gradient_accumulation is True,
    }
    if not machine.has_cuda:
        return [
            Problem(key, "a machine without a CUDA device", "an NVIDIA GPU", "remove it to run here")
            for key, is_asked in asked.items()
            if is_asked
        ]
    if machine.transformer_engine is None:
        fix = "pip install --no-build-isolation -e '.[gpu]'; the attention that Megatron-Core has without it holds all scores of a sequence"
        return [Problem("a CUDA device", "no Transformer Engine", "transformer-engine", fix)]
    return [] if gang.fp8 is None else list(_check_fp8_machine(gang.fp8.recipe, machine))


def _check_fp8_machine(recipe: str, machine: Machine) -> Iterator[Problem]:
    wanted = [
        ("compute capability", machine.capability, LEAST_CAPABILITY[recipe]),
        ("Transformer Engine", machine.transformer_engine, LEAST_TE[recipe]),
    ]
    if recipe == "blockwise":
        wanted.append(("CUDA (torch's)", machine.cuda, BLOCKWISE_CUDA))
    for name, actual, least in wanted:
        if actual is None or actual < least:
            there = "none" if actual is None else ".".join(map(str, actual))
            yield Problem("fp8.recipe", f"{recipe} with {name} {there}", f"{name} {'.'.join(map(str, least))} or newer")
