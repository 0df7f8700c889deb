"""A model's residual blocks on plain tensors: attention, MLP and Mamba mixer over a cache, without Megatron's modules around them.

Each block adds out(mix(norm(hidden))) to the hidden states. Megatron's transformer layer is two blocks. Tokens are packed, (T, D): in
prefill T = R x L, with each row padded on the right, so no token's position is shifted; in decoding T = R.
Shape legend: T tokens, R rows, L tokens of a row in a prefill, K tokens of a row so far, Z rows and groups, D hidden, Y a block's channels before its output
projection, G groups of heads that share a key (or a mixer's B and C), J heads per group, H heads, P channels per head, F half of P,
C channels of a convolution, W its taps, N state. Heads, groups and channels are this tensor-parallel rank's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

LARGE = 2**21  # multiplications of a matrix product; below it oneDNN's call costs more than it gains
NO_TIME = -1e4  # time step before softplus: softplus makes it 0, so padding leaves the state unchanged


def linear(x_TY: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias; large products in fp32 on a host by oneDNN, which has twice MKL's speed on AMD processors.

    bench/README.md has the figures; torch's own linear takes MKL for fp32.
    """
    if x_TY.is_cpu and x_TY.dtype == torch.float32 and x_TY.shape[0] * weight.numel() >= LARGE and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x_TY, weight, bias, "none", [], "")
    return functional.linear(x_TY, weight, bias)


@dataclass(frozen=True)
class State:
    """The shape of what a cache holds per row for a block. The second dimension counts tokens if has_tokens."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    has_tokens: bool = False


@dataclass(frozen=True)
class Call:
    """One forward pass over the first R rows of a cache: the values that all blocks share.

    start: the position of a prefill's first token. None: each row decodes one token. length_R: the tokens of each row of a prefill, without
    padding. position_R: the position that each row decodes. size_K: the tokens in the longest row afterwards.
    mask: added to a token's scores, -inf for the keys it does not see, (R, 1, 1, K) or in prefill (L, K). cos_TP and sin_TP: cosines and
    sines of the rotary angles, with the first half of sin negated.
    """

    num_rows: int
    size_L: int
    start: int | None
    size_K: int
    position_R: Tensor
    length_R: Tensor | None
    row_R: Tensor
    mask: Tensor
    cos_TP: Tensor | None
    sin_TP: Tensor | None


def prefill(start: int, lengths: list[int], size_L: int, rules: Positions, device: torch.device) -> Call:
    """Return the pass that reads tokens start to start + L of rows 0, 1, ... lengths: the number of these tokens in each row."""
    position_L = torch.arange(start, start + size_L, device=device)
    mask_LK = rules.mask(position_L, start + size_L)
    angles = rules.angles(position_L)
    cos_TP, sin_TP = (part if part is None else part.repeat(len(lengths), 1) for part in angles)
    row_R, length_R = torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device)
    return Call(len(lengths), size_L, start, start + size_L, position_L[:1], length_R, row_R, mask_LK, cos_TP, sin_TP)


def decode(positions: list[int], rules: Positions, device: torch.device) -> Call:
    """Return the pass that reads one token of each of rows 0, 1, ... positions: the token's position in each row."""
    position_R, size_K = torch.tensor(positions, device=device), max(positions) + 1
    row_R = torch.arange(len(positions), device=device)
    return Call(
        len(positions), 1, None, size_K, position_R, None, row_R, rules.mask(position_R, size_K)[:, None, None], *rules.angles(position_R)
    )


@dataclass(frozen=True)
class Positions:
    """How a model uses positions: rotary frequencies (inverse_F; None: no rotary positions) and a window (None: a token sees all before it).

    dtype: the model's. rotary_dtype: that of the rotation. Transformer Engine's kernel rotates in fp32 and rounds once, Megatron's own code in the model's.
    """

    inverse_F: Tensor | None
    window: int | None
    dtype: torch.dtype
    rotary_dtype: torch.dtype

    def angles(self, position_T: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return cosines and sines of the rotary angles, with Megatron's bits (rotary_pos_embedding.py, get_freqs_non_repeated)."""
        if self.inverse_F is None:
            return None, None
        angle_TF = torch.outer(position_T.to(self.inverse_F.dtype), self.inverse_F)
        cos_TF, sin_TF = angle_TF.cos().to(self.rotary_dtype), angle_TF.sin().to(self.rotary_dtype)
        return torch.cat([cos_TF, cos_TF], -1), torch.cat([-sin_TF, sin_TF], -1)

    def mask(self, position_T: Tensor, size_K: int) -> Tensor:
        position_T1, key_K = position_T[:, None], torch.arange(size_K, device=position_T.device)
        hidden_TK = key_K > position_T1
        if self.window is not None:
            hidden_TK |= key_K <= position_T1 - self.window
        return torch.zeros(hidden_TK.shape, dtype=self.dtype, device=position_T.device).masked_fill_(hidden_TK, -torch.inf)


def rotate(x_TGJP: Tensor, call: Call) -> Tensor:
    """Rotate queries and keys by their tokens' angles. Source: rope_utils.py, _apply_rotary_pos_emb_bshd."""
    if call.cos_TP is None or call.sin_TP is None:
        return x_TGJP
    turned_TGJP = torch.addcmul(x_TGJP * call.cos_TP[:, None, None], x_TGJP.roll(x_TGJP.shape[-1] // 2, -1), call.sin_TP[:, None, None])
    return turned_TGJP.to(x_TGJP.dtype)


@dataclass(frozen=True)
class Attention:
    """Causal attention with grouped queries. qkv holds, group by group, the queries of J heads, a key and a value."""

    norm_D: Tensor
    qkv: Tensor
    bias: Tensor | None
    out_DY: Tensor
    num_groups: int
    head_dim: int
    scale: float

    def states(self, size_K: int) -> tuple[State, ...]:
        """Return the states: keys and values. Shape per row: (G, K, P)."""
        return (State((self.num_groups, size_K, self.head_dim), self.qkv.dtype, has_tokens=True),) * 2

    def mix(self, x_TD: Tensor, call: Call, state: tuple[Tensor, ...]) -> Tensor:
        qkv_TGJP = linear(x_TD, self.qkv, self.bias).view(len(x_TD), self.num_groups, -1, self.head_dim)
        turned_TGJP = rotate(qkv_TGJP[:, :, :-1], call)
        query_TGJP, key_TGP, value_TGP = turned_TGJP[:, :, :-1], turned_TGJP[:, :, -1], qkv_TGJP[:, :, -1]
        if call.start is None:
            out = self._decode(query_TGJP, key_TGP, value_TGP, call, *state)
        else:
            out = self._prefill(query_TGJP, key_TGP, value_TGP, call, *state)
        return out.reshape(len(x_TD), -1)

    def _decode(self, query: Tensor, key: Tensor, value: Tensor, call: Call, keys: Tensor, values: Tensor) -> Tensor:
        keys[call.row_R, :, call.position_R], values[call.row_R, :, call.position_R] = key, value
        keys, values = (part[: call.num_rows, :, : call.size_K] for part in (keys, values))
        return functional.scaled_dot_product_attention(query, keys, values, attn_mask=call.mask, scale=self.scale)

    def _prefill(self, query: Tensor, key: Tensor, value: Tensor, call: Call, keys: Tensor, values: Tensor) -> Tensor:
        assert call.start is not None
        rows = (call.num_rows, call.size_L)
        for cached, new in ((keys, key), (values, value)):
            cached[: call.num_rows, :, call.start : call.size_K] = new.unflatten(0, rows).transpose(1, 2)
        # a group is a row of its own, whose J heads share the key without a copy: with enable_gqa and a mask CUDA has no fused kernel
        query_ZJLP = query.unflatten(0, rows).permute(0, 2, 3, 1, 4).flatten(0, 1)
        key_ZJKP, value_ZJKP = (
            part[: call.num_rows, :, : call.size_K].flatten(0, 1)[:, None].expand(-1, query.shape[2], -1, -1) for part in (keys, values)
        )
        out_ZJLP = functional.scaled_dot_product_attention(query_ZJLP, key_ZJKP, value_ZJKP, attn_mask=call.mask, scale=self.scale)
        return out_ZJLP.unflatten(0, (call.num_rows, -1)).permute(0, 3, 1, 2, 4)


@dataclass(frozen=True)
class MLP:
    """SwiGLU (gate and up in one matrix, the gate first) or squared ReLU."""

    norm_D: Tensor
    fc1: Tensor
    out_DY: Tensor
    is_gated: bool

    def states(self, size_K: int) -> tuple[State, ...]:
        return ()

    def mix(self, x_TD: Tensor, call: Call, state: tuple[Tensor, ...]) -> Tensor:
        inner = linear(x_TD, self.fc1)
        if not self.is_gated:
            return inner.relu_().square_()
        gate_TY, up_TY = inner.chunk(2, -1)
        return functional.silu(gate_TY).mul_(up_TY)


@dataclass(frozen=True)
class Mamba:
    """Megatron's MambaMixer, with the kernels of models/mamba.py. Prefill uses the chunked scan (padding keeps the state), decoding the recurrence."""

    norm_D: Tensor
    in_proj: Tensor
    conv_CW: Tensor
    conv_bias_C: Tensor
    A_H: Tensor
    D_H: Tensor
    dt_bias_H: Tensor
    gate_norm_Y: Tensor
    out_DY: Tensor
    num_groups: int
    head_dim: int
    state_dim: int
    chunk_size: int
    kernels: Any = field(repr=False)

    def states(self, size_K: int) -> tuple[State, ...]:
        """Return the states: the inputs of the last W tokens, and the state-space state in fp32. Shapes per row: (W, C), (H, P, N)."""
        size_C, size_W = self.conv_CW.shape
        return State((size_W, size_C), self.in_proj.dtype), State((len(self.A_H), self.head_dim, self.state_dim), torch.float32)

    def mix(self, x_TD: Tensor, call: Call, state: tuple[Tensor, ...]) -> Tensor:
        inner, size_C = self.out_DY.shape[1], len(self.conv_CW)
        z_TY, xBC_TC, dt_TH = linear(x_TD, self.in_proj).split([inner, size_C, len(self.A_H)], -1)
        conv_RWC, ssm_RHPN = (part[: call.num_rows] for part in state)
        step = self._decode if call.start is None else self._prefill
        return self._gated_norm(step(xBC_TC, dt_TH, call, conv_RWC, ssm_RHPN), z_TY)

    def _parts(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split the convolution's output into x (..., H, P), B and C (..., G, N)."""
        shared = self.num_groups * self.state_dim
        x, B, C = xBC.split([len(self.A_H) * self.head_dim, shared, shared], -1)
        heads, groups = (len(self.A_H), self.head_dim), (self.num_groups, self.state_dim)
        return x.unflatten(-1, heads), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _decode(self, xBC_RC: Tensor, dt_RH: Tensor, call: Call, conv_RWC: Tensor, ssm_RHPN: Tensor) -> Tensor:
        xBC_RC = self.kernels.causal_conv1d_update(xBC_RC, conv_RWC.transpose(1, 2), self.conv_CW, self.conv_bias_C, "silu")
        x_RHP, B_RGN, C_RGN = self._parts(xBC_RC)
        dt, A, D, dt_bias = (part[..., None].expand(*part.shape, self.head_dim) for part in (dt_RH, self.A_H, self.D_H, self.dt_bias_H))
        A = A[..., None].expand(*A.shape, self.state_dim)  # stride 0: one number per head, which both kernels recognise
        y_RHP = self.kernels.selective_state_update(ssm_RHPN, x_RHP, dt, A, B_RGN, C_RGN, D, dt_bias=dt_bias, dt_softplus=True)
        return y_RHP.flatten(1)

    def _prefill(self, xBC_TC: Tensor, dt_TH: Tensor, call: Call, conv_RWC: Tensor, ssm_RHPN: Tensor) -> Tensor:
        assert call.length_R is not None
        rows, size_W = (call.num_rows, call.size_L), conv_RWC.shape[1]
        xBC_RLC, dt_RLH = xBC_TC.unflatten(0, rows).contiguous(), dt_TH.unflatten(0, rows)
        is_padding_RL = torch.arange(call.size_L, device=xBC_TC.device) >= call.length_R[:, None]
        dt_RLH = dt_RLH.masked_fill(is_padding_RL[..., None], NO_TIME)
        with_past_RWC = torch.cat([conv_RWC, xBC_RLC], 1)
        last_RW = call.length_R[:, None] + torch.arange(size_W, device=xBC_TC.device)
        xBC_RCL = self.kernels.causal_conv1d_fn(
            xBC_RLC.transpose(1, 2), self.conv_CW, self.conv_bias_C, initial_states=conv_RWC[:, 1:].transpose(1, 2), activation="silu"
        )
        conv_RWC.copy_(with_past_RWC[call.row_R[:, None], last_RW])
        x, B, C = (part.contiguous() for part in self._parts(xBC_RCL.transpose(1, 2)))
        own = {"D": self.D_H, "dt_bias": self.dt_bias_H, "initial_states": ssm_RHPN, "dt_softplus": True, "return_final_states": True}
        y_RLHP, after_RHPN = self.kernels.mamba_chunk_scan_combined(x, dt_RLH, self.A_H, B, C, self.chunk_size, **own)
        ssm_RHPN.copy_(after_RHPN)
        return y_RLHP.flatten(0, 1).flatten(1)

    def _gated_norm(self, y_TY: Tensor, z_TY: Tensor) -> Tensor:
        """RMSNorm over each group's channels, after the gate. Source: mamba_mixer.py, ExtendedRMSNorm (norm_before_gate is False)."""
        gated_TGY = (y_TY.float() * functional.silu(z_TY.float())).unflatten(1, (self.num_groups, -1))
        normed_TGY = functional.rms_norm(gated_TGY, gated_TGY.shape[-1:], eps=1e-5)
        return (normed_TGY.flatten(1) * self.gate_norm_Y).to(y_TY.dtype)


Block = Attention | MLP | Mamba
