"""Megatron-Core's local attention for documents packed into a row: each token attends to its own document alone.

On CUDA it is Transformer Engine's `thd` attention, which Megatron's own local class refuses. All around it (the fold of the row, rotary
positions by document) is Megatron's thd path on both, so that a host walks the way of the GPU.
"""

from __future__ import annotations

from typing import Any

import torch


def core_attention() -> type:
    """Return DotProductAttention that also takes PackedSeqParams in thd format; without them it is the parent's.

    Shapes, packed: query, key and value (T, heads, channels), T the tokens of all documents; returns (T, 1, heads * channels).
    Memory is O(T * T): for a host's tests and tiny models.
    """
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class DocumentAttention(DotProductAttention):
        def forward(
            self, query: Any, key: Any, value: Any, attention_mask: Any, attn_mask_type: Any = None, attention_bias: Any = None,
            packed_seq_params: Any = None,
        ) -> torch.Tensor:  # fmt: skip
            if packed_seq_params is None:
                return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias)
            softmax = self.scale_mask_softmax
            window = softmax.window_size
            is_hidden = hidden(packed_seq_params.cu_seqlens_q, window)
            softmax.window_size = None  # with one it puts a mask of its own in place of the one it is given
            try:
                return super().forward(query[:, None], key[:, None], value[:, None], is_hidden[None, None], attn_mask_type, attention_bias)
            finally:
                softmax.window_size = window

    return DocumentAttention


def hidden(cu_seqlens: torch.Tensor, window: tuple[int, int] | None) -> torch.Tensor:
    """Return what each token of a row (T, T) does not attend to: later tokens, other documents, those before a causal window."""
    from megatron.core.transformer.utils import get_default_causal_mask, get_sliding_window_causal_mask

    size_T = int(cu_seqlens[-1])
    outside = get_default_causal_mask(size_T) if window is None else get_sliding_window_causal_mask(size_T, size_T, window)
    document_T = torch.repeat_interleave(torch.arange(cu_seqlens.numel() - 1, device=cu_seqlens.device), cu_seqlens.diff())
    return outside | (document_T[:, None] != document_T[None, :])
