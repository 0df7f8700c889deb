"""Megatron-Core's local attention, extended by two things that it refuses: documents packed into a row, and context parallelism.

On CUDA Transformer Engine does both. Everything around attention (folding the row, which tokens a rank holds, rotary positions) is
Megatron's own code on both, so a host follows the GPU's path. Memory is O(S * S): for a host's tests and tiny models.
Shape legend: S tokens of a sequence on this rank, K of all ranks, T tokens of all documents in a row.
"""

from __future__ import annotations

import copy
from typing import Any

import torch


def core_attention() -> type:
    """Return a DotProductAttention that also accepts PackedSeqParams in thd format, or a context-parallel rank's part of a sequence.

    Shapes, packed: query, key and value (T, heads, channels); returns (T, 1, heads * channels). Otherwise (S, B, heads, channels).
    """
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class LocalAttention(DotProductAttention):  # type: ignore[misc]  # Megatron-Core is untyped here
        def __init__(self, config: Any, *args: Any, **kwargs: Any):
            alone = copy.copy(config)
            alone.context_parallel_size = 1  # the parent class refuses any other value
            super().__init__(alone, *args, **kwargs)
            self.config = config

        def forward(
            self,
            query: Any,
            key: Any,
            value: Any,
            attention_mask: Any,
            attn_mask_type: Any = None,
            attention_bias: Any = None,
            packed_seq_params: Any = None,
        ) -> torch.Tensor:
            softmax, group = self.scale_mask_softmax, self.pg_collection.cp
            window, cp = softmax.window_size, group.size()
            if packed_seq_params is not None:
                hidden = outside_document(packed_seq_params.cu_seqlens_q, window)
                query, key, value = query[:, None], key[:, None], value[:, None]
            elif cp > 1:
                positions = [zigzag(query.shape[0], rank, cp, query.device) for rank in range(cp)]
                hidden = unseen(positions[group.rank()], torch.cat(positions), window)
                key, value = gathered(key, group), gathered(value, group)
            else:
                return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias)
            softmax.window_size = None  # with a window it replaces the given mask by its own
            try:
                return super().forward(query, key, value, hidden, attn_mask_type, attention_bias)
            finally:
                softmax.window_size = window

    return LocalAttention


def unseen(query_S: torch.Tensor, key_K: torch.Tensor, window: tuple[int, int] | None) -> torch.Tensor:
    """Return the tokens that each token does not attend to, as a mask (S, K): later ones, and those before a causal window."""
    before_SK = query_S[:, None] - key_K[None, :]
    later_SK = before_SK < 0
    return later_SK if window is None else later_SK | (before_SK > window[0])


def outside_document(cu_seqlens: torch.Tensor, window: tuple[int, int] | None) -> torch.Tensor:
    """Return the tokens of a row that each token does not attend to, as a mask (T, T): those of `unseen`, and other documents."""
    position_T = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    document_T = torch.repeat_interleave(torch.arange(cu_seqlens.numel() - 1, device=cu_seqlens.device), cu_seqlens.diff())
    return unseen(position_T, position_T, window) | (document_T[:, None] != document_T[None, :])


def zigzag(size_S: int, rank: int, cp: int, device: Any = None) -> torch.Tensor:
    """Return the positions of a context-parallel rank's tokens. Of 2 * cp chunks it holds chunk `rank` from the front and from the back.

    So causal attention is equal work on each rank (get_batch_on_this_cp_rank in megatron/core/utils.py).
    """
    chunks = torch.arange(size_S * cp, device=device).view(2 * cp, -1)
    return torch.cat([chunks[rank], chunks[2 * cp - 1 - rank]])


def gathered(part: torch.Tensor, group: Any) -> torch.Tensor:
    """Return all ranks' tokens, concatenated (K, ...). A token's gradient is the sum over all ranks' queries."""
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    return gather_from_sequence_parallel_region(part.contiguous(), group=group)
