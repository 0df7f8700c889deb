"""Is a Megatron checkpoint the Hugging Face model it stands for? Both run on the same tokens, and their logits are compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_prism.checkpoint import folder, reference, sharded
from megatron_prism.core.config import GangConfig, Precision
from megatron_prism.data import tokenizer
from megatron_prism.parallel import host
from megatron_prism.parallel.groups import Groups

# Largest difference of two logits, as a share of the largest logit. Ours: the seven models' tiny versions reach 2e-6 in fp32 and
# 2e-2 in bf16; a wrong norm, window or multiplier moves them by 1e-1 and more.
TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "bf16": 5e-2}


@dataclass(frozen=True)
class Comparison:
    """What two models say of the same tokens. The worst position is the token (and vocabulary entry) of the largest difference."""

    num_tokens: int
    max_abs_difference: float
    max_abs_logit: float
    relative_difference: float
    mean_kl: float
    same_choice: float
    worst_position: int
    worst_token_id: int
    worst_checkpoint_logit: float
    worst_hf_logit: float


def compare(ours_SV: torch.Tensor, theirs_SV: torch.Tensor) -> Comparison:
    """Compare the checkpoint's logits with transformers', over the true vocabulary. KL is of theirs from ours, a token, in nats.

    A logit that is no number on either side is an infinite difference.
    """
    difference_SV = (ours_SV.double() - theirs_SV.double()).abs().nan_to_num(nan=float("inf"))
    position, token = divmod(int(difference_SV.argmax()), difference_SV.shape[1])
    largest, size = float(difference_SV[position, token]), float(theirs_SV.abs().max())
    log_theirs, log_ours = (torch.log_softmax(logits.double(), dim=-1) for logits in (theirs_SV, ours_SV))
    return Comparison(
        num_tokens=len(ours_SV),
        max_abs_difference=largest,
        max_abs_logit=size,
        relative_difference=largest / size if size else largest,
        mean_kl=float((log_theirs.exp() * (log_theirs - log_ours)).sum(-1).mean()),
        same_choice=float((ours_SV.argmax(-1) == theirs_SV.argmax(-1)).double().mean()),
        worst_position=position,
        worst_token_id=token,
        worst_checkpoint_logit=float(ours_SV[position, token]),
        worst_hf_logit=float(theirs_SV[position, token]),
    )


def checkpoint_model(path: Path, gang: GangConfig, groups: Groups) -> list[Any]:
    """Return this rank's chunks of a checkpoint's model, with its weights."""
    from megatron_prism.models import build

    checkpoint = folder.read(path)
    chunks = build.build(checkpoint.model, groups, gang)
    sharded.require_whole(checkpoint.root)
    sharded.load_weights(checkpoint.root, chunks)
    return chunks


def checkpoint_logits(chunks: list[Any], vocab_size: int, tokens: list[int], groups: Groups) -> torch.Tensor | None:
    """Return a checkpoint's logits (S, V) on the host: on the first rank of the last pipeline stage; None elsewhere."""
    from megatron_prism.models.forward import logits

    logits_SV = logits(chunks, tokens, groups)
    if logits_SV is None or groups.tp_rank:
        return None
    return logits_SV[:, :vocab_size].float().cpu().contiguous()  # gloo sends memory as it lies


def hf_model(root: Path, precision: Precision) -> Any:
    """Return a Hugging Face folder's model, by transformers."""
    from megatron_prism.models.build import DTYPES

    return reference.load(root, DTYPES[precision]).to(host.device())


def hf_logits(model: Any, root: Path, tokens: list[int]) -> torch.Tensor:
    """Return the logits (S, V) on the host of a Hugging Face folder's model."""
    with torch.no_grad(), reference.said_of(root):
        return model(torch.tensor([tokens], device=host.device())).logits[0].float().cpu()


def tokens_of(root: Path, text: str | None, count: int, vocab_size: int, seed: int) -> tuple[list[int], str]:
    """Return `count` token ids to compare on, and what they are: a text, again and again, where the folder has a tokenizer, else random ids."""
    if text is not None and (root / tokenizer.FILE).is_file():
        ids = tokenizer.encode_prompt(text, tokenizer.load(root))
        return (ids * -(-count // len(ids)))[:count], "text"
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (count,), generator=generator).tolist(), "random ids"
