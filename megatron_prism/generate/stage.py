"""A pipeline stage's forward pass on plain tensors: embedding, blocks, logits, and the messages between the ranks of a model.

Sequence parallelism only concerns training's activations. Here every tensor-parallel rank holds all tokens.
Shape legend: T tokens, D hidden, R rows, S draws per row, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from megatron_prism.core.config import ModelConfig
from megatron_prism.generate import weights
from megatron_prism.generate.blocks import Call, linear
from megatron_prism.generate.cache import Cache
from megatron_prism.generate.draw import choose
from megatron_prism.generate.engine import Sampling
from megatron_prism.parallel import host
from megatron_prism.parallel.groups import Groups

Message = Any  # a pending send of torch.distributed: its wait() returns when it is done


class Stage:
    """This rank's part of the model, with its current weights."""

    def __init__(self, chunk: Any, model: ModelConfig, groups: Groups):
        self.blocks, self._outside, self.positions = weights.read(chunk, model, groups)
        self.model, self.groups, self.dtype = model, groups, self.positions.dtype

    def forward(self, token_T: Tensor, call: Call, cache: Cache, sent: list[Message]) -> Tensor | None:
        """Run the blocks over a call's tokens. Return the hidden states (T, D) on the last stage; on others send them on and return None."""
        groups, epsilon = self.groups, self.model.norm_epsilon
        if groups.is_first_stage:
            hidden_TD = self._embed(token_T)
        else:
            hidden_TD = torch.empty(len(token_T), self.model.hidden_size, dtype=self.dtype, device=host.device())
            dist.recv(hidden_TD, group_src=groups.pp_rank - 1, group=groups.pp_group)
        for block, state in zip(self.blocks, cache.states, strict=True):
            normed_TD = functional.rms_norm(hidden_TD, hidden_TD.shape[1:], block.norm_D, epsilon)
            self._add(hidden_TD, block.mix(normed_TD, call, state), block.out_DY)
        if groups.is_last_stage:
            return hidden_TD
        sent.append(dist.isend(hidden_TD, group_dst=groups.pp_rank + 1, group=groups.pp_group))  # gloo's send waits for its recv
        return None

    def _embed(self, token_T: Tensor) -> Tensor:
        weight = self._outside["embedding"]
        if self.groups.tp == 1:
            hidden_TD = functional.embedding(token_T, weight)
        else:
            row_T = token_T - self.groups.tp_rank * len(weight)
            is_elsewhere_T = (row_T < 0) | (row_T >= len(weight))
            hidden_TD = functional.embedding(row_T.masked_fill(is_elsewhere_T, 0), weight).masked_fill_(is_elsewhere_T[:, None], 0)
            dist.all_reduce(hidden_TD, group=self.groups.tp_group)
        return hidden_TD if self.model.embedding_multiplier == 1 else hidden_TD * self.model.embedding_multiplier

    def _add(self, hidden_TD: Tensor, y_TY: Tensor, out_DY: Tensor) -> None:
        """Add a block's output to the hidden states, in place."""
        output_TD = linear(y_TY, out_DY)
        if self.groups.tp > 1:
            dist.all_reduce(output_TD, group=self.groups.tp_group)
        hidden_TD.add_(output_TD, alpha=self.model.residual_multiplier)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Return the logits (R, padded V) in fp32, -inf for the vocabulary's padding. Only for the last stage."""
        normed_RD = functional.rms_norm(hidden_RD, hidden_RD.shape[1:], self._outside["norm"], self.model.norm_epsilon)
        logits_RV = linear(normed_RD, self._outside["output"])
        if self.model.logits_scaling != 1:
            logits_RV = logits_RV.div_(self.model.logits_scaling)
        if self.groups.tp > 1:
            parts = [torch.empty_like(logits_RV) for _ in range(self.groups.tp)]
            dist.all_gather(parts, logits_RV, group=self.groups.tp_group)
            logits_RV = torch.cat(parts, dim=1)
        logits_RV = logits_RV.float()
        logits_RV[:, self.model.vocab_size :] = -torch.inf
        return logits_RV

    def choose(self, logits_RV: Tensor, uniform_RS: Tensor, sampling: Sampling, sent: list[Message]) -> Tensor:
        """Return the chosen tokens and their log-probabilities (2, R, S), in fp64 on the host, and send them to the other stages.

        Tensor-parallel rank 0 chooses, since a sum on a GPU may differ from rank to rank.
        """
        groups, choice = self.groups, torch.empty(2, *uniform_RS.shape, dtype=torch.float64)
        if groups.tp_rank == 0:
            token_RS, logprob_RS = choose(logits_RV, uniform_RS.to(logits_RV.device), sampling)
            choice.copy_(torch.stack([token_RS.double(), logprob_RS.double()]))
        if groups.tp > 1:
            dist.broadcast(choice, group_src=0, group=groups.tp_group)
        sent += [dist.isend(choice, group_dst=stage, group=groups.pp_group) for stage in range(groups.pp - 1)]
        return choice

    def receive_choice(self, num_rows: int, num_draws: int) -> Tensor:
        """Receive the last stage's choice, on another stage."""
        choice = torch.empty(2, num_rows, num_draws, dtype=torch.float64)
        dist.recv(choice, group_src=self.groups.pp - 1, group=self.groups.pp_group)
        return choice
