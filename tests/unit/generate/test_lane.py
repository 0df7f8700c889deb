"""Rows that come, move and go: a toy model whose next token depends on all that a row's cache holds."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prism.core.errors import CheckpointError
from megatron_prism.generate import blocks
from megatron_prism.generate.cache import Cache
from megatron_prism.generate.engine import Rollout, Sampling, seed_of
from megatron_prism.generate.lane import Lane, Request

VOCAB_SIZE, END = 50, 7


class Memory:
    """A block that keeps each row's tokens, and a sum of them that no position is needed for."""

    def states(self, size_K: int) -> tuple[blocks.State, ...]:
        return blocks.State((1, size_K, 1), torch.float64, has_tokens=True), blocks.State((1,), torch.float64)


class Toy:
    """Stands for stage.Stage on one rank. The next token is a hash of the row's tokens, of their sum, and of the number drawn."""

    positions = blocks.Positions(None, None, torch.float32, torch.float32)

    def __init__(self) -> None:
        self.blocks = [Memory()]
        self.tokens_at_once: list[int] = []
        self.rows_at_once: list[int] = []

    def forward(self, token_T: torch.Tensor, call: blocks.Call, cache: Cache, sent: list[Any]) -> torch.Tensor:
        tokens, sums = (state[: call.num_rows] for state in cache.states[0])
        feed_RL = token_T.view(call.num_rows, call.size_L).double()
        if call.start is None:
            tokens[call.row_R, 0, call.position_R, 0] = feed_RL[:, 0]
            self.rows_at_once.append(call.num_rows)
        else:
            is_token_RL = torch.arange(call.size_L) < call.length_R[:, None]
            tokens[:, 0, call.start : call.size_K, 0] = feed_RL = feed_RL * is_token_RL
            self.tokens_at_once.append(len(token_T))
        sums += feed_RL.sum(1, keepdim=True)
        lengths_R = call.position_R + 1 if call.start is None else call.start + call.length_R
        states = [hashed(tokens[row, 0, : int(length), 0].tolist(), float(sums[row])) for row, length in enumerate(lengths_R)]
        return torch.tensor(states, dtype=torch.float64).repeat_interleave(call.size_L)

    def logits(self, hidden_R: torch.Tensor) -> torch.Tensor:
        return hidden_R

    def choose(self, hidden_R: torch.Tensor, uniform_RS: torch.Tensor, sampling: Sampling, sent: list[Any]) -> torch.Tensor:
        token_RS = ((hidden_R[:, None] + (uniform_RS * 1000).floor()) % VOCAB_SIZE).floor()
        return torch.stack([token_RS, -uniform_RS])


def hashed(tokens: list[float], total: float) -> float:
    return (sum((index + 1) * token for index, token in enumerate(tokens)) + total) % 1009


def expected(request: Request, prompt: int, sample: int) -> Rollout:
    """Return a rollout by looking at nothing but its own text."""
    draft = request.drafts(prompt)[sample]
    while True:
        text = [*request.prompts[prompt], *draft.token_ids]
        uniform = float(uniforms_of(draft.stream, len(draft.token_ids)))
        token = int((hashed(text, sum(text)) + int(uniform * 1000)) % VOCAB_SIZE)
        if rollout := draft.extend(token, -uniform, request.sampling):
            return rollout


def uniforms_of(stream: int, index: int) -> float:
    from megatron_prism.generate.draw import uniforms

    return uniforms([stream], [index])[0]


def run(request: Request) -> tuple[list[Rollout], Toy]:
    toy, finished = Toy(), []
    lane = Lane(toy, request, sorted(range(len(request.prompts)), key=lambda prompt: -len(request.prompts[prompt])))
    while lane.advance(finished):
        pass
    return sorted(finished, key=lambda rollout: (rollout.prompt, rollout.sample)), toy


def request_of(
    prompts: list[list[int]], num_samples: int, max_tokens: int, num_rows: int, prefill_tokens: int, max_context: int
) -> Request:
    sampling = Sampling(max_tokens=max_tokens, temperature=1.0, end_ids=(END,))
    return Request(
        prompts, num_samples, sampling, [seed_of(prompt) for prompt in range(len(prompts))], num_rows, prefill_tokens, max_context
    )


@settings(deadline=None, max_examples=60)
@given(
    prompts=st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=20), min_size=1, max_size=8),
    num_samples=st.integers(1, 5),
    max_tokens=st.integers(1, 12),
    num_rows=st.integers(1, 7),
    prefill_tokens=st.integers(1, 30),
    max_context=st.integers(21, 40),
)
def test_each_rollout_is_as_if_alone(
    prompts: list[list[int]], num_samples: int, max_tokens: int, num_rows: int, prefill_tokens: int, max_context: int
) -> None:
    request = request_of(prompts, num_samples, max_tokens, num_rows, prefill_tokens, max_context)
    made, toy = run(request)
    assert made == [expected(request, prompt, sample) for prompt, sample in itertools.product(range(len(prompts)), range(num_samples))]
    assert max(toy.tokens_at_once) <= prefill_tokens and max(toy.rows_at_once, default=0) <= num_rows


def test_a_prompts_samples_share_one_prefill() -> None:
    request = request_of([[1, 2, 3, 4]], 9, 6, 4, 30, 40)
    made, toy = run(request)
    assert len(made) == 9 and toy.tokens_at_once == [4]


def test_a_rollout_says_why_it_ended() -> None:
    made, _ = run(request_of([[1] * length for length in (2, 18, 20)], 12, 6, 8, 30, 21))
    ends = {prompt: {rollout.ended for rollout in made if rollout.prompt == prompt} for prompt in range(3)}
    assert ends[0] <= {"end_token", "max_tokens"} and ends[1] <= {"end_token", "max_context"} and "max_context" in ends[1]
    for rollout in made:
        assert (rollout.token_ids[-1] == END) == (rollout.ended == "end_token") and END not in rollout.token_ids[:-1]
        limit = {"end_token": rollout.token_ids, "max_tokens": range(6), "max_context": range(21 - (2, 18, 20)[rollout.prompt])}
        assert len(rollout.token_ids) == len(limit[rollout.ended])
        assert rollout.token_ids.itemsize == rollout.logprobs.itemsize == 4  # every rank holds those of a whole step


@pytest.mark.parametrize("num_rows", [3, 8])
def test_finished_rows_leave_and_waiting_prompts_enter(num_rows: int) -> None:
    """Rows decode together as long as there is work for them."""
    request = request_of([[index] for index in range(24)], 1, 8, num_rows, 30, 40)
    made, toy = run(request)
    steps = sum(len(rollout.token_ids) - 1 for rollout in made)
    assert sum(toy.rows_at_once) == steps  # no row is fed in vain
    assert len(toy.rows_at_once) < 1.6 * steps / num_rows + 8


def test_a_row_that_is_copied_short_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    copy_rows = Cache.copy_rows
    monkeypatch.setattr(Cache, "copy_rows", lambda self, rows, source, sources, count: copy_rows(self, rows, source, sources, count - 1))
    request = request_of([[1, 2, 3], [4, 5]], 3, 6, 4, 30, 40)
    made, _ = run(request)
    assert made != [expected(request, prompt, sample) for prompt, sample in itertools.product(range(2), range(3))]


def test_logits_that_are_not_finite_end_the_generation() -> None:
    class Broken(Toy):
        def choose(self, hidden_R: torch.Tensor, uniform_RS: torch.Tensor, sampling: Sampling, sent: list[Any]) -> torch.Tensor:
            choice = super().choose(hidden_R, uniform_RS, sampling, sent)
            choice[1, -1, -1] = torch.nan
            return choice

    lane = Lane(Broken(), request_of([[1, 2], [3]], 2, 4, 4, 30, 30), [0, 1])
    with pytest.raises(CheckpointError, match=r"token 0 of a response to prompt 0: found logits that are NaN or inf"):
        while lane.advance([]):
            pass
