"""Rows that decode together: prompts enter as rows become free, finished rollouts leave, and a prompt's samples share one prefill.

Every rank of a model runs the same lanes and receives every chosen token, so no rank needs instructions. One lane per pipeline stage keeps
all stages busy: while one lane's tokens are on the second stage, the first stage computes another lane's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_prism.generate import blocks
from megatron_prism.generate.cache import Cache
from megatron_prism.generate.draw import uniforms
from megatron_prism.generate.engine import Ending, Rollout, Sampling, ids_of, logprobs_of, not_finite, seed_of
from megatron_prism.generate.stage import Message, Stage
from megatron_prism.parallel import host

FILL = 0.75  # a prefill's prompts have at least this share of its longest; a lane refills when at most this share of its rows is busy


@dataclass
class Draft:
    """An unfinished rollout. stream: the stream of its random numbers. max_tokens: the limit from its sampling and its context."""

    prompt: int
    sample: int
    seed: int
    num_prompt_tokens: int
    max_tokens: int
    stream: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def extend(self, token: int, logprob: float, sampling: Sampling) -> Rollout | None:
        """Append a token. If it is the last one, return the finished rollout."""
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        is_end, is_stop = token in sampling.end_ids, sampling.stop is not None and sampling.stop(self.token_ids)
        if not is_end and not is_stop and len(self.token_ids) < self.max_tokens:
            return None
        full: Ending = "max_tokens" if len(self.token_ids) == sampling.max_tokens else "max_context"
        ended: Ending = "end_token" if is_end else "stop" if is_stop else full
        return Rollout(self.prompt, self.sample, self.seed, ids_of(self.token_ids), logprobs_of(self.logprobs), ended)


@dataclass(frozen=True)
class Request:
    """The arguments of generate(), and its limits: rows per lane, tokens per forward pass of a prefill, tokens per context."""

    prompts: Sequence[Sequence[int]]
    num_samples: int
    sampling: Sampling
    seeds: Sequence[int]
    num_rows: int
    prefill_tokens: int
    max_context: int

    def drafts(self, prompt: int) -> list[Draft]:
        """Return drafts, still empty, for all samples of a prompt."""
        length, seed = len(self.prompts[prompt]), self.seeds[prompt]
        most = min(self.sampling.max_tokens, self.max_context - length)
        return [Draft(prompt, sample, seed, length, most, seed_of(seed, sample)) for sample in range(self.num_samples)]


class Lane:
    """A batch of rows. Busy rows are first in the cache. Drafts in `ready` wait for a row; their prompts are already in the cache `read`."""

    def __init__(self, stage: Stage, request: Request, waiting: list[int]):
        self.stage, self.request, self.waiting = stage, request, waiting  # the longest prompts first
        self.num_rows = min(request.num_rows, len(waiting) * request.num_samples)
        longest = len(request.prompts[waiting[0]]) + request.sampling.max_tokens
        self.cache = Cache(stage.blocks, self.num_rows, min(longest, request.max_context))
        self.rows: list[Draft | None] = []
        self.ready: list[tuple[Draft, int]] = []
        self.read: Cache | None = None
        self.asked: list[list[Draft]] = []  # the drafts whose next tokens are being computed, by row of the forward pass
        self.choice: Tensor | None = None
        self.sent: list[Message] = []
        self.from_prefill = False

    def advance(self, finished: list[Rollout]) -> bool:
        """Take the last chosen tokens, run one forward pass (or the chunks of a long prompt), and choose. Return whether there was work."""
        self._take(finished)
        self._enter()
        num_free = self.num_rows - sum(draft is not None for draft in self.rows)
        enough = min((1 - FILL) * self.num_rows, len(self.waiting) * self.request.num_samples)
        self.from_prefill = bool(self.waiting) and num_free >= enough
        if self.from_prefill:
            self._prefill(num_free)
            return True
        self._close_up()
        if self.rows:
            self._decode()
        return bool(self.rows)

    def _take(self, finished: list[Rollout]) -> None:
        if not self.asked:
            return
        choice = self.stage.receive_choice(len(self.asked), len(self.asked[0])) if self.choice is None else self.choice
        for message in self.sent:
            message.wait()
        token_RS, logprob_RS = choice.tolist()
        for row, drafts in enumerate(self.asked):
            for draft, token, logprob in zip(drafts, token_RS[row], logprob_RS[row], strict=True):
                if math.isnan(logprob):
                    raise not_finite(f"token {len(draft.token_ids)} of a response to prompt {draft.prompt}")
                rollout = draft.extend(int(token), logprob, self.request.sampling)
                if rollout is not None:
                    finished.append(rollout)
                if self.from_prefill and rollout is None:
                    self.ready.append((draft, row))
                elif not self.from_prefill and rollout is not None:
                    self.rows[row] = None
        self.asked, self.sent, self.choice = [], [], None

    def _enter(self) -> None:
        """Assign free rows to ready drafts."""
        free = [row for row, draft in enumerate(self.rows) if draft is None]
        free += range(len(self.rows), self.num_rows)
        pairs = list(zip(free, self.ready, strict=False))
        for row, (draft, _) in pairs:
            self.rows[row : row + 1] = [draft]
        del self.ready[: len(pairs)]
        self._copy([row for row, _ in pairs], self.read, [source for _, (_, source) in pairs])
        if not self.ready:
            self.read = None

    def _close_up(self) -> None:
        """Move the last busy rows into free rows, so that busy rows come first."""
        rows: list[int] = []
        sources: list[int] = []
        for row in [row for row, draft in enumerate(self.rows) if draft is None]:
            while self.rows and self.rows[-1] is None:
                self.rows.pop()
            if row < len(self.rows):
                rows.append(row)
                sources.append(len(self.rows) - 1)
                self.rows[row] = self.rows.pop()
        self._copy(rows, self.cache, sources)

    def _copy(self, rows: list[int], source: Cache | None, source_rows: list[int]) -> None:
        if rows:
            assert source is not None
            self.cache.copy_rows(rows, source, source_rows, max(self._position(row) for row in rows))

    def _position(self, row: int) -> int:
        """Return the position of a row's next input token, which is the number of tokens in its cache."""
        draft = self.rows[row]
        assert draft is not None
        return draft.num_prompt_tokens + len(draft.token_ids) - 1

    def _prefill(self, num_free: int) -> None:
        """Prefill prompts of similar length, as many as there are free rows for. Read a prompt longer than prefill_tokens in chunks."""
        prompts, size_L = self.request.prompts, len(self.request.prompts[self.waiting[0]])
        most = max(1, min(-(-num_free // self.request.num_samples), self.request.prefill_tokens // size_L))
        taken = list(itertools.takewhile(lambda prompt: len(prompts[prompt]) >= FILL * size_L, self.waiting[:most]))
        del self.waiting[: len(taken)]
        self.read = Cache(self.stage.blocks, len(taken), size_L)
        for start in range(0, size_L, self.request.prefill_tokens):
            parts = [prompts[prompt][start : start + self.request.prefill_tokens] for prompt in taken]
            lengths, longest = [len(part) for part in parts], len(parts[0])
            feed_RL = torch.tensor([[*part, *[0] * (longest - len(part))] for part in parts], device=host.device())
            call = blocks.prefill(start, lengths, longest, self.stage.positions, host.device())
            hidden_TD = self.stage.forward(feed_RL.view(-1), call, self.read, self.sent)
        if hidden_TD is not None:
            assert call.length_R is not None
            hidden_TD = hidden_TD[call.row_R * call.size_L + call.length_R - 1]  # each row's last token; only it needs logits
        self._ask([self.request.drafts(prompt) for prompt in taken], hidden_TD)

    def _decode(self) -> None:
        drafts = [draft for draft in self.rows if draft is not None]
        call = blocks.decode([self._position(row) for row in range(len(drafts))], self.stage.positions, host.device())
        token_T = torch.tensor([draft.token_ids[-1] for draft in drafts], device=host.device())
        self._ask([[draft] for draft in drafts], self.stage.forward(token_T, call, self.cache, self.sent))

    def _ask(self, asked: list[list[Draft]], hidden_RD: Tensor | None) -> None:
        """Choose the next tokens on the last stage."""
        self.asked, sampling = asked, self.request.sampling
        if hidden_RD is not None:
            streams = [draft.stream for drafts in asked for draft in drafts]
            number = uniforms(streams, [len(draft.token_ids) for drafts in asked for draft in drafts])
            uniform_RS = torch.from_numpy(number).view(len(asked), -1)
            self.choice = self.stage.choose(self.stage.logits(hidden_RD), uniform_RS, sampling, self.sent)
