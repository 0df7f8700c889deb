"""How the next token is chosen: shares, nuclei, log-probabilities, and numbers that depend on nothing but their place."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prism.generate.draw import BLOCK, choose, uniforms
from megatron_prism.generate.engine import Sampling

LOGITS = torch.tensor([1.0, 3.0, 2.0, -5.0])  # probabilities 0.090, 0.665, 0.245, 0.0002


def drawn(logits_V: torch.Tensor, count: int = 4000, stream: int = 1, **how: Any) -> dict[int, float]:
    """Return the share of each token among many draws."""
    uniform_RS = torch.from_numpy(uniforms([stream] * count, range(count)))[None]
    token_RS, _ = choose(logits_V[None], uniform_RS, Sampling(max_tokens=1, **how))
    return {token: times / count for token, times in Counter(token_RS[0].tolist()).items()}


def test_numbers_are_those_of_splitmix64() -> None:
    """Its published first outputs from the state 1234567."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    found = uniforms([1234567] * 5, range(5))
    assert found.tolist() == [(number >> 11) * 2.0**-53 for number in published]
    assert uniforms([2**64 - 1], [10**9]).shape == (1,) and not np.array_equal(uniforms([1], [0]), uniforms([2], [0]))


def test_greedy_takes_the_likeliest() -> None:
    assert drawn(LOGITS, 3, temperature=0.0) == {1: 1.0}


@pytest.mark.parametrize(("top_p", "tokens"), [(0.0, {1}), (0.5, {1}), (0.7, {1, 2}), (0.95, {0, 1, 2})])
def test_top_p_keeps_the_smallest_set_of_that_probability(top_p: float, tokens: set[int]) -> None:
    assert set(drawn(LOGITS, 2000, temperature=1.0, top_p=top_p)) == tokens


@pytest.mark.parametrize(("top_k", "top_p", "tokens"), [(1, 1.0, {1}), (2, 1.0, {1, 2}), (2, 0.7, {1}), (9, 0.7, {1, 2})])
def test_top_k_comes_before_top_p(top_k: int, top_p: float, tokens: set[int]) -> None:
    """Of the two likeliest, the first has 0.731."""
    assert set(drawn(LOGITS, 2000, temperature=1.0, top_k=top_k, top_p=top_p)) == tokens


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_shapes_the_shares(temperature: float) -> None:
    wanted = torch.softmax(LOGITS / temperature, 0)
    shares = drawn(LOGITS, temperature=temperature)
    assert all(abs(shares.get(token, 0) - float(wanted[token])) < 0.03 for token in range(4))


@pytest.mark.parametrize("size_V", [1000, 4 * BLOCK])
@pytest.mark.parametrize("top_p", [0.3, 0.999])
def test_a_nucleus_is_the_one_that_sorting_finds(size_V: int, top_p: float) -> None:
    """Within the tokens that are looked at first, and beyond them."""
    logits_V = torch.randn(size_V, generator=torch.Generator().manual_seed(0))
    probability_V, token_V = logits_V.double().softmax(0).sort(descending=True)
    kept = set(token_V[: int(((probability_V.cumsum(0) - probability_V) < top_p).sum())].tolist())
    assert set(drawn(logits_V, 50_000, temperature=1.0, top_p=top_p)) <= kept
    assert len(kept) > 256 or size_V < 1000 or top_p < 0.9


def test_logprobs_are_those_of_the_tempered_logits_over_the_whole_vocabulary() -> None:
    logits_RV = torch.randn(2, 100, generator=torch.Generator().manual_seed(1))
    uniform_RS = torch.tensor([[0.1, 0.9, 0.5], [0.2, 0.3, 0.7]], dtype=torch.float64)
    for temperature, top_p, at in ((0.0, 1.0, 1.0), (0.5, 1.0, 0.5), (2.0, 0.4, 2.0)):
        token_RS, logprob_RS = choose(logits_RV, uniform_RS, Sampling(max_tokens=1, temperature=temperature, top_p=top_p))
        wanted = (logits_RV / at).log_softmax(-1).gather(1, token_RS)
        assert torch.allclose(logprob_RS, wanted, rtol=0, atol=2e-6)


def test_a_large_vocabulary_is_three_levels_of_blocks() -> None:
    logits_V = torch.randn(BLOCK**2 + 100, generator=torch.Generator().manual_seed(2)) * 3
    ends_V = logits_V.double().softmax(0).cumsum(0)
    uniform_RS = torch.from_numpy(uniforms([3] * 500, range(500)))[None]
    token_RS, _ = choose(logits_V[None], uniform_RS, Sampling(max_tokens=1, temperature=1.0))
    wanted_S = torch.searchsorted(ends_V, uniform_RS[0], right=True)
    assert (token_RS[0] == wanted_S).double().mean() > 0.99 and (token_RS[0] > BLOCK**2).any()


@settings(deadline=None)
@given(data=st.data())
def test_a_draw_inverts_the_distribution(data: st.DataObject) -> None:
    """Against a running sum over the whole vocabulary in fp64; never a token of probability 0, at both ends neither."""
    size_V = data.draw(st.integers(1, 200))
    logits_V = torch.tensor(data.draw(st.lists(st.floats(-6, 6, width=32), min_size=size_V, max_size=size_V)))
    hidden_V = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size_V, max_size=size_V)))
    hidden_V[data.draw(st.integers(0, size_V - 1))] = False
    logits_V = logits_V.masked_fill(hidden_V, -torch.inf)
    uniform = data.draw(st.sampled_from([0.0, 1 - 2.0**-53]) | st.floats(0, 1, exclude_max=True))
    token_RS, _ = choose(logits_V[None], torch.tensor([[uniform]], dtype=torch.float64), Sampling(max_tokens=1, temperature=1.0))
    token, ends_V = int(token_RS), logits_V.double().softmax(0).cumsum(0)
    assert not hidden_V[token]
    start = float(ends_V[token - 1]) if token else 0.0
    assert start - 1e-6 <= uniform <= float(ends_V[token]) + 1e-6


@pytest.mark.parametrize(
    "how", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 2.0, "top_k": 2}]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_has_no_log_probability(value: float, how: dict[str, Any]) -> None:
    logits_RV = torch.stack([LOGITS, LOGITS])
    logits_RV[1, 2] = value
    token_RS, logprob_RS = choose(logits_RV, torch.full((2, 3), 0.99), Sampling(max_tokens=1, **how))
    assert logprob_RS[0].isfinite().all() and logprob_RS[1].isnan().all()
    assert int(token_RS.min()) >= 0 and int(token_RS.max()) < len(LOGITS)


def test_a_row_of_nan_is_said_so_in_a_vocabulary_of_several_blocks() -> None:
    logits_RV = torch.zeros(2, 300)
    logits_RV[1] = torch.nan
    token_RS, logprob_RS = choose(logits_RV, torch.full((2, 1), 0.5, dtype=torch.float64), Sampling(max_tokens=1, temperature=1.0))
    assert logprob_RS[1].isnan().all() and logprob_RS[0].isfinite().all() and token_RS.max() < 300
