"""The layers of all families, as rules: attention, MLP and Mamba-2 of one Megatron-Core layer, and both ends of a model.

Keys are those of a torch_dist checkpoint, the same under the local and the Transformer Engine spec: a norm before a linear layer is
that layer's `layer_norm_weight`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_prism.core.config import ModelConfig
from megatron_prism.families.rules import Rule, Shape, slices

Named = tuple[str, Shape]


def attention(layer: int, norm: str, hf: str, model: ModelConfig) -> list[Rule]:
    """Return the rules of layer `layer`'s attention; `hf` is the prefix of q_proj, k_proj, v_proj and o_proj."""
    hidden, mcore = model.hidden_size, f"decoder.layers.{layer}.self_attention"
    queries, keys = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    rows = {"q": queries, "k": keys, "v": keys}

    def qkv(kind: str, *columns: int) -> Rule:
        parts = tuple((f"{hf}.{name}_proj.{kind}", (count, *columns)) for name, count in rows.items())
        return Rule(f"{mcore}.linear_qkv.{kind}", "qkv", parts, num_groups=model.num_query_groups)

    return [
        Rule(f"{mcore}.linear_qkv.layer_norm_weight", "copy", ((norm, (hidden,)),)),
        qkv("weight", hidden),
        *([qkv("bias")] if model.qkv_bias else []),
        Rule(f"{mcore}.linear_proj.weight", "copy", ((f"{hf}.o_proj.weight", (hidden, queries)),)),
    ]


def mlp(layer: int, norm: str, up: Sequence[str], down: str, model: ModelConfig) -> list[Rule]:
    """Return the rules of layer `layer`'s MLP. `up` names gate and up, or the single tensor that is Megatron's whole linear_fc1."""
    hidden, ffn, mcore = model.hidden_size, model.ffn_hidden_size, f"decoder.layers.{layer}.mlp"
    rows = ffn * (2 if model.activation == "swiglu" else 1) // len(up)
    return [
        Rule(f"{mcore}.linear_fc1.layer_norm_weight", "copy", ((norm, (hidden,)),)),
        Rule(f"{mcore}.linear_fc1.weight", "rows" if len(up) > 1 else "copy", tuple((name, (rows, hidden)) for name in up)),
        Rule(f"{mcore}.linear_fc2.weight", "copy", ((down, (hidden, ffn)),)),
    ]


def mamba(layer: int, norm: str, hf: str, model: ModelConfig) -> list[Rule]:
    """Return the rules of layer `layer`'s Mamba-2 mixer. `hf` is the prefix of in_proj, conv1d and the rest.

    Megatron-Core stores in_proj and conv1d in pieces, since tensor parallelism splits each piece by itself
    (megatron/core/ssm/mamba_mixer.py, sharded_state_dict).
    """
    assert model.mamba is not None
    sizes, hidden, mcore = model.mamba, model.hidden_size, f"decoder.layers.{layer}.mixer"
    inner, states = sizes.num_heads * sizes.head_dim, sizes.num_groups * sizes.state_dim
    pieces = {"x": inner, "B": states, "C": states}
    projected: Mapping[str, int] = {"z": inner, **pieces, "dt": sizes.num_heads}
    conv = sum(pieces.values())
    shapes: dict[str, Shape] = {name: (sizes.num_heads,) for name in ("dt_bias", "A_log", "D")}
    shapes |= {"norm.weight": (inner,), "out_proj.weight": (hidden, inner)}
    return [
        Rule(f"{mcore}.in_proj.layer_norm_weight", "copy", ((norm, (hidden,)),)),
        *slices(f"{mcore}.in_proj.weight", f"{hf}.in_proj.weight", (sum(projected.values()), hidden), projected),
        *slices(f"{mcore}.conv1d.weight", f"{hf}.conv1d.weight", (conv, 1, sizes.conv_kernel), pieces),
        *slices(f"{mcore}.conv1d.bias", f"{hf}.conv1d.bias", (conv,), pieces),
        *(Rule(f"{mcore}.{name}", "copy", ((f"{hf}.{name}", shape),)) for name, shape in shapes.items()),
    ]


def ends(embedding: str, norm: str, head: str, layers: Sequence[Rule], model: ModelConfig) -> list[Rule]:
    """Return a whole model's rules: the embedding, `layers`, the final norm and, if it is not tied, the output layer."""
    table, final = (model.vocab_size, model.hidden_size), "final_layernorm" if model.layer_pattern is None else "final_norm"
    all_but_head = [
        Rule("embedding.word_embeddings.weight", "copy", ((embedding, table),)),
        *layers,
        Rule(f"decoder.{final}.weight", "copy", ((norm, (model.hidden_size,)),)),
    ]
    return all_but_head if model.tie_word_embeddings else [*all_but_head, Rule("output_layer.weight", "copy", ((head, table),))]
