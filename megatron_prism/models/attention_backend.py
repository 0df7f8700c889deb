"""Which attention Transformer Engine chooses for a run's own shapes, asked of the built layers before the first step.

Where it finds no fused kernel, Transformer Engine takes its unfused attention without a word: some twice the time of a step at 8,192 tokens,
and memory by the square of the sequence. Nothing here is computed: the layer makes its own choice, and is stopped before it acts on it.
Source: transformer_engine/pytorch/attention/dot_product_attention (2.11 to 2.20).
Shape legend: S tokens of a sequence, B sequences, T tokens of all documents in one row, H heads of this rank, D the size of a head.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_prism.core.patch import replaced
from megatron_prism.models.batch import Batch, packed_documents
from megatron_prism.parallel import host

Backend = Literal["flash", "fused", "unfused", "none"]
LOGGER = "DotProductAttention"  # of Transformer Engine: it says there why a backend was left out


@dataclass(frozen=True)
class AttentionChoice:
    """Transformer Engine's choice for a layer: flash (flash-attn), fused (cuDNN), unfused, or none that could run.

    detail: flash-attn's version, or cuDNN's sub-backend. call: the shapes of the call in words. reasons: why other backends were left out.
    """

    backend: Backend
    detail: str
    call: str
    reasons: tuple[str, ...]


class _Chosen(Exception):
    """Ends a layer's forward pass once it has chosen."""


def choice(chunks: Sequence[torch.nn.Module], batch: Batch, num_context_ranks: int) -> AttentionChoice | None:
    """Return Transformer Engine's choice for a microbatch like `batch`. None: no chunk of this rank has attention of Transformer Engine.

    All attention layers of a model are alike, so the first one is asked.
    """
    attention = next((module for chunk in chunks for module in chunk.modules() if _has_transformer_engine(module)), None)
    return None if attention is None else _ask(attention, batch, num_context_ranks)


def _has_transformer_engine(module: torch.nn.Module) -> bool:
    """Return whether this is an attention of Megatron-Core whose core is Transformer Engine's."""
    core = getattr(module, "core_attention", None)
    return any(kind.__name__ == "DotProductAttention" and kind.__module__.startswith("transformer_engine.") for kind in type(core).mro())


def _ask(attention: Any, batch: Batch, num_context_ranks: int) -> AttentionChoice:
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    documents = packed_documents(batch)
    size_B, size_S = batch["tokens"].shape
    sizes = (size_B * size_S,) if documents else (size_S // num_context_ranks, size_B)  # (T, H, D) or (S, B, H, D)
    size_H, groups = attention.num_attention_heads_per_partition, attention.num_query_groups_per_partition
    size_D, dtype = attention.hidden_size_per_attention_head, attention.config.params_dtype
    tensors = [
        torch.empty(*sizes, heads, size_D, dtype=dtype, device=host.device(), requires_grad=True) for heads in (size_H, groups, groups)
    ]
    answers: list[tuple[Any, ...]] = []

    def ask(parameters: Any) -> Any:
        answers.append(original(parameters))
        raise _Chosen

    original = utils.get_attention_backend
    with _reasons(utils.AttentionLogging) as reasons, replaced(utils, "get_attention_backend", ask), suppress(_Chosen):
        attention.core_attention(*tensors, None, attn_mask_type=attention.attn_mask_type, packed_seq_params=documents)
    if not answers:
        raise RuntimeError("Transformer Engine's attention did not choose a backend: this version has another way to choose")
    window = attention.config.window_size
    call = [
        f"{size_S} tokens",
        f"{size_H} heads of {size_D}, {groups} of keys",
        str(dtype).removeprefix("torch."),
        *([f"a window of {window[0] + 1}"] if window else []),
        *(["packed documents (thd)"] if documents else []),
        *([f"{num_context_ranks} context-parallel ranks, {attention.config.cp_comm_type}"] if num_context_ranks > 1 else []),
    ]
    return _read(answers[0], ", ".join(call), reasons)


def _read(answer: tuple[Any, ...], call: str, reasons: Sequence[str]) -> AttentionChoice:
    """Return an answer of get_attention_backend: (use flash, its version, use fused, its sub-backend, use unfused, what could run)."""
    with_flash, flash, with_fused, fused, with_unfused, _ = answer
    if with_flash:
        return AttentionChoice("flash", str(flash), call, tuple(reasons))
    if with_fused:
        return AttentionChoice("fused", f"sub-backend {int(fused)}", call, tuple(reasons))
    return AttentionChoice("unfused" if with_unfused else "none", "", call, tuple(reasons))


@contextmanager
def _reasons(settings: Any) -> Iterator[list[str]]:
    """Within the block, collect what Transformer Engine's attention says of its choice. It says so at the level `debug` alone."""
    lines: list[str] = []
    logger, kept = logging.getLogger(LOGGER), logging.getLogger(LOGGER).level
    collector = logging.Handler()
    collector.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    others = list(logger.handlers)
    logger.handlers, propagates = [collector], logger.propagate
    logger.propagate = False
    try:
        with replaced(settings, "_log_level", logging.DEBUG):
            yield lines
    finally:
        logger.handlers, logger.propagate = others, propagates
        logger.setLevel(kept)
        lines[:] = [line for line in lines if line.startswith("Disabling")]
