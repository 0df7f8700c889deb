"""Checks of an architecture, and of its split over ranks: pure functions that return every problem."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_prism.core.check.bounds import check_bounds
from megatron_prism.core.config import ModelConfig
from megatron_prism.core.errors import Problem

VOCAB_MULTIPLE = 128  # rows of a vocabulary shard, as in Megatron-LM


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Return the vocabulary size rounded up to a multiple of 128 per tensor-parallel rank."""
    multiple = VOCAB_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


def check_architecture(model: ModelConfig, prefix: str = "model.") -> list[Problem]:
    """Return the problems within an architecture. `prefix` is put before each key."""
    problems = [*check_bounds(model, prefix)]
    if not problems and model.num_attention_heads % model.num_query_groups:
        required = f"a divisor of num_attention_heads {model.num_attention_heads}"
        problems.append(Problem(f"{prefix}num_query_groups", str(model.num_query_groups), required))
    problems += _check_hybrid(model, prefix)
    scaling = model.rope_scaling
    if scaling and (scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings) != (1.0, 4.0, 8192):
        problems.append(Problem(f"{prefix}rope_scaling", str(scaling), "low 1, high 4, original 8192: Megatron-Core fixes these three"))
    return [*problems, *_check_yarn(model, prefix)]


def _check_yarn(model: ModelConfig, prefix: str) -> Iterator[Problem]:
    yarn = model.yarn
    if yarn is None:
        return
    if model.position_embedding != "rope":
        yield Problem(f"{prefix}yarn", str(yarn), "null: the model has no rotary positions")
    if model.rope_scaling is not None:
        yield Problem(f"{prefix}yarn", "a value beside rope_scaling", "one of them: both scale the same frequencies")
    if yarn.beta_fast < yarn.beta_slow:
        yield Problem(f"{prefix}yarn.beta_fast", str(yarn.beta_fast), f"at least beta_slow {yarn.beta_slow}")
    if (yarn.mscale is None) != (yarn.mscale_all_dim is None):
        yield Problem(f"{prefix}yarn.mscale, mscale_all_dim", f"{yarn.mscale}, {yarn.mscale_all_dim}", "both or neither")
    if model.rotary_base <= 1:
        yield Problem(f"{prefix}rotary_base", str(model.rotary_base), "more than 1 under yarn")


def _check_hybrid(model: ModelConfig, prefix: str) -> Iterator[Problem]:
    if (model.layer_pattern is None) != (model.mamba is None):
        found = "a layer_pattern without mamba" if model.mamba is None else "mamba without a layer_pattern"
        yield Problem(f"{prefix}mamba", found, "both, for a hybrid, or neither")
    if model.layer_pattern is not None:
        if set(model.layer_pattern) - set("M*-") or len(model.layer_pattern) != model.num_layers:
            required = f"num_layers {model.num_layers} letters M (Mamba), * (attention) or - (MLP)"
            yield Problem(f"{prefix}layer_pattern", repr(model.layer_pattern), required)
        if model.norm_epsilon != 1e-5:
            yield Problem(f"{prefix}norm_epsilon", str(model.norm_epsilon), "1e-5 for a hybrid: Megatron-Core fixes it in its Mamba mixer")
        if model.rope_scaling is not None or model.window_size is not None:  # yarn's frequencies are ours: a hybrid may have them
            yield Problem(f"{prefix}rope_scaling, window_size", f"{model.rope_scaling}, {model.window_size}", "null for a hybrid")
    if model.mamba is not None and model.mamba.num_groups >= 1 and model.mamba.num_heads % model.mamba.num_groups:
        yield Problem(f"{prefix}mamba.num_groups", str(model.mamba.num_groups), f"a divisor of mamba.num_heads {model.mamba.num_heads}")


def check_split(model: ModelConfig, tp: int, num_stages: int, tp_key: str, pp_key: str) -> list[Problem]:
    """Return why an architecture cannot be split over `tp` ranks and `num_stages` pipeline stages."""
    sizes = {name: getattr(model, name) for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size")}
    if model.mamba is not None:
        sizes |= {"mamba.num_heads": model.mamba.num_heads, "mamba.num_groups": model.mamba.num_groups}
    problems = []
    for name, value in sizes.items():
        if tp >= 1 and value % tp:
            alone = "all its Mamba heads share one group, which cannot be split: use pipeline or data parallelism instead"
            fix = alone if name == "mamba.num_groups" and value == 1 else ""
            problems.append(Problem(f"{tp_key} ({name} {value})", str(tp), f"a divisor of {name} {value}", fix))
    if model.num_layers < num_stages:
        problems.append(Problem(pp_key, f"{num_stages} stages", f"at most num_layers {model.num_layers}"))
    return problems
