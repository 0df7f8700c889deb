"""How an architecture becomes a Megatron model, and how the next token is chosen."""

from __future__ import annotations

import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_prism.core.config import ModelConfig
from megatron_prism.core.errors import InputError
from megatron_prism.models import multipliers
from megatron_prism.models.build import uneven_ends, uneven_layout
from megatron_prism.models.generate import Sampling, choose


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
    assert uneven_layout(6, 2) is None and uneven_layout(1, 1) is None
    assert uneven_layout(5, 2) == [["embedding", "decoder", "decoder", "decoder"], ["decoder", "decoder", "loss"]]
    assert uneven_layout(5, 4) == [["embedding", "decoder", "decoder"], ["decoder"], ["decoder"], ["decoder", "loss"]]


@given(num_stages=st.integers(2, 12), data=st.data())
def test_layout_holds_every_layer_once_and_stages_differ_by_one(num_stages: int, data: st.DataObject) -> None:
    num_layers = data.draw(st.integers(num_stages, 60))
    layout = uneven_layout(num_layers, num_stages)
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


LOGITS = torch.tensor([1.0, 3.0, 2.0, -5.0])


def drawn(sampling: Sampling, count: int = 400) -> dict[int, float]:
    """Return the share of each token among many choices."""
    generator = torch.Generator().manual_seed(sampling.seed)
    tokens = [int(choose(LOGITS, sampling, generator)) for _ in range(count)]
    return {token: tokens.count(token) / count for token in set(tokens)}


def test_greedy_takes_the_likeliest() -> None:
    assert drawn(Sampling(), 3) == {1: 1.0}


@pytest.mark.parametrize(("top_p", "tokens"), [(0.0, {1}), (0.5, {1}), (0.7, {1, 2}), (0.95, {0, 1, 2})])
def test_top_p_keeps_the_smallest_set_of_that_probability(top_p: float, tokens: set[int]) -> None:
    """The probabilities are 0.665, 0.245, 0.090, 0.0002."""
    assert set(drawn(Sampling(1.0, top_p))) == tokens


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_shapes_the_shares(temperature: float) -> None:
    wanted = torch.softmax(LOGITS / temperature, 0)
    found = drawn(Sampling(temperature), 2000)
    assert all(abs(found.get(token, 0) - float(wanted[token])) < 0.05 for token in range(4))


def test_a_seed_decides_the_choice() -> None:
    assert drawn(Sampling(1.0, seed=1)) == drawn(Sampling(1.0, seed=1)) != drawn(Sampling(1.0, seed=2))
