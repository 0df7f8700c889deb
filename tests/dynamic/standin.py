"""What Megatron-Core's dynamic engine needs of a GPU, in plain torch: flash-attn's two functions over a paged cache, and no Triton kernel.

parallel/host.py already stands in for torch.cuda. The engine itself, its context, its scheduler and the model are Megatron-Core's own. The two
functions follow flash-attn 2.7's interface as transformer/attention.py calls it, with the scale and the window that it passes.

Shape legend: N requests, T query tokens of all requests, H query heads, G key heads, D channels, P pages of the cache, B tokens of a page, K tokens
of one request.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch.nn import functional


@contextmanager
def installed() -> Iterator[None]:
    """Within the block, let Megatron-Core's dynamic engine run on this host."""
    from megatron.core.inference import communication_utils
    from megatron.core.inference.contexts import dynamic_context
    from megatron.core.transformer import attention

    from megatron_prism.generate import mcore

    allocate = dynamic_context.DynamicInferenceContext._allocate_memory_buffer

    def allocate_nan(self: Any) -> None:
        allocate(self)
        self.memory_buffer.fill_(torch.nan)  # a page that is read before it is written then shows

    with ExitStack() as stack:
        for owner, name, value in (
            (mcore, "absent", lambda *args: []),
            (attention, "flash_attn_varlen_func", flash_attn_varlen_func),
            (attention, "flash_attn_with_kvcache", flash_attn_with_kvcache),
            (attention, "is_fa_min_version", lambda *args, **kwargs: True),
            (dynamic_context.DynamicInferenceContext, "_allocate_memory_buffer", allocate_nan),
            (communication_utils, "_is_cuda", lambda tensor: None),  # it asserts that pipeline messages are on a device
            (dynamic_context, "triton_append_key_value_cache", None),  # Megatron-Core has the same in torch, for where Triton is absent
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


@contextmanager
def mixers_installed() -> Iterator[None]:
    """Within the block Mamba layers run on this host too: Megatron-Core's own Triton kernels, in a process with TRITON_INTERPRET=1.

    Two functions are ours: the one of causal_conv1d's, and Megatron-Core's kernel that asserts that its tensors are on a device. With
    MAMBA_DETERMINISTIC=1 the kernels take the first of their tilings, where the interpreter can time none.
    """
    from megatron.core.ssm import mamba_mixer
    from megatron.core.ssm.ops.causal_conv1d_triton import causal_conv1d_update
    from megatron.core.ssm.ops.mamba_ssm import selective_state_update

    assert os.environ["TRITON_INTERPRET"] == os.environ["MAMBA_DETERMINISTIC"] == "1"
    with ExitStack() as stack:
        for owner, name, value in (
            (mamba_mixer, "causal_conv1d_update", causal_conv1d_update),
            (mamba_mixer, "selective_state_update", selective_state_update),
            (mamba_mixer, "causal_conv1d_varlen_states", last_inputs),
            (mamba_mixer, "tensor_masked_update", update_rows),
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        yield


def last_inputs(x_TC: torch.Tensor, cu_seqlens: torch.Tensor, state_len: int) -> torch.Tensor:
    """Return the last state_len inputs (N, C, state_len) of each sequence, zeros before its first."""
    states = x_TC.new_zeros(len(cu_seqlens) - 1, x_TC.shape[1], state_len)
    for request, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        last_WC = x_TC[max(start, end - state_len) : end]
        states[request, :, state_len - len(last_WC) :] = last_WC.T
    return states


def update_rows(states: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Copy values into the rows of states; a row of -1 is padding."""
    states[rows[rows >= 0]] = values[rows >= 0]


def flash_attn_varlen_func(
    q_THD: Any, k_PBGD: Any, v_PBGD: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_q: int, max_k: int, **options: Any
) -> torch.Tensor:
    """Return the attention (T, H, D) of requests packed one after another: the last of each one's keys are its queries' own."""
    starts, lengths = cu_seqlens_q.tolist(), cu_seqlens_k.diff().tolist()
    assert max_q == max(map(int, cu_seqlens_q.diff())) and max_k == max(lengths)
    out_THD = torch.zeros_like(q_THD)
    for request, length in enumerate(lengths):
        rows = slice(starts[request], starts[request + 1])
        if length:
            out_THD[rows] = _attend(q_THD[rows], k_PBGD, v_PBGD, options["block_table"][request], length, options)
    return out_THD


def flash_attn_with_kvcache(q: Any, k_cache: Any, v_cache: Any, cache_seqlens: Any, **options: Any) -> torch.Tensor:
    """Return the attention (N, 1, H, D) of each request's last token."""
    out = torch.zeros_like(q)
    for request, length in enumerate(cache_seqlens.tolist()):
        if length:
            out[request] = _attend(q[request], k_cache, v_cache, options["block_table"][request], length, options)
    return out


def _attend(q_THD: Any, k_PBGD: Any, v_PBGD: Any, pages: Any, length_K: int, options: dict[str, Any]) -> torch.Tensor:
    assert options["causal"] and not options.get("return_attn_probs") and not options.get("return_softmax_lse")
    held = pages[: -(-length_K // k_PBGD.shape[1])]
    assert int(held.min()) >= 0, "a request attends to a page that it does not have"
    k_KGD, v_KGD = (pool[held].flatten(0, 1)[:length_K] for pool in (k_PBGD, v_PBGD))
    before_TK = torch.arange(length_K - len(q_THD), length_K)[:, None] - torch.arange(length_K)
    seen_TK = before_TK >= 0
    if options["window_size"][0] >= 0:
        seen_TK &= before_TK <= options["window_size"][0]
    out_HTD = functional.scaled_dot_product_attention(
        *(part.transpose(0, 1)[None] for part in (q_THD, k_KGD, v_KGD)),
        attn_mask=seen_TK,
        scale=options["softmax_scale"],
        enable_gqa=True,
    )[0]
    return out_HTD.transpose(0, 1)
