"""A family's rules on tensors in memory: there and back without a changed byte, and just what conversion writes to disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_prism.checkpoint import torch_dist
from megatron_prism.core.config import ModelConfig
from megatron_prism.families import blocks, registry
from megatron_prism.families.rules import Rule, slices
from megatron_prism.hf.tensors import open_tensors
from megatron_prism.jobs import convert


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    groups, queries, head = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.sampled_from([2, 6]))
    sizes = {name: draw(st.integers(1, 9)) for name in ("hidden_size", "ffn_hidden_size", "vocab_size", "num_layers")}
    return ModelConfig(
        family="llama",
        num_attention_heads=groups * queries,
        num_query_groups=groups,
        kv_channels=head,
        max_position_embeddings=8,
        tie_word_embeddings=draw(st.booleans()),
        **sizes,
    )


@settings(deadline=None, max_examples=60)
@given(model=models())
def test_blocks_hold_every_row_of_a_rules_parts_once(model: ModelConfig) -> None:
    for rule in registry.rules(model):
        rows_of_parts = sorted((part, row) for part, start, rows in blocks.blocks(rule) for row in range(start, start + rows))
        assert rows_of_parts == [(part, row) for part, (_, shape) in enumerate(rule.hf) for row in range(shape[0])]
        assert len(rows_of_parts) == rule.shape[0]


@given(model=models())
def test_rows_of_a_group_lie_together(model: ModelConfig) -> None:
    """Group g holds its queries, then its key, then its value."""
    rule = next(rule for rule in registry.rules(model) if rule.op == "qkv")
    head, each = model.kv_channels, model.num_attention_heads // model.num_query_groups
    wanted = [
        block
        for group in range(model.num_query_groups)
        for block in ((0, group * each * head, each * head), (1, group * head, head), (2, group * head, head))
    ]
    assert blocks.blocks(rule) == wanted


def test_a_slices_block_is_its_rows() -> None:
    rules = slices("mixer", "conv1d", (9, 4), {"x": 5, "B": 2, "C": 2})
    assert [blocks.blocks(rule) for rule in rules] == [[(0, 0, 5)], [(0, 5, 2)], [(0, 7, 2)]]


def tiny(preset: ModelConfig) -> ModelConfig:
    """Return a preset's architecture with small sizes: 4 heads of 8 in 2 groups, and of a hybrid its first layers of each kind."""
    small = replace(
        preset, num_layers=2, hidden_size=32, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=2, kv_channels=8, vocab_size=50
    )
    if preset.layer_pattern is None or preset.mamba is None:
        return small
    pattern = "M-*-" if "-*" in preset.layer_pattern else "M-M*"
    mamba = replace(preset.mamba, num_heads=8, head_dim=8, state_dim=4, num_groups=2)
    return replace(small, num_layers=4, layer_pattern=pattern, mamba=mamba)


def random_parts(rules: list[Rule]) -> dict[str, torch.Tensor]:
    """Return random bf16 values for every Hugging Face tensor."""
    torch.manual_seed(0)
    shapes = {name: shape for rule in rules for name, shape in rule.hf}
    return {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def as_bytes(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()


def differing(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> set[str]:
    assert some.keys() == others.keys()
    return {name for name in some if as_bytes(some[name]) != as_bytes(others[name])}


def test_there_and_back_no_byte_changes(presets: dict[str, ModelConfig], preset_name: str) -> None:
    """With the control that sees an order changed: two query groups taken for one, the rows of gate and up swapped."""
    model = tiny(presets[preset_name])
    rules = registry.rules(model)
    parts = random_parts(rules)
    mcore = {rule.mcore: blocks.to_mcore(rule, parts) for rule in rules}
    assert {name: tensor.shape for name, tensor in mcore.items()} == {rule.mcore: rule.shape for rule in rules}
    assert not differing(dict(blocks.hf_tensors(rules, lambda rule: mcore[rule.mcore])), parts)
    wrong = [replace(rule, num_groups=1, hf=rule.hf[::-1] if rule.op == "rows" else rule.hf) for rule in rules]
    seen = differing(dict(blocks.hf_tensors(wrong, lambda rule: mcore[rule.mcore])), parts)
    mixed = {name for rule in rules if rule.op in ("qkv", "rows") for name, _ in rule.hf}
    assert seen == mixed and any("q_proj" in name for name in seen)


def test_in_memory_is_what_conversion_writes(presets: dict[str, ModelConfig], preset_name: str, tmp_path: Path) -> None:
    """The folder's tensors through to_mcore are the checkpoint's, and the checkpoint's through hf_tensors are the folder's."""
    model = tiny(presets[preset_name])
    rules = registry.rules(model)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(registry.of_model(model).write_config(model)))
    save_file(random_parts(rules), tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    convert.run_import(tmp_path / "hf", tmp_path / "ckpt", dry_run=False)
    reader = torch_dist.TensorReader(tmp_path / "ckpt" / "state")
    with open_tensors(tmp_path / "hf") as weights:
        stored = {rule.mcore: reader.read(rule.mcore, rule.shape) for rule in rules}
        assert not differing({rule.mcore: blocks.to_mcore(rule, weights) for rule in rules}, stored)
        assert not differing(dict(blocks.hf_tensors(rules, lambda rule: stored[rule.mcore])), dict(weights))


@pytest.mark.parametrize("shape", [(50, 33), (64, 32), (50,)])
def test_a_tensor_of_another_shape_is_no_rules(presets: dict[str, ModelConfig], shape: tuple[int, ...]) -> None:
    """A padded vocabulary too: its rows must be cut off first."""
    rule = registry.rules(tiny(presets["llama-3.1-8b"]))[0]
    with pytest.raises(AssertionError, match=r"embedding\.word_embeddings\.weight"):
        blocks.to_hf(rule, torch.zeros(shape))
    with pytest.raises(AssertionError, match=r"model\.embed_tokens\.weight"):
        blocks.to_mcore(rule, {"model.embed_tokens.weight": torch.zeros(shape)})
