"""Logits and loss of a part of a rank's tokens at a time, so that their memory does not grow with the sequence.

At 131,072 tokens the logits of a vocabulary of 128,256 take 31 GiB in bf16 and another 63 GiB in fp32 within the loss. Here each part's logits
live for that part alone, in the forward pass and, computed again, in the backward pass. The output layer, with its hooks, and the loss are the
model's own.
Shape legend: B sequences, S tokens of a sequence on this rank, P tensor-parallel ranks that each hold S / P tokens under sequence parallelism,
else 1; V this rank's part of the vocabulary, H the hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from megatron_prism.core.patch import replaced

ValuesOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # labels (B, S), their logits (S, B, V) -> values (..., B, S)


class DeferredLogits:
    """The logits (S, B, V) that an output layer would give. They are computed when they are asked for."""

    def __init__(self, layer: Any, hidden_SBH: torch.Tensor, options: dict[str, Any]):
        self._layer, self._hidden_SBH, self._options = layer, hidden_SBH, options

    def transpose(self, first: int, second: int) -> torch.Tensor:
        """Return the whole logits, transposed: what a model without labels asks for."""
        return self._of(self._hidden_SBH).transpose(first, second)

    def values(self, labels_BS: torch.Tensor, values_of: ValuesOf, chunk_tokens: int) -> torch.Tensor:
        """Return what values_of gives of every token (..., B, S), computed for `chunk_tokens` tokens at a time."""
        held_S, size_B = self._hidden_SBH.shape[:2]
        size_P = labels_BS.shape[1] // held_S
        labels_PSB = labels_BS.transpose(0, 1).reshape(size_P, held_S, size_B)
        step = max(1, chunk_tokens // (size_B * size_P))

        def part(hidden_SBH: torch.Tensor, labels_PSB: torch.Tensor) -> torch.Tensor:
            values_BS = values_of(labels_PSB.flatten(0, 1).transpose(0, 1), self._of(hidden_SBH))
            return values_BS.transpose(-1, -2).unflatten(-2, labels_PSB.shape[:2])

        parts_PSB = [
            checkpoint(part, hidden_SBH, labels_PSB, use_reentrant=False, preserve_rng_state=False)
            for hidden_SBH, labels_PSB in zip(self._hidden_SBH.split(step), labels_PSB.split(step, dim=1), strict=True)
        ]
        return torch.cat(parts_PSB, dim=-2).flatten(-3, -2).transpose(-1, -2).contiguous()

    def _of(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        return self._layer(hidden_SBH, **self._options)[0]


class DeferringLayer:
    """Stands before a model's output layer and defers its work. Everything else of the layer is the layer's own."""

    def __init__(self, layer: Any):
        self.layer = layer

    def __call__(self, hidden_SBH: torch.Tensor, **options: Any) -> tuple[DeferredLogits, None]:
        return DeferredLogits(self.layer, hidden_SBH, options), None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


@dataclass(frozen=True)
class ChunkedLoss:
    """Stands in for a model's loss, and computes deferred logits in parts."""

    values_of: ValuesOf
    chunk_tokens: int

    def __call__(self, labels_BS: torch.Tensor, logits: DeferredLogits) -> torch.Tensor:
        return logits.values(labels_BS, self.values_of, self.chunk_tokens)


def install(model: Any, chunk_tokens: int) -> None:
    """Let a model (GPTModel, MambaModel, HybridModel) with an output layer compute its loss in parts of `chunk_tokens` tokens.

    The attribute `output_layer` of the instance stands before the registered module of that name, which stays where parameters and checkpoints
    look for it.
    """
    vars(model)["output_layer"] = DeferringLayer(model.output_layer)
    model.compute_language_model_loss = ChunkedLoss(model.compute_language_model_loss, chunk_tokens)


@contextmanager
def replaced_loss(model: Any, instead_of: Callable[[ValuesOf], ValuesOf]) -> Iterator[None]:
    """Within the block, let a model with labels return what stands instead of its loss (..., B, S): of all tokens, or of each part of them."""
    loss = model.compute_language_model_loss
    other = replace(loss, values_of=instead_of(loss.values_of)) if isinstance(loss, ChunkedLoss) else instead_of(loss)
    with replaced(model, "compute_language_model_loss", other):
        yield
