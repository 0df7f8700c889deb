"""A gang's model behind rank 0: rank 0 asks, every rank computes, rank 0 has the answers. Other ranks only follow.

What a harness does between two calls (few-shot prompts, metrics, files) then happens once, and need not be the same on every rank.
Shape legend: B texts of a microbatch, S tokens of a text, N the tokens asked of a microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from megatron_prism.core.config import ModelConfig
from megatron_prism.core.errors import PrismError
from megatron_prism.data.tokenizer import TokenizerSpec
from megatron_prism.generate.cached import Cached
from megatron_prism.generate.engine import Rollout, Sampling
from megatron_prism.models.token_scores import token_scores
from megatron_prism.parallel import groups as gang
from megatron_prism.parallel.groups import Groups

T = TypeVar("T")
Pair = tuple[tuple[int, ...], tuple[int, ...]]  # a context and its continuation, as token ids
Score = tuple[float, bool]  # a continuation's log-probability, and whether each of its tokens is the likeliest


@dataclass(frozen=True)
class Row:
    """A text, computed once, and the pairs that it answers: (number of the pair, its continuation). Each continuation ends one token after it."""

    tokens: tuple[int, ...]
    pairs: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def asked(self) -> Iterator[tuple[int, int]]:
        """Yield (position, token) of every continuation's tokens."""
        for _, continuation in self.pairs:
            first = len(self.tokens) - len(continuation)
            yield from ((first + index, token) for index, token in enumerate(continuation))


@dataclass(frozen=True)
class Served:
    """This rank's part of a model, and how it is asked.

    chunks: from models.build, with the weights loaded. num_rows: the rollouts that decode together on each data-parallel replica, fewer where their
    cache would hold more than cache_tokens.
    batch_tokens: the most tokens of a forward pass that scores, a longer text alone. max_context: the most tokens of a text; None: the model's
    own positions.
    """

    chunks: Sequence[Any]
    model: ModelConfig
    groups: Groups
    spec: TokenizerSpec
    num_rows: int = 64
    batch_tokens: int = 8192
    max_context: int | None = None
    cache_tokens: int | None = None

    @property
    def longest(self) -> int:
        """The most tokens of a context with its continuation, but for the last one, which is only predicted."""
        return self.max_context or self.model.max_position_embeddings

    def scores(self, rows: Sequence[Row]) -> dict[int, Score]:
        """Return the scores of the rows' pairs by number. Every rank of the gang calls this with the same rows, and has all scores."""
        parts = _microbatches(rows, self.groups.dp * self.groups.pp)
        mine = parts[self.groups.dp_rank * self.groups.pp :][: self.groups.pp]  # one for each pipeline stage to work at
        size_B, size_S = len(parts[0]), max(len(row.tokens) for row in rows)
        size_N = max(sum(1 for row in part for _ in row.asked) for part in parts)
        batches, asked = [_batch(part, size_B, size_S) for part in mine], [_asked(part, size_N) for part in mine]
        values = token_scores(self.chunks, batches, asked, self.model.vocab_size, self.groups)
        own = dict(score for part, scores_2N in zip(mine, values, strict=True) for score in _by_pair(part, scores_2N.cpu()))
        everyones = gang.gather(own, self.groups.dp_cp_group) if self.groups.dp > 1 else [own]
        return {number: score for part in everyones for number, score in part.items()}

    def rollouts(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Rollout]:
        """Return a rollout of each prompt. Every rank of the gang calls this with the same arguments, and has all rollouts."""
        engine = Cached(self.chunks, self.model, self.groups, self.num_rows, max_context=self.longest)
        return engine.within(self.cache_tokens, max(map(len, prompts)) + sampling.max_tokens).generate(prompts, 1, sampling, seeds)


class Asking:
    """What rank 0 calls in place of Served: each call is sent to the ranks that follow, and then made."""

    def __init__(self, served: Served):
        self.served, self.is_calling = served, False  # is_calling stays true after a call that failed, on every rank

    def scores(self, rows: Sequence[Row]) -> dict[int, Score]:
        return self._call("scores", rows)

    def rollouts(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Rollout]:
        return self._call("rollouts", prompts, sampling, seeds)

    def _call(self, name: str, *arguments: Any) -> Any:
        if self.served.groups.world_size > 1:
            gang.from_first((name, arguments))
        self.is_calling = True
        value = getattr(self.served, name)(*arguments)
        self.is_calling = False
        return value


def lead(served: Served, work: Callable[[Asking], T]) -> T | None:
    """Return on rank 0 what `work` makes of a model; None on other ranks, which compute what it asks for. Every rank calls this.

    Raises: on every rank, the PrismError that work raised on rank 0.
    """
    if served.groups.rank:
        while (call := gang.from_first(None)) is not None:
            if isinstance(call, PrismError):
                raise call.agreed()
            name, arguments = call
            getattr(served, name)(*arguments)
        return None
    asking = Asking(served)
    try:
        made = work(asking)
    except PrismError as error:
        if not asking.is_calling and served.groups.world_size > 1:
            gang.from_first(error)
        raise error.agreed() from None
    if served.groups.world_size > 1:
        gang.from_first(None)
    return made


def rows_of(pairs: Sequence[Pair], longest: int) -> list[Row]:
    """Return the texts that answer pairs, longest first, cut on their left to fit a context of `longest` tokens.

    Pairs whose texts differ in nothing but the last token share a row: one-token choices of one question cost one row.
    """
    by_text: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    for number, (context, continuation) in enumerate(pairs):
        text = context + continuation
        by_text.setdefault(text[-(longest + 1) :][:-1], []).append((number, continuation))
    rows = [Row(tokens, tuple(asked)) for tokens, asked in by_text.items()]
    return sorted(rows, key=lambda row: (-len(row.tokens), row.tokens))


def rounds(rows: Sequence[Row], batch_tokens: int, num_microbatches: int) -> Iterator[Sequence[Row]]:
    """Yield rows in order, as many at a time as num_microbatches forward passes of batch_tokens hold."""
    start = 0
    while start < len(rows):
        size_B = max(1, batch_tokens // len(rows[start].tokens))
        yield rows[start : start + size_B * num_microbatches]
        start += size_B * num_microbatches


def _microbatches(rows: Sequence[Row], num_microbatches: int) -> list[Sequence[Row]]:
    """Return rows in equal parts; the last ones may be shorter, or empty."""
    size_B = -(-len(rows) // num_microbatches)
    return [rows[index * size_B : (index + 1) * size_B] for index in range(num_microbatches)]


def _batch(rows: Sequence[Row], size_B: int, size_S: int) -> dict[str, torch.Tensor]:
    """Return rows as a microbatch of a given shape, padded with token 0 on the right, which no token sees."""
    tokens_BS = torch.zeros((size_B, size_S), dtype=torch.long)
    for index, row in enumerate(rows):
        tokens_BS[index, : len(row.tokens)] = torch.tensor(row.tokens)
    return {"tokens": tokens_BS, "position_ids": torch.arange(size_S).expand(size_B, -1).contiguous()}


def _asked(rows: Sequence[Row], size_N: int) -> torch.Tensor:
    """Return (row, position, token) of every token asked of a microbatch (3, N), padded with zeros."""
    asked_3N = torch.zeros((3, size_N), dtype=torch.long)
    triples = [(index, position, token) for index, row in enumerate(rows) for position, token in row.asked]
    if triples:
        asked_3N[:, : len(triples)] = torch.tensor(triples).T
    return asked_3N


def _by_pair(rows: Sequence[Row], scores_2N: torch.Tensor) -> Iterator[tuple[int, Score]]:
    """Yield (number, score) of each pair of a microbatch. The sums are fp64."""
    start = 0
    for row in rows:
        for number, continuation in row.pairs:
            logprob_N, is_likeliest_N = scores_2N[:, start : start + len(continuation)]
            start += len(continuation)
            yield number, (float(logprob_N.double().sum()), bool(is_likeliest_N.all()))
