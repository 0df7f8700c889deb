"""Mamba-2 in plain torch for a host without CUDA: the five kernels that Megatron-Core's MambaMixer calls, with their signatures.

Shape legend: B batch, L length, D channels, W taps of the convolution, H heads, P channels per head, G groups of heads that share
their B and C, R heads per group, N state. Scans run in fp32 (fp64 for fp64 inputs), whatever the input's dtype. Memory is
O(L * chunk_size * H): for tests and tiny models, not for 8k training.

`seq_idx` (B, L) numbers the documents packed into a row, ascending from 0. Neither the convolution nor the state crosses from one document
to the next. A given initial state belongs to document 0.
Source: the equations of "Transformers are SSMs" (arXiv 2405.21060), sections 6 and 8; signatures and conventions of the packages
mamba_ssm (ops/triton/ssd_combined.py, selective_state_update.py, layernorm_gated.py) and causal_conv1d.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

LIMIT = (0.0, math.inf)  # of the time step, after softplus


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Convolve each channel causally. Shapes: x (B, D, L), weight (D, W), initial_states (B, D, W - 1)."""
    taps = weight.shape[1]
    past = x.new_zeros(*x.shape[:2], taps - 1) if initial_states is None else initial_states.to(x.dtype)
    row = torch.cat([past, x], dim=-1).to(_compute_dtype(x))
    out = torch.zeros_like(row[..., taps - 1 :]) if bias is None else bias.to(row.dtype)[:, None].expand_as(x)
    for back in range(taps):
        shifted = row[..., taps - 1 - back : row.shape[-1] - back]
        if seq_idx is not None and back:
            before = functional.pad(seq_idx, (back, 0), value=0 if initial_states is not None else -1)[:, : seq_idx.shape[1]]
            shifted = shifted * (before == seq_idx)[:, None]
        out = out + shifted * weight[:, taps - 1 - back, None].to(row.dtype)
    return _activate(out, activation).to(x.dtype)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Convolve one new token, and shift it into `conv_state` in place. Shapes: x (B, D), conv_state (B, D, W), weight (D, W).

    conv_state_indices: the row of conv_state for each row of x. -1 marks padding, whose output is 0. Fast where conv_state's channels are
    contiguous in memory.
    """
    if conv_state_indices is not None:
        rows, is_token = _cache_rows(conv_state_indices)
        part = conv_state[rows]
        out = causal_conv1d_update(x, part, weight, bias, activation)
        conv_state[rows[is_token]] = part[is_token]
        return out.masked_fill(~is_token[:, None], 0)
    kind, state_BWD = _compute_dtype(x), conv_state.transpose(1, 2)
    new_BWD = torch.cat([state_BWD[:, 1:], x[:, None].to(conv_state.dtype)], dim=1)
    state_BWD.copy_(new_BWD)
    out = (new_BWD.to(kind) * weight.t().to(kind)).sum(1)
    return _activate(out if bias is None else out + bias.to(kind), activation).to(x.dtype)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = LIMIT,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Any:
    """Run the state-space recurrence over a row, chunk by chunk. Within a chunk it is a masked matrix product.

    s_t = exp(dt_t A) s_(t-1) + dt_t x_t B_t, y_t = C_t s_t + D x_t, times silu(z_t) where z is given.
    Shapes: x and z (B, L, H, P), dt (B, L, H), A (H), B and C (B, L, G, N), D (H) or (H, P), states (B, H, P, N).
    Returns y, or (y, final states of each row's last document, in the scan's dtype).
    """
    assert not return_varlen_states, "states of each packed document: only mamba_ssm's own kernels return them"
    kind = _compute_dtype(x)
    size_B, size_L, size_H, size_P = x.shape
    size_G, size_N = B.shape[2:]
    by_group = (size_G, size_H // size_G)
    step_BLH = _time_step(dt.to(kind), dt_bias, dt_softplus, dt_limit)
    decay_BLGR = (step_BLH.double() * A.double()).unflatten(2, by_group)  # fp64, since sums of many small numbers follow
    input_BLGRP = (x.to(kind) * step_BLH[..., None]).unflatten(2, by_group)
    state_BHPN = x.new_zeros(size_B, size_H, size_P, size_N) if initial_states is None else initial_states
    state_BGRPN = state_BHPN.to(kind).unflatten(1, by_group)
    seq_BL = torch.zeros(size_B, size_L, dtype=torch.long, device=x.device) if seq_idx is None else seq_idx.long()
    owner_B, outputs = torch.zeros_like(seq_BL[:, 0]), []  # the document that the state belongs to
    for start in range(0, size_L, chunk_size):
        part = slice(start, start + chunk_size)
        out, state_BGRPN = _scan_chunk(
            input_BLGRP[:, part], decay_BLGR[:, part], B[:, part].to(kind), C[:, part].to(kind), state_BGRPN, seq_BL[:, part], owner_B
        )
        outputs.append(out)
        owner_B = seq_BL[:, part][:, -1]
    y = torch.cat(outputs, dim=1).flatten(2, 3)
    if D is not None:
        y = y + x.to(kind) * (D.to(kind) if D.dim() == 2 else D.to(kind)[:, None])
    if z is not None:
        y = y * functional.silu(z.to(kind))
    y = y.to(x.dtype)
    return (y, state_BGRPN.flatten(1, 2)) if return_final_states else y


def _scan_chunk(
    input_BLGRP: Tensor, decay_BLGR: Tensor, B_BLGN: Tensor, C_BLGN: Tensor, state_BGRPN: Tensor, seq_BL: Tensor, owner_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Return one chunk's output (B, L, G, R, P) and the state after it. M: the tokens that L looks back to."""
    kind = input_BLGRP.dtype
    total_BGRL = decay_BLGR.cumsum(1).permute(0, 2, 3, 1)
    same_BLM = (seq_BL[:, :, None] == seq_BL[:, None, :]).tril()[:, None, None]
    between_BGRLM = (total_BGRL[..., :, None] - total_BGRL[..., None, :]).masked_fill(~same_BLM, -math.inf).exp().to(kind)
    score_BGLM = torch.einsum("blgn,bmgn->bglm", C_BLGN, B_BLGN)
    within = torch.einsum("bgrlm,bmgrp->blgrp", score_BGLM[:, :, None] * between_BGRLM, input_BLGRP)
    is_owner_BL = seq_BL == owner_B[:, None]
    carried_BGRL = total_BGRL.exp().to(kind) * is_owner_BL[:, None, None]
    before = torch.einsum("blgn,bgrpn,bgrl->blgrp", C_BLGN, state_BGRPN, carried_BGRL)
    to_end_BLGR = between_BGRLM[..., -1, :].permute(0, 3, 1, 2)
    new = torch.einsum("blgn,blgrp->bgrpn", B_BLGN, input_BLGRP * to_end_BLGR[..., None])
    return within + before, new + state_BGRPN * carried_BGRL[..., -1, None, None]


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """Run the recurrence over one new token, and update `state` in place.

    Shapes: state (B, H, P, N), x, dt and z (B, H, P), A (H, P, N), B and C (B, G, N), D and dt_bias (H, P).
    state_batch_indices: the row of state for each row of x. -1 marks padding, whose output is 0. Fast where dt, A and dt_bias hold one
    number per head (expanded, stride 0).
    """
    if state_batch_indices is not None:
        rows, is_token = _cache_rows(state_batch_indices)
        part = state[rows]
        out = selective_state_update(part, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
        state[rows[is_token]] = part[is_token]
        return out.masked_fill(~is_token[:, None, None], 0)
    kind, by_group = _compute_dtype(x), (B.shape[1], x.shape[1] // B.shape[1])
    if dt.stride(-1) == 0 and A.stride()[-2:] == (0, 0) and (dt_bias is None or dt_bias.stride(-1) == 0):
        dt, A, dt_bias = dt[..., :1], A[:, :1, :1], None if dt_bias is None else dt_bias[:, :1]
    step = _time_step(dt.to(kind), dt_bias, dt_softplus, LIMIT)
    new = state if state.dtype == kind else state.to(kind)
    new.mul_((step[..., None] * A.to(kind)).exp_())
    state_BGRPN = new.unflatten(1, by_group)
    B_BG1N, C_BG1N = (part.to(kind)[:, :, None] for part in (B, C))
    state_BGRPN.addcmul_((step * x.to(kind)).unflatten(1, by_group)[..., None], B_BG1N[:, :, None])
    y = (C_BG1N @ state_BGRPN.flatten(2, 3).transpose(2, 3)).view(x.shape)
    if new is not state:
        state.copy_(new)
    y = y if D is None else y + x.to(kind) * D.to(kind)
    y = y if z is None else y * functional.silu(z.to(kind))
    return y.to(x.dtype)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = LIMIT,
    return_final_states: bool = False,
    activation: str = "silu",
    *,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Any:
    """Split a mixer's input projection into z, x, B, C and dt, convolve, scan, and gate with z. MambaMixer trains through this.

    Shapes: zxbcdt (B, L, 2 H P + 2 G N + H), conv1d_weight (H P + 2 G N, W), D (H) or (H, P). Returns (B, L, H P).
    norm_before_gate has no effect here: MambaMixer applies its norm outside.
    """
    size_H = dt_bias.shape[0]
    inner = size_H * (D.shape[1] if headdim is None else headdim)
    z, xBC, dt = zxbcdt.split([inner, conv1d_weight.shape[0], size_H], dim=-1)
    xBC = causal_conv1d_fn(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation).transpose(1, 2)
    x, B, C = xBC.split([inner, *[(conv1d_weight.shape[0] - inner) // 2] * 2], dim=-1)
    scanned = mamba_chunk_scan_combined(
        x.unflatten(-1, (size_H, -1)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        chunk_size,
        D=D,
        z=z.unflatten(-1, (size_H, -1)),
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
    )
    return (scanned[0].flatten(2), scanned[1]) if return_final_states else scanned.flatten(2)


class GatedRMSNorm(torch.nn.Module):
    """RMSNorm over each group of channels, gated by silu(z) after the norm, or before it (as in MambaMixer)."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size or hidden_size, norm_before_gate
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        kind = _compute_dtype(x)
        gate = 1.0 if z is None else functional.silu(z.to(kind))
        value = x.to(kind) if self.norm_before_gate else x.to(kind) * gate
        groups = value.unflatten(-1, (-1, self.group_size))
        normed = (groups * (groups.square().mean(-1, keepdim=True) + self.eps).rsqrt()).flatten(-2) * self.weight.to(kind)
        return (normed * gate if self.norm_before_gate else normed).to(x.dtype)


def _cache_rows(indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cache row of each token of the batch (any row for padding), and a mask of the real tokens."""
    return indices.long().clamp(min=0), indices >= 0


def _time_step(dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float]) -> Tensor:
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return (functional.softplus(dt) if softplus else dt).clamp(*limit)


def _activate(x: Tensor, activation: str | None) -> Tensor:
    assert activation in (None, "silu", "swish"), activation
    return x if activation is None else functional.silu(x)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
