"""`prism generate`: continue a text with a Megatron checkpoint on any TP x PP layout, or with plain transformers as the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_prism.checkpoint import folder
from megatron_prism.core import log
from megatron_prism.core.check.model import check_split
from megatron_prism.core.config import GangConfig, ParallelConfig, Precision
from megatron_prism.core.errors import Problem, raise_problems
from megatron_prism.data import tokenizer
from megatron_prism.generate.engine import Sampling


def check(tp: int, pp: int, world_size: int, ckpt: Path) -> None:
    """Check a layout against the gang and the model before anything starts.

    Raises: InputError with every problem.
    """
    problems = check_split(folder.read(ckpt).model, tp, pp, "--tp", "--pp")
    if min(tp, pp) < 1 or tp * pp != world_size:
        problems.insert(0, Problem("--tp, --pp", f"tp {tp} x pp {pp} on {world_size} processes", "as many processes as tp x pp"))
    raise_problems(problems)


def from_checkpoint(ckpt: Path, prompt: str, sampling: Sampling, seed: int, tp: int, pp: int) -> str:
    """Return a checkpoint's (or a run's latest) continuation of a prompt. Every rank of the gang calls this."""
    from megatron_prism.checkpoint import sharded
    from megatron_prism.generate.cached import Cached
    from megatron_prism.models import build
    from megatron_prism.parallel import environment
    from megatron_prism.parallel.groups import from_first, gang

    checkpoint = folder.read(ckpt)
    spec, ids = _read(checkpoint.assets, prompt)
    whole = len(ids) + sampling.max_tokens
    if whole > (longest := checkpoint.model.max_position_embeddings):
        log.get().warning("%d tokens and %d more: the model was made for %d positions", len(ids), sampling.max_tokens, longest)
    precision: Precision = "bf16" if checkpoint.facts.get("dtype") == "bfloat16" else "fp32"
    config = GangConfig(parallel=ParallelConfig(tp=tp, pp=pp), precision=precision)
    environment.set_variables(config)
    with gang(config) as groups:
        checkpoint = from_first(checkpoint)  # a run that goes on may have written another one between two ranks' looks
        chunks = build.build(checkpoint.model, groups, config)
        sharded.require_whole(checkpoint.root)
        sharded.load_weights(checkpoint.root, chunks)
        engine = Cached(chunks, checkpoint.model, groups, num_rows=1, max_context=whole)
        (rollout,) = engine.generate([ids], 1, replace(sampling, end_ids=spec.end_ids), [seed])
    return tokenizer.continuation(ids, rollout.token_ids, spec)


def from_hf(root: Path, prompt: str, sampling: Sampling, seed: int) -> str:
    """Return plain transformers' continuation of a prompt. A converted checkpoint must agree with it."""
    import torch

    from megatron_prism.checkpoint import reference

    spec, ids = _read(root, prompt)
    torch.manual_seed(seed)
    model = reference.load(root)
    choice: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:  # top_k 0 is all tokens; transformers' default is 50
        choice = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    eos = {"eos_token_id": list(spec.end_ids)} if spec.end_ids else {}
    ids_1S = torch.tensor([ids])
    # the mask: without it transformers takes each 0 of the prompt for padding
    options = {"attention_mask": torch.ones_like(ids_1S), "pad_token_id": 0, "max_new_tokens": sampling.max_tokens}
    output = model.generate(ids_1S, **options, **choice, **eos)
    return tokenizer.continuation(ids, output[0, len(ids) :].tolist(), spec)


def _read(root: Path, prompt: str) -> tuple[tokenizer.TokenizerSpec, list[int]]:
    """Return a Hugging Face folder's tokenizer and a prompt's tokens."""
    spec = tokenizer.load(root)
    tokenizer.log_ends(spec)
    return spec, tokenizer.encode_prompt(prompt, spec)
