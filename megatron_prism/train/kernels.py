"""Which kernels a run computes with, known before its first step: attention by Transformer Engine's own choice, norms, rope, Adam and the rest.

A run on a GPU that would be slow in silence is refused here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from megatron_prism.core import log
from megatron_prism.core.config import RLConfig, TrainConfig
from megatron_prism.core.errors import EnvironmentFault
from megatron_prism.models import attention_backend
from megatron_prism.models.attention_backend import AttentionChoice
from megatron_prism.models.batch import Batch
from megatron_prism.parallel import cudnn, groups
from megatron_prism.parallel.groups import Groups

LONG = 1024  # tokens of a sequence: below it unfused attention costs little


def find(chunks: Sequence[Any], optimizer: Any, config: TrainConfig | RLConfig, grid: Groups) -> dict[str, Any]:
    """Return the kernels of this gang, of rank 0 where ranks differ; every rank calls this.

    Raises: EnvironmentFault on every rank where one would compute a long sequence with unfused attention, unless the config names it.
    """
    choice = attention_backend.choice(chunks, _batch(config), grid.cp)
    for problem in groups.gather(refusal(choice, config)):
        if problem is not None:
            raise EnvironmentFault(problem).agreed()
    choices = [answer for answer in groups.gather(choice) if answer is not None]
    if grid.rank == 0 and choices and (told := caution(choices[0], config)):
        log.get().warning("%s", told)
    return {
        "attention": asdict(choices[0]) if choices else "local",
        "cudnn": {"version": cudnn.version(), "loaded_from": list(cudnn.folders())},
        **_fusions(chunks[0].config),
        "optimizer": _adam(optimizer),
    }


def in_words(kernels: dict[str, Any]) -> str:
    """Return the kernels as one line."""
    choice = kernels["attention"]
    attention = (
        choice if isinstance(choice, str) else f"{choice['backend']} ({', '.join(filter(None, (choice['detail'], choice['call'])))})"
    )
    rest = {**kernels, "attention": attention, "cudnn": kernels["cudnn"]["version"] or "none"}
    return "  ".join(f"{name}: {value}" for name, value in rest.items())


def _sequences(config: TrainConfig | RLConfig) -> tuple[int, bool]:
    """Return the tokens of a sequence, and whether documents are masked in it. RL's rows are of several responses."""
    return (config.batch.seq_length, True) if isinstance(config, RLConfig) else (config.data.seq_length, config.data.document_mask)


def _batch(config: TrainConfig | RLConfig) -> Batch:
    """Return a microbatch of the run's shapes. Where documents are masked, a sequence holds one of more than half its length, and eight others.

    What Transformer Engine has for documents depends on how many they are and on the longest (deterministic, on an H100).
    """
    size_S, is_masked = _sequences(config)
    tokens_BS = torch.zeros(config.batch.micro_size, size_S, dtype=torch.long)
    behind_S = torch.arange(size_S) - (size_S // 2 + 1)
    ids_BS = torch.where(behind_S < 0, 0, 1 + behind_S // max(1, size_S // 16)).expand_as(tokens_BS)
    return {"tokens": tokens_BS} | ({"document_ids": ids_BS} if is_masked else {})


def refusal(choice: AttentionChoice | None, config: TrainConfig | RLConfig) -> str | None:
    """Return why this rank's attention must not be run, with the cure."""
    if choice is None or choice.backend in ("flash", "fused"):
        return None
    if choice.backend == "unfused" and (config.attention_backend == "unfused" or _sequences(config)[0] < LONG):
        return None
    taken = "no attention" if choice.backend == "none" else "its unfused attention, slow and with memory by the square of the sequence"
    reasons = "; ".join(choice.reasons) or "it gives no reason"
    way_out = "" if choice.backend == "none" else "; or set attention_backend: unfused"
    return f"for {choice.call} Transformer Engine has {taken}: {reasons}. {cudnn.cure(cudnn.folders())}{way_out}"


def caution(choice: AttentionChoice, config: TrainConfig | RLConfig) -> str | None:
    """Return what a chosen attention may cost. Source: Transformer Engine 2.20, get_attention_backend, which leaves cuDNN's out from 2^30 on."""
    size_S, is_masked = _sequences(config)
    if choice.backend != "fused" or not (config.deterministic and is_masked) or size_S < LONG:
        return None
    wanted = "128 bytes and more x documents x heads x the square of the longest"
    return f"deterministic, for {choice.call}: cuDNN's backward pass may ask an H100 for {wanted}, tens of GiB; flash-attn asks for none"


def _fusions(config: Any) -> dict[str, str]:
    """Return what computes the rest of a layer, by Megatron-Core's configuration."""
    names = {True: "fused", False: "torch"}
    return {
        "rope": names[config.apply_rope_fusion],
        "activation": names[config.bias_activation_fusion],
        "cross_entropy": config.cross_entropy_fusion_impl if config.cross_entropy_loss_fusion else "unfused",
        "gradient_accumulation": names[config.gradient_accumulation_fusion],
    }


def _adam(optimizer: Any) -> str:
    """Return the package of the optimizers that move the weights: transformer_engine, apex or torch."""
    inner = [getattr(part, "optimizer", part) for part in getattr(optimizer, "chained_optimizers", [optimizer])]
    return ", ".join(sorted({f"{type(each).__module__.partition('.')[0]} {type(each).__name__}" for each in inner if each is not None}))
