"""Which kernels a run computes with, known before its first step: attention by Transformer Engine's own choice, norms, rope, Adam and the rest.

A run on a GPU that would be slow in silence is refused here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from megatron_prism.core.config import TrainConfig
from megatron_prism.core.errors import EnvironmentFault
from megatron_prism.models import attention_backend
from megatron_prism.models.attention_backend import AttentionChoice
from megatron_prism.models.batch import Batch
from megatron_prism.parallel import cudnn, groups
from megatron_prism.parallel.groups import Groups

LONG = 1024  # tokens of a sequence: below it unfused attention costs little


def find(chunks: Sequence[Any], optimizer: Any, config: TrainConfig, grid: Groups) -> dict[str, Any]:
    """Return the kernels of this gang, of rank 0 where ranks differ; every rank calls this.

    Raises: EnvironmentFault on every rank where one would compute a long sequence with unfused attention, unless the config names it.
    """
    choice = attention_backend.choice(chunks, _batch(config), grid.cp)
    for problem in groups.gather(refusal(choice, config)):
        if problem is not None:
            raise EnvironmentFault(problem).agreed()
    choices = [answer for answer in groups.gather(choice) if answer is not None]
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


def _batch(config: TrainConfig) -> Batch:
    """Return a microbatch of the run's shapes. Where documents are masked, each sequence holds two."""
    tokens_BS = torch.zeros(config.batch.micro_size, config.data.seq_length, dtype=torch.long)
    ids_BS = (torch.arange(config.data.seq_length) >= config.data.seq_length // 2).long().expand_as(tokens_BS)
    return {"tokens": tokens_BS} | ({"document_ids": ids_BS} if config.data.document_mask else {})


def refusal(choice: AttentionChoice | None, config: TrainConfig) -> str | None:
    """Return why this rank's attention must not be run, with the cure."""
    if choice is None or choice.backend in ("flash", "fused"):
        return None
    if choice.backend == "unfused" and (config.attention_backend == "unfused" or config.data.seq_length < LONG):
        return None
    taken = "no attention" if choice.backend == "none" else "its unfused attention, slow and with memory by the square of the sequence"
    reasons = "; ".join(choice.reasons) or "it gives no reason"
    way_out = "" if choice.backend == "none" else "; or set attention_backend: unfused"
    return f"for {choice.call} Transformer Engine has {taken}: {reasons}. {cudnn.cure(cudnn.folders())}{way_out}"


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
