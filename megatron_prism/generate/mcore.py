"""Megatron-Core's dynamic inference engine as a generation engine: it runs the training model itself, so there is no copy and no hand-over.

Keys and values lie in pages that a call allocates and gives back (dynamic.py). Tokens, their order and their log-probabilities are the cached
engine's for the same logits. It has no CUDA graphs: Megatron-Core captures them only for a model that was built for them.
Run on hosts on a stand-in for flash-attn (tests/dynamic), and not on a GPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from packaging.version import Version

from megatron_prism.core.config import ModelConfig, Precision
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.generate import cached, dynamic
from megatron_prism.generate.engine import Rollout, Sampling, in_order, longest_first, problems
from megatron_prism.generate.lane import Draft, Request
from megatron_prism.models import build, rope
from megatron_prism.parallel import groups, host
from megatron_prism.parallel.groups import Groups

ENGINE = "engine"
CURE = "engine: cached, which serves it"
LEAST_CORE = "0.19"  # 0.16's engine ignores a window without a word, too
FLASH = {"flash-attn": "2.7.3", "flash-attn-4": "4.0.0b20"}  # one of them; source: transformer/attention.py of 0.19.2
FLASH_3 = ("flash_attn_3", "flashattn_hopper")  # or one of these modules
MIXERS = {"mamba-ssm": "2.2.6.post3", "causal-conv1d": "1.5.3.post1"}  # both; source: ssm/mamba_mixer.py of 0.19.2


@dataclass(frozen=True)
class MCore:
    """An engine (engine.Engine) over this rank's model chunk. Each call of generate() reads the current weights.

    chunks: from models.build, wrapped or not. max_context: the most tokens of a prompt and its rollout. cache_bytes: the most that a rank's keys,
    values and states take during a call. num_rows: the rollouts that decode together on each data-parallel replica. prefill_tokens: the most
    prompt tokens of a forward pass, but for a longer prompt, which is read at once. page_tokens: of a page; flash-attn 2 takes multiples of 256.
    Raises: InputError for what it does not support (unsupported), and for what this machine lacks (absent).
    """

    chunks: Sequence[Any]
    model: ModelConfig
    groups: Groups
    max_context: int
    cache_bytes: int
    num_rows: int = 64
    prefill_tokens: int = 2048
    page_tokens: int = 256

    def __post_init__(self) -> None:
        config, grid = self.chunks[0].config, self.groups
        unable = [*unsupported(self.model, grid.pp), *cached.unsupported(grid.vpp, grid.cp, bool(config.fp8))]
        if config.cpu_offloading:
            unable.append(Problem("offload.activation_layers", "layers whose activations are offloaded", "0", CURE))
        raise_problems([*absent(self.model, "bf16" if config.bf16 else "fp32"), *unable])

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], num_samples: int, sampling: Sampling, seeds: Sequence[int]) -> list[Rollout]:
        """Return the rollouts of all prompts on every rank. The prompts are divided among data-parallel replicas."""
        wrong = problems(prompts, num_samples, sampling, seeds, self.model.vocab_size, self.max_context)
        raise_problems([*wrong, *_single_tokens(prompts)])
        cached.check_ranks(self.chunks[0], self.groups, prompts, num_samples, sampling, seeds)
        request = Request(prompts, num_samples, sampling, seeds, self.num_rows, self.prefill_tokens, self.max_context)
        order = longest_first(prompts)
        drafts = [draft for prompt in order[self.groups.dp_rank :: self.groups.dp] for draft in request.drafts(prompt)]
        room = self._room([draft for prompt in order for draft in request.drafts(prompt)])
        choices = dynamic.Choices(dict(enumerate(drafts)), sampling, self.model.vocab_size, self.groups)
        finished = dynamic.run(build.unwrap(self.chunks[0]), room, prompts, choices) if drafts else []
        everyones = groups.gather(finished, self.groups.dp_cp_group) if self.groups.dp > 1 else [finished]
        return in_order(everyones)

    def _room(self, drafts: Sequence[Draft]) -> dynamic.Room:
        """Return what the engine may hold, the same on every rank, for the drafts of all replicas."""
        rows = -(-min(self.num_rows, max(len(drafts), 1)) // self.groups.tp) * self.groups.tp  # Megatron-Core divides them by TP
        longest = max((draft.num_prompt_tokens + draft.max_tokens for draft in drafts), default=1)
        longest_prompt, pages = max((draft.num_prompt_tokens for draft in drafts), default=1), -(-longest // self.page_tokens)
        sizes = dynamic.Sizes.of(self.model, self.groups, self.chunks[0].config.params_dtype.itemsize, self.page_tokens)
        held = (self.cache_bytes - rows * sizes.row_bytes) // sizes.page_bytes - 1  # one more takes what is written for padding
        if held < pages:
            found = f"{self.cache_bytes} bytes, {max(held, 0)} pages of {self.page_tokens} tokens beside the states of {rows} rows"
            fix = "a larger mcore.memory_share, or a smaller num_rows"
            raise InputError(Problem("mcore.memory_share", found, f"{pages} pages, for the longest prompt and response", fix))
        # where pages are scarce Megatron-Core drops a response's keys and reads it again, with its prompt and in one pass
        at_once = longest_prompt if held >= rows * pages else longest
        return dynamic.Room(
            rows=rows,
            pass_tokens=max(self.prefill_tokens, at_once) + rows,
            max_context=self.max_context,
            num_pages=min(held, rows * pages),
            page_tokens=self.page_tokens,
            sizes=sizes,
        )


def _single_tokens(prompts: Sequence[Sequence[int]]) -> Iterator[Problem]:
    """Yield the first prompt of one token. A pass of such prompts alone is a decode step to flash-attn (dynamic_context.py: it crashes)."""
    for number, prompt in enumerate(prompts):
        if len(prompt) == 1:
            yield Problem(f"prompts[{number}]", "1 token", "2 or more for Megatron-Core's dynamic engine", CURE)
            return


def unsupported(model: ModelConfig, pp: int) -> list[Problem]:
    """Return a problem for each part of a model or layout that the engine does not support. Call it before anything starts."""
    wrong = []
    scale, usual = rope.softmax_scale(model), model.kv_channels**-0.5
    if scale is not None and not math.isclose(scale, usual, rel_tol=1e-9):
        required = f"{usual:.6g}, 1 / sqrt({model.kv_channels}): Megatron-Core's dynamic engine ignores any other without a word"
        wrong.append(Problem(ENGINE, f"mcore for a model whose attention scores are scaled by {scale:.6g}", required, CURE))
    if model.mamba is not None and pp > 1:
        wrong.append(Problem("parallel.pp", f"{pp} under engine mcore", "1 for a model with Mamba layers: no more was run", CURE))
    return wrong


def absent(model: ModelConfig, precision: Precision) -> list[Problem]:
    """Return what this machine lacks, and a precision that its kernels do not compute in. It imports none of the packages that it looks for."""
    wrong = []
    if precision == "fp32":
        wrong.append(Problem("precision", "fp32 under engine mcore", "bf16: flash-attn has no other for our models", CURE))
    if not _is_there("megatron-core", LEAST_CORE):
        found = f"mcore with megatron-core {_version('megatron-core')}"
        wrong.append(Problem(ENGINE, found, f"{LEAST_CORE} or newer, which needs Python 3.12", "engine: cached"))
    if not host.has_cuda():
        wrong.append(Problem(ENGINE, "mcore on a machine without a CUDA device", "an NVIDIA GPU", "engine: cached, which runs here too"))
    if not any(_is_there(*flash) for flash in FLASH.items()) and not any(importlib.util.find_spec(module) for module in FLASH_3):
        found = ", ".join(f"{name} {_version(name)}" for name in FLASH)
        required = ", or ".join(f"{name} {least} or newer" for name, least in FLASH.items())
        wrong.append(Problem(ENGINE, f"mcore with {found}", required, "pip install --no-build-isolation -e '.[flash]', or engine: cached"))
    for name, least in MIXERS.items() if model.mamba is not None else ():
        if not _is_there(name, least):
            fix = "pip install --no-build-isolation -e '.[mamba]', or engine: cached"
            wrong.append(Problem(ENGINE, f"mcore for Mamba layers with {name} {_version(name)}", f"{least} or newer", fix))
    return wrong


def _is_there(distribution: str, least: str) -> bool:
    found = _version(distribution)
    return found != "not installed" and Version(found) >= Version(least)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
