"""The plain-torch Mamba-2 kernels: against a recurrence token by token in fp64, against transformers, and token after token.

The third oracle, mamba_ssm's own Triton kernels under Triton's interpreter, is tests/parity/test_mamba_kernels.py (opt-in: slow).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_prism.models import ssd

SIZE_B, HEADS, HEAD_DIM, STATE, TAPS = 2, 4, 8, 6, 4
FP32 = 3e-6  # relative, by norm: as the prototypes of these kernels reached
LENGTHS = [1, 3, 31, 32, 33, 70, 96]
DOCUMENTS = {0: (7, 33, 64), 1: (1, 50)}  # where the next document begins, by row


def inputs(length: int, groups: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": draw(SIZE_B, length, HEADS, HEAD_DIM).to(dtype),
        "dt": draw(SIZE_B, length, HEADS).to(dtype),
        "A": -(0.5 + 15 * torch.rand(HEADS, generator=generator, dtype=torch.float64)).to(dtype),
        "B": draw(SIZE_B, length, groups, STATE).to(dtype),
        "C": draw(SIZE_B, length, groups, STATE).to(dtype),
        "D": draw(HEADS).to(dtype),
        "z": draw(SIZE_B, length, HEADS, HEAD_DIM).to(dtype),
        "dt_bias": (draw(HEADS) - 4).to(dtype),
        "initial_states": draw(SIZE_B, HEADS, HEAD_DIM, STATE).to(dtype),
    }


def packed(length: int) -> Tensor:
    """Return seq_idx (B, L) of rows that hold several documents."""
    seq_BL = torch.zeros(SIZE_B, length, dtype=torch.int32)
    for row, starts in DOCUMENTS.items():
        for start in starts:
            seq_BL[row, start:] += 1
    return seq_BL


def recurrence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    limit: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """The definition, one token after the other; a document's first token begins from nothing, but document 0 from the given state."""
    step = torch.nn.functional.softplus(dt + dt_bias).clamp(*limit)
    B, C = (part.repeat_interleave(HEADS // part.shape[2], dim=2) for part in (B, C))
    state = x.new_zeros(SIZE_B, HEADS, HEAD_DIM, STATE) if initial_states is None else initial_states
    outputs = []
    for token in range(x.shape[1]):
        if seq_idx is not None:
            before = seq_idx[:, token - 1] if token else torch.zeros(SIZE_B, dtype=seq_idx.dtype)
            state = state * (before == seq_idx[:, token])[:, None, None, None]
        added = (step[:, token, :, None] * x[:, token])[..., None] * B[:, token, :, None]
        state = state * (step[:, token] * A).exp()[..., None, None] + added
        outputs.append((state * C[:, token, :, None]).sum(-1) + D[:, None] * x[:, token])
    return torch.stack(outputs, dim=1) * torch.nn.functional.silu(z), state


def gradients(run: Callable[..., tuple[Tensor, ...]], values: dict[str, Tensor]) -> list[Tensor]:
    """Return a function's outputs and the gradients of all its inputs under a fixed random loss."""
    leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
    outputs = run(**leaves)
    generator = torch.Generator().manual_seed(1)
    loss = sum((part.double() * torch.randn(part.shape, generator=generator, dtype=torch.float64)).sum() for part in outputs)
    found = torch.autograd.grad(loss, list(leaves.values()))  # type: ignore[arg-type]
    return [*(part.detach() for part in outputs), *found]


def worst(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300)) for a, b in zip(found, wanted, strict=True))


def scan(seq_idx: Tensor | None = None, limit: tuple[float, float] = ssd.LIMIT, chunk: int = 32) -> Callable[..., Any]:
    return lambda **values: ssd.mamba_chunk_scan_combined(
        chunk_size=chunk, seq_idx=seq_idx, dt_softplus=True, dt_limit=limit, return_final_states=True, **values
    )


def definition(seq_idx: Tensor | None = None, limit: tuple[float, float] = ssd.LIMIT) -> Callable[..., Any]:
    return lambda initial_states=None, **values: recurrence(initial_states=initial_states, seq_idx=seq_idx, limit=limit, **values)


CASES = [
    (length, groups, is_packed)
    for length, groups, is_packed in itertools.product(LENGTHS, (1, 2), (False, True))
    if length > 2 or not is_packed
]


@pytest.mark.parametrize(("length", "groups", "is_packed"), CASES)
def test_scan_is_the_recurrence(length: int, groups: int, is_packed: bool) -> None:
    """Output, final state and the gradient of every input; in fp64 to rounding, in fp32 to FP32."""
    values, seq_idx = inputs(length, groups), packed(length) if is_packed else None
    wanted = gradients(definition(seq_idx), values)
    assert worst(gradients(scan(seq_idx), values), wanted) < 1e-12
    assert worst(gradients(scan(seq_idx), {name: value.float() for name, value in values.items()}), wanted) < FP32


def test_a_limited_time_step_and_no_given_state() -> None:
    values, limit = inputs(70, 2), (0.05, 0.5)
    del values["initial_states"]
    wanted = gradients(definition(limit=limit), values)
    assert worst(gradients(scan(limit=limit), values), wanted) < 1e-12
    assert worst(gradients(scan(), values), wanted) > 1e-2


@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
def test_the_chunk_size_changes_nothing(chunk: int) -> None:
    values, seq_idx = inputs(96, 2), packed(96)
    assert worst(gradients(scan(seq_idx, chunk=chunk), values), gradients(scan(seq_idx), values)) < 1e-12


def test_packed_documents_are_as_if_alone() -> None:
    """What packing must mean, without seq_idx on the other side."""
    values, seq_idx = inputs(96, 2), packed(96)
    del values["initial_states"]
    found, _ = scan(seq_idx)(**values)
    for row, starts in DOCUMENTS.items():
        for begin, end in itertools.pairwise((0, *starts, 96)):
            alone = {name: value if value.dim() == 1 else value[row : row + 1, begin:end] for name, value in values.items()}
            assert torch.allclose(found[row, begin:end], scan()(**alone)[0][0], rtol=0, atol=1e-12)
    assert worst([found], [scan()(**values)[0]]) > 1e-2


@pytest.mark.parametrize("groups", [1, 2])
def test_scan_is_that_of_transformers(groups: int) -> None:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    values = {name: value.float() for name, value in inputs(70, groups).items() if name != "z"}

    def theirs(x: Tensor, **more: Any) -> Any:
        return mamba2_chunk_scan(x, chunk_size=32, dt_softplus=True, return_final_states=True, **more)

    assert worst(gradients(scan(), values), gradients(theirs, values)) < FP32


def test_bf16_is_scanned_in_fp32() -> None:
    values = {name: value.bfloat16() for name, value in inputs(70, 2).items()}
    wanted, state = scan()(**{name: value.float() for name, value in values.items()})
    found, found_state = scan()(**values)
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted.bfloat16()) and torch.equal(found_state, state)


def test_token_by_token_is_the_scan() -> None:
    """The decoding step, for chosen rows of a larger state cache; z apart, as the mixer's own norm applies it."""
    values = inputs(9, 2)
    wanted, state = scan()(**values)
    cache, rows = torch.zeros(5, HEADS, HEAD_DIM, STATE, dtype=torch.float64), torch.tensor([3, 1])
    cache[rows] = values["initial_states"]

    def wide(value: Tensor, *more: int) -> Tensor:
        return value.reshape(*value.shape, *[1] * len(more)).expand(*value.shape, *more)

    for token in range(9):
        x, z, dt, B, C = (values[name][:, token] for name in ("x", "z", "dt", "B", "C"))
        found = ssd.selective_state_update(
            cache,
            x,
            wide(dt, HEAD_DIM),
            wide(values["A"], HEAD_DIM, STATE),
            B,
            C,
            wide(values["D"], HEAD_DIM),
            z=z,
            dt_bias=wide(values["dt_bias"], HEAD_DIM),
            dt_softplus=True,
            state_batch_indices=rows,
        )
        assert torch.allclose(found, wanted[:, token], rtol=0, atol=1e-12)
    assert torch.allclose(cache[rows], state, rtol=0, atol=1e-12) and not cache[[0, 2, 4]].any()


def convolution(length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"x": (SIZE_B, 10, length), "weight": (10, TAPS), "bias": (10,), "initial_states": (SIZE_B, 10, TAPS - 1)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("length", [1, 3, 20])
def test_convolution_is_torchs(length: int) -> None:
    values = convolution(length)
    row = torch.cat([values["initial_states"], values["x"]], dim=-1)
    wanted = torch.nn.functional.silu(torch.nn.functional.conv1d(row, values["weight"][:, None], values["bias"], groups=10))
    assert torch.allclose(ssd.causal_conv1d_fn(**values, activation="silu"), wanted, rtol=0, atol=1e-12)


def test_convolution_stays_within_a_document() -> None:
    values, seq_idx = convolution(96), packed(96)
    del values["initial_states"]
    found = ssd.causal_conv1d_fn(**values, seq_idx=seq_idx)
    for row, starts in DOCUMENTS.items():
        for begin, end in itertools.pairwise((0, *starts, 96)):
            alone = ssd.causal_conv1d_fn(values["x"][row : row + 1, :, begin:end], values["weight"], values["bias"])
            assert torch.allclose(found[row, :, begin:end], alone[0], rtol=0, atol=1e-12)


def test_convolution_token_by_token() -> None:
    values = convolution(9)
    wanted = ssd.causal_conv1d_fn(**values, activation="silu")
    cache, rows = torch.zeros(4, 10, TAPS, dtype=torch.float64), torch.tensor([2, 0])
    cache[rows, :, 1:] = values["initial_states"]
    for token in range(9):
        found = ssd.causal_conv1d_update(values["x"][..., token], cache, values["weight"], values["bias"], "silu", rows)
        assert torch.allclose(found, wanted[..., token], rtol=0, atol=1e-12)


def test_padding_among_decoding_tokens_gives_nothing_and_changes_no_state() -> None:
    """Row -1 of a cache is padding, as the official kernels have it."""
    rows, generator = torch.tensor([3, -1, 1]), torch.Generator().manual_seed(3)
    x, weight, conv = (torch.randn(shape, generator=generator) for shape in ((3, 10), (10, TAPS), (5, 10, TAPS)))
    after = conv.clone()
    found = ssd.causal_conv1d_update(x, after, weight, conv_state_indices=rows)
    alone = ssd.causal_conv1d_update(x[[0, 2]], conv_alone := conv.clone(), weight, conv_state_indices=rows[[0, 2]])
    assert torch.equal(found[[0, 2]], alone) and not found[1].any() and torch.equal(after, conv_alone)
    shapes = (
        (3, HEADS, HEAD_DIM),
        (3, HEADS, HEAD_DIM),
        (HEADS, HEAD_DIM, STATE),
        (3, 1, STATE),
        (3, 1, STATE),
        (5, HEADS, HEAD_DIM, STATE),
    )
    x, dt, A, B, C, state = (torch.rand(shape, generator=generator) for shape in shapes)
    after = state.clone()
    found = ssd.selective_state_update(after, x, dt, -A, B, C, state_batch_indices=rows)
    alone = ssd.selective_state_update(
        state_alone := state.clone(), *(part[[0, 2]] for part in (x, dt)), -A, B[[0, 2]], C[[0, 2]], state_batch_indices=rows[[0, 2]]
    )
    assert torch.equal(found[[0, 2]], alone) and not found[1].any() and torch.equal(after, state_alone)


def test_a_number_a_head_is_the_same_number_a_channel() -> None:
    """The recurrence takes a short cut where dt, A and dt_bias are expanded (stride 0)."""
    generator = torch.Generator().manual_seed(4)
    shapes = (
        (3, HEADS, HEAD_DIM),
        (3, HEADS, 1),
        (HEADS, 1, 1),
        (3, 2, STATE),
        (3, 2, STATE),
        (HEADS, 1),
        (HEADS, 1),
        (3, HEADS, HEAD_DIM, STATE),
    )
    x, dt, A, B, C, D, dt_bias, state = (torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    wide = [dt.expand(-1, -1, HEAD_DIM), -A.expand(-1, HEAD_DIM, STATE), D.expand(-1, HEAD_DIM), dt_bias.expand(-1, HEAD_DIM)]
    outputs, states = [], []
    for dt, A, D, dt_bias in (wide, [part.contiguous() for part in wide]):
        states.append(state.clone())
        outputs.append(ssd.selective_state_update(states[-1], x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=True))
    assert torch.allclose(*outputs, rtol=0, atol=1e-12) and torch.allclose(*states, rtol=0, atol=1e-12)
    assert not torch.equal(states[0], state)


@pytest.mark.parametrize(("is_packed", "groups"), [(False, 1), (True, 2)])
def test_split_is_its_parts(is_packed: bool, groups: int) -> None:
    """Projection split, convolution, scan and gate as MambaMixer composes them without the fused call."""
    length, inner, wide = 40, HEADS * HEAD_DIM, HEADS * HEAD_DIM + 2 * groups * STATE
    generator = torch.Generator().manual_seed(3)
    zxbcdt, weight, bias, dt_bias, D = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((SIZE_B, length, inner + wide + HEADS), (wide, TAPS), (wide,), (HEADS,), (HEADS,))
    )
    A, seq_idx = -torch.arange(1.0, HEADS + 1, dtype=torch.float64), packed(length) if is_packed else None
    found, state = ssd.mamba_split_conv1d_scan_combined(
        zxbcdt,
        weight,
        bias,
        dt_bias,
        A,
        D,
        32,
        seq_idx=seq_idx,
        headdim=HEAD_DIM,
        ngroups=groups,
        norm_before_gate=False,
        return_final_states=True,
    )
    z, xBC, dt = zxbcdt[..., :inner], zxbcdt[..., inner : inner + wide], zxbcdt[..., inner + wide :]
    xBC = ssd.causal_conv1d_fn(xBC.transpose(1, 2), weight, bias, seq_idx, activation="silu").transpose(1, 2)
    x, B, C = xBC[..., :inner], xBC[..., inner : inner + groups * STATE], xBC[..., inner + groups * STATE :]
    heads, by_group = (SIZE_B, length, HEADS, HEAD_DIM), (SIZE_B, length, groups, STATE)
    wanted, wanted_state = recurrence(
        x.reshape(heads), dt, A, B.reshape(by_group), C.reshape(by_group), D, z.reshape(heads), dt_bias, None, seq_idx, (0.0, math.inf)
    )
    assert worst([found, state], [wanted.flatten(2), wanted_state]) < 1e-12


@pytest.mark.parametrize("before", [False, True])
def test_gated_norm_is_per_group(before: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    x, z, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 20), (3, 20), (20,)))
    norm = ssd.GatedRMSNorm(20, eps=1e-3, group_size=10, norm_before_gate=before, dtype=torch.float64)
    norm.weight.data.copy_(weight)
    gate = torch.nn.functional.silu(z)
    groups = (x if before else x * gate).split(10, dim=-1)
    wanted = torch.cat([torch.nn.functional.rms_norm(part, (10,), eps=1e-3) for part in groups], dim=-1) * weight
    assert torch.allclose(norm(x, z), wanted * gate if before else wanted, rtol=0, atol=1e-12)
