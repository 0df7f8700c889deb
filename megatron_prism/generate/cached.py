"""The embedded engine: generation on the Megatron-Core model itself, with a cache, on any TP x PP x DP layout, dense or hybrid.

The model is computed from its parameters (blocks.py), not through Megatron's modules. The modules stay unchanged, so training can continue
afterwards. Run on hosts; written for CUDA as well, but not run on a GPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_prism.core.config import ModelConfig
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.generate.engine import Rollout, Sampling, in_order, longest_first, problems
from megatron_prism.generate.lane import Lane, Request
from megatron_prism.generate.stage import Stage
from megatron_prism.parallel import groups, host
from megatron_prism.parallel.groups import Groups

# not cuDNN's, which builds a graph for every number of keys, and each step has one more
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Cached:
    """An engine (engine.Engine) over this rank's model chunk. Each call of generate() reads the current weights.

    chunks: from models.build, wrapped or not. num_rows: the rollouts that decode together on each data-parallel replica.
    prefill_tokens: the most tokens of a forward pass over prompts. max_context: the most tokens of a prompt and its rollout; None: the
    model's own positions. A replica's cache holds num_rows times the longest prompt and max_tokens, and is allocated once.
    Raises: InputError for what it does not support: virtual pipeline stages, context parallelism, fp8.
    """

    chunks: Sequence[Any]
    model: ModelConfig
    groups: Groups
    num_rows: int = 64
    prefill_tokens: int = 2048
    max_context: int | None = None

    def __post_init__(self) -> None:
        raise_problems([*unsupported(self.groups.vpp, self.groups.cp, bool(self.chunks[0].config.fp8)), *self._limits()])

    def _limits(self) -> list[Problem]:
        values = {"num_rows": self.num_rows, "prefill_tokens": self.prefill_tokens}
        return [Problem(name, str(value), "at least 1") for name, value in values.items() if value < 1]

    def within(self, cache_tokens: int | None, longest: int) -> Cached:
        """Return the engine with no more rows than hold cache_tokens together, where one grows to `longest` tokens. None: as many as it has."""
        if cache_tokens is None:
            return self
        longest = min(longest, self.max_context or self.model.max_position_embeddings)
        return replace(self, num_rows=max(1, min(self.num_rows, cache_tokens // longest)))

    @torch.no_grad()  # not inference_mode: its tensors could not take part in training afterwards
    def generate(self, prompts: Sequence[Sequence[int]], num_samples: int, sampling: Sampling, seeds: Sequence[int]) -> list[Rollout]:
        """Return the rollouts of all prompts on every rank. The prompts are divided among data-parallel replicas."""
        max_context = self.model.max_position_embeddings if self.max_context is None else self.max_context
        raise_problems(problems(prompts, num_samples, sampling, seeds, self.model.vocab_size, max_context))
        check_ranks(self.chunks[0], self.groups, prompts, num_samples, sampling, seeds)
        dp, pp = self.groups.dp, self.groups.pp
        mine = longest_first(prompts)[self.groups.dp_rank :: dp]
        shares = [share for lane in range(pp) if (share := mine[lane::pp])]
        finished: list[Rollout] = []
        with host.without_stand_in(), sdpa_kernel(ATTENTION):
            stage = Stage(self.chunks[0], self.model, self.groups)
            num_rows = max(1, self.num_rows // max(1, len(shares)))
            request = Request(prompts, num_samples, sampling, seeds, num_rows, self.prefill_tokens, max_context)
            lanes = [Lane(stage, request, share) for share in shares]
            while lanes:
                lanes = [lane for lane in lanes if lane.advance(finished)]
        everyones = groups.gather(finished, self.groups.dp_cp_group) if dp > 1 else [finished]
        return in_order(everyones)


def check_ranks(
    chunk: Any, grid: Groups, prompts: Sequence[Sequence[int]], num_samples: int, sampling: Sampling, seeds: Sequence[int]
) -> None:
    """Refuse weights that are still being gathered, and ranks with different arguments, which would wait for each other."""
    if getattr(chunk, "remove_forward_pre_hook_handles", None):
        fix = "generate within train.optim.settled"
        raise InputError(Problem("parallel.overlap_param_gather", "weights that arrive with the next forward pass", "whole weights", fix))
    if grid.world_size > 1:
        digest = hashlib.blake2b(repr((num_samples, sampling, list(seeds))).encode())
        for prompt in prompts:
            digest.update(np.asarray([len(prompt), *prompt], np.int64).tobytes())
        if len(set(groups.gather(digest.hexdigest()))) > 1:
            raise InputError(Problem("generate()", "other arguments on another rank", "the same on every rank")).agreed()


def unsupported(vpp: int | None, cp: int, is_fp8: bool) -> list[Problem]:
    """Return a problem for each part of a layout that the engine does not support. Call it before anything starts."""
    wrong = []
    if vpp is not None:
        wrong.append(Problem("parallel.vpp", str(vpp), "none to generate: one model chunk a pipeline stage"))
    if cp > 1:
        wrong.append(Problem("parallel.cp", str(cp), "1 to generate", "let parallel.tp or data parallelism have these ranks"))
    if is_fp8:
        wrong.append(Problem("fp8", "weights and activations in FP8", "bf16 or fp32 to generate"))
    return wrong
