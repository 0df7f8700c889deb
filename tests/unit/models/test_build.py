"""How an architecture becomes a Megatron model."""

from __future__ import annotations

import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_prism.core.config import ModelConfig
from megatron_prism.core.errors import InputError
from megatron_prism.models import multipliers
from megatron_prism.models.build import uneven_ends, uneven_stages


@pytest.mark.parametrize(("settings", "is_refused"), [({}, False), (("te",), False), (("linear",), True)])
def test_a_fused_loss_that_skips_the_output_layer_is_refused_with_granite(settings: tuple[str, ...], is_refused: bool) -> None:
    """The linear one reads the output layer's weight, and would pass the division of the logits by."""
    model = ModelConfig(
        family="granite",
        num_layers=1,
        hidden_size=2,
        ffn_hidden_size=2,
        num_attention_heads=1,
        num_query_groups=1,
        kv_channels=2,
        vocab_size=2,
        max_position_embeddings=8,
        logits_scaling=8.0,
    )
    chunk = torch.nn.Module()
    chunk.output_layer = OutputLayer(2, 2, bias=False)
    chunk.config = types.SimpleNamespace(cross_entropy_loss_fusion=bool(settings), cross_entropy_fusion_impl="".join(settings) or "native")
    if is_refused:
        with pytest.raises(InputError, match=r"cross_entropy_fusion_impl: found linear; required the logits divided by logits_scaling 8"):
            multipliers.scale_ends(chunk, model, False, True)
        return
    multipliers.scale_ends(chunk, model, False, True)
    hidden = torch.ones(2)
    assert torch.equal(chunk.output_layer(hidden)[0], chunk.output_layer.weight @ hidden / 8)


class OutputLayer(torch.nn.Linear):
    """Returns its bias beside its output, as Megatron-Core's linear layers do."""

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, None]:
        return super().forward(input), None


def test_layout_of_five_layers_on_two_and_four_stages() -> None:
    assert uneven_stages(6, 2) is None and uneven_stages(1, 1) is None
    assert uneven_stages(5, 2) == [["embedding", "decoder", "decoder", "decoder"], ["decoder", "decoder", "loss"]]
    assert uneven_stages(5, 4) == [["embedding", "decoder", "decoder"], ["decoder"], ["decoder"], ["decoder", "loss"]]


@given(num_stages=st.integers(2, 12), data=st.data())
def test_layout_holds_every_layer_once_and_stages_differ_by_one(num_stages: int, data: st.DataObject) -> None:
    num_layers = data.draw(st.integers(num_stages, 60))
    layout = uneven_stages(num_layers, num_stages)
    assert (layout is None) == (num_layers % num_stages == 0)
    if layout is not None:
        counts = [stage.count("decoder") for stage in layout]
        assert len(layout) == num_stages and sum(counts) == num_layers
        assert max(counts) - min(counts) == 1 and counts == sorted(counts, reverse=True)
        assert layout[0][0] == "embedding" and layout[-1][-1] == "loss" and sum(map(len, layout)) == num_layers + 2


@given(num_stages=st.integers(1, 12), data=st.data())
def test_a_hybrids_uneven_ends(num_stages: int, data: st.DataObject) -> None:
    """Every stage holds a layer, and only the two ends differ from the rest: what MambaStack and TransformerLayer cut by."""
    num_layers = data.draw(st.integers(num_stages, 60))
    first, last = uneven_ends(num_layers, num_stages)
    if num_layers % num_stages == 0:
        assert (first, last) == (None, None)
    elif num_stages > 1:
        assert first is not None and last is not None and first >= last >= 1
        middle = num_layers - first - last
        assert (middle == 0) if num_stages == 2 else (middle % (num_stages - 2) == 0 and middle // (num_stages - 2) >= 1)


def test_nemotron_h_on_eight_stages() -> None:
    assert uneven_ends(52, 8) == (5, 5)  # and seven each between
    assert uneven_ends(5, 4) == (2, 1) and uneven_ends(9, 2) == (5, 4)
