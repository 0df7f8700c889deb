"""Run the official Mamba-2 kernels and models/ssd.py on the same inputs: mamba_kernels_worker.py FOLDER reads cases.json, writes results.json.

Triton's interpreter runs the kernels on a CPU: the environment of this process must hold TRITON_INTERPRET=1, and torch.cuda is patched.
The kernels are mamba_ssm's; its convolution is CUDA C++, for which Megatron-Core 0.19's own Triton convolutions speak instead.

A case: {"name", "kind": a key of KINDS, and what differs from DEFAULTS}. A result: {"errors": the relative difference, by norm, of each
output and of each input's gradient; "without": the output's difference where ours runs without an option that the case sets}.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from megatron_prism.models import ssd

SIZE_B, HEADS, HEAD_DIM, STATE, TAPS, CHUNK = 2, 4, 16, 16, 4, 32
INNER = HEADS * HEAD_DIM
CUTS = ((7, 33, 64, 65), (1, 50, 69))  # where a next document begins, by row: also at a chunk's edge, and documents of one token
DEFAULTS: dict[str, Any] = {
    "groups": 2,
    "length": 70,
    "first": None,
    "D": "head",
    "z": False,
    "initial": False,
    "dt_limit": None,
    "dt_bias": -1.0,
    "softplus": True,
    "dtype": "float32",
    "tied": True,
    "rows": None,
    "before_gate": False,
    "by_group": True,
}
CONTROLLED = {"seq_idx", "dt_limit", "group_size"}
KERNEL_MODULES = (
    "ssd_combined",
    "ssd_bmm",
    "ssd_chunk_state",
    "ssd_chunk_scan",
    "ssd_state_passing",
    "layernorm_gated",
    "selective_state_update",
)
Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Pair:
    """The official function and ours, with what both are given: tensors to differentiate (unless not), and options."""

    theirs: Function
    ours: Function
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    differentiable: bool = True


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    official = load_official()
    results = {}
    for case in json.loads((folder / "cases.json").read_text()):
        start = time.monotonic()
        results[case["name"]] = found = compare(KINDS[case["kind"]](official, SimpleNamespace(**DEFAULTS | case)))
        name, error = max(found["errors"].items(), key=lambda item: item[1])
        print(f"{case['name']}: {error:.1e} ({name}), {time.monotonic() - start:.1f} s", flush=True)
    (folder / "results.json").write_text(json.dumps({"signatures": signatures(official), "cases": results}))


def load_official() -> SimpleNamespace:
    """Import the kernels for Triton's interpreter, and return the functions under comparison."""
    spec = importlib.util.find_spec("mamba_ssm")
    assert spec is not None
    sys.modules["mamba_ssm"] = importlib.util.module_from_spec(spec)  # never executed: its __init__ loads a CUDA extension
    torch.cuda.device = lambda *_: contextlib.nullcontext()  # type: ignore[assignment,misc]
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=1)  # type: ignore[assignment]
    kernels = {name: importlib.import_module(f"mamba_ssm.ops.triton.{name}") for name in KERNEL_MODULES}
    varlen = importlib.import_module("megatron.core.ssm.ops.causal_conv1d_varlen")
    update = importlib.import_module("megatron.core.ssm.ops.causal_conv1d_triton")
    for module in (*kernels.values(), varlen):
        fix_tile_sizes(module)
    widen_bf16_dots()
    combined = kernels["ssd_combined"]
    combined.causal_conv1d_fwd_function, combined.causal_conv1d_bwd_function = convolution_forward, convolution_backward
    return SimpleNamespace(
        mamba_chunk_scan_combined=combined.mamba_chunk_scan_combined,
        mamba_split_conv1d_scan_combined=combined.mamba_split_conv1d_scan_combined,
        GatedRMSNorm=kernels["layernorm_gated"].RMSNorm,
        selective_state_update=kernels["selective_state_update"].selective_state_update,
        causal_conv1d_varlen_fn=varlen.causal_conv1d_varlen_fn,
        causal_conv1d_update=update.causal_conv1d_update,
    )


def fix_tile_sizes(module: Any) -> None:
    """Leave each kernel one tile size, the largest: choosing between several needs a GPU to time them on."""
    for kernel in vars(module).values():
        if isinstance(kernel, Autotuner):
            kernel.configs = [
                max(kernel.configs, key=lambda config: math.prod(size for name, size in config.kwargs.items() if name.startswith("BLOCK")))
            ]


def widen_bf16_dots() -> None:
    """Multiply bf16 blocks as fp32: the interpreter holds them as their bits in uint16, and multiplies those as integers."""
    dot = InterpreterBuilder.create_dot

    def widened(block: Any) -> Any:
        if block.dtype.scalar != tl.bfloat16:
            return block
        return TensorHandle((block.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)


def convolution(x_BDL: Tensor, weight_DW: Tensor, bias_D: Tensor, seq_BL: Tensor | None, activate: bool) -> Tensor:
    """Stand in for the convolution in CUDA C++: torch's own, one document after the other."""
    rows = []
    for row in range(x_BDL.shape[0]):
        lengths = [x_BDL.shape[2]] if seq_BL is None else seq_BL[row].unique_consecutive(return_counts=True)[1].tolist()
        padded = [functional.pad(part, (weight_DW.shape[1] - 1, 0)) for part in x_BDL[row].split(lengths, dim=-1)]
        rows.append(torch.cat([functional.conv1d(part, weight_DW[:, None], bias_D, groups=len(bias_D)) for part in padded], dim=-1))
    out = torch.stack(rows)
    return functional.silu(out) if activate else out


def convolution_forward(
    x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None, _initial: None, _final: None, activate: bool
) -> Tensor:
    return convolution(x, weight, bias, seq_idx, activate)


def convolution_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    dout: Tensor,
    seq_idx: Tensor | None,
    _initial: None,
    _dfinal: None,
    dx: Tensor,
    _dinitial: bool,
    activate: bool,
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [value.detach().requires_grad_() for value in (x, weight, bias)]
        dx_found, *rest = torch.autograd.grad(convolution(*leaves, seq_idx, activate), leaves, dout)
    return dx.copy_(dx_found), *rest


def compare(pair: Pair) -> dict[str, dict[str, float]]:
    wanted = outputs_and_gradients(pair, pair.theirs, pair.options)
    found = outputs_and_gradients(pair, pair.ours, pair.options)
    assert found.keys() == wanted.keys()
    assert {name: value.dtype for name, value in found.items()} == {name: value.dtype for name, value in wanted.items()}
    without = {}
    for name in CONTROLLED & pair.options.keys():
        rest = {key: value for key, value in pair.options.items() if key != name}
        without[name] = difference(outputs_and_gradients(pair, pair.ours, rest)["y"], wanted["y"])
    return {"errors": {name: difference(found[name], wanted[name]) for name in wanted}, "without": without}


def outputs_and_gradients(pair: Pair, function: Function, options: dict[str, Any]) -> dict[str, Tensor]:
    """Return y, where there is one the state, and the gradients of all tensors under a fixed random loss."""
    leaves = {
        name: value.detach().clone(memory_format=torch.preserve_format).requires_grad_(pair.differentiable)
        for name, value in pair.tensors.items()
    }
    outputs = function(**leaves, **options)
    found = {name: value.detach() for name, value in zip(("y", "state"), outputs, strict=False)}
    if pair.differentiable:
        draw = drawer(seed=1)
        loss = sum((value.float() * draw(*value.shape)).sum() for value in outputs)
        gradients = torch.autograd.grad(loss, list(leaves.values()))  # type: ignore[arg-type]
        found |= {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return found


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


def drawer(seed: int = 0) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def documents(case: SimpleNamespace) -> dict[str, Tensor]:
    """Return the option seq_idx (B, L), each row's first document numbered as `first` says; nothing where it is None."""
    if case.first is None:
        return {}
    seq_BL = torch.tensor(case.first, dtype=torch.int32)[:, None].repeat(1, case.length)
    for row, cuts in enumerate(CUTS):
        for cut in cuts:
            seq_BL[row, cut:] += 1
    return {"seq_idx": seq_BL}


def scan_options(case: SimpleNamespace) -> dict[str, Any]:
    limit = {} if case.dt_limit is None else {"dt_limit": tuple(case.dt_limit)}
    return {"chunk_size": CHUNK, "return_final_states": True, **limit, **documents(case)}


def scan(official: SimpleNamespace, case: SimpleNamespace) -> Pair:
    draw, dtype = drawer(), getattr(torch, case.dtype)
    of_token, of_group = (SIZE_B, case.length, HEADS, HEAD_DIM), (SIZE_B, case.length, case.groups, STATE)
    tensors = {"x": draw(*of_token), "dt": draw(*of_token[:3]), "B": draw(*of_group), "C": draw(*of_group)}
    if case.z:
        tensors["z"] = draw(*of_token)
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    tensors["A"] = -0.5 - draw(HEADS).abs()
    if case.softplus:
        tensors["dt_bias"] = draw(HEADS) + case.dt_bias
    else:
        tensors["dt"] = tensors["dt"].abs()
    if case.D is not None:
        tensors["D"] = draw(HEADS) if case.D == "head" else draw(HEADS, HEAD_DIM)
    if case.initial:
        tensors["initial_states"] = draw(SIZE_B, HEADS, HEAD_DIM, STATE)
    options = {**scan_options(case), "dt_softplus": case.softplus}
    return Pair(official.mamba_chunk_scan_combined, ssd.mamba_chunk_scan_combined, tensors, options)


def split(official: SimpleNamespace, case: SimpleNamespace) -> Pair:
    draw, width = drawer(), INNER + 2 * case.groups * STATE
    tensors = {
        "zxbcdt": draw(SIZE_B, case.length, INNER + width + HEADS),
        "conv1d_weight": draw(width, TAPS) / 2,
        "conv1d_bias": draw(width),
        "dt_bias": draw(HEADS) + case.dt_bias,
        "A": -0.5 - draw(HEADS).abs(),
        "D": draw(HEADS) if case.D == "head" else draw(HEADS, HEAD_DIM),
    }
    if case.initial:
        tensors["initial_states"] = draw(SIZE_B, HEADS, HEAD_DIM, STATE)
    options = {**scan_options(case), "ngroups": case.groups, "norm_before_gate": False, "headdim": HEAD_DIM if case.D == "head" else None}
    return Pair(official.mamba_split_conv1d_scan_combined, ssd.mamba_split_conv1d_scan_combined, tensors, options)


def norm(official: SimpleNamespace, case: SimpleNamespace) -> Pair:
    draw = drawer()
    tensors = {"x": draw(SIZE_B, 20, INNER), "weight": draw(INNER), **({"z": draw(SIZE_B, 20, INNER)} if case.z else {})}
    options = {"norm_before_gate": case.before_gate, **({"group_size": INNER // 2} if case.by_group else {})}

    def function(kind: Any) -> Function:
        def run(x: Tensor, weight: Tensor, z: Tensor | None = None, **given: Any) -> tuple[Tensor, ...]:
            return (torch.func.functional_call(kind(INNER, eps=1e-3, **given), {"weight": weight}, (x, z)),)

        return run

    return Pair(function(official.GatedRMSNorm), function(ssd.GatedRMSNorm), tensors, options)


def step(official: SimpleNamespace, case: SimpleNamespace) -> Pair:
    """Three tokens into a cache of states; `rows` are those of the tokens in it, -1 for a token of padding."""
    draw = drawer()
    count = SIZE_B if case.rows is None else len(case.rows)
    tensors = {
        "state": draw(5 if case.rows else count, HEADS, HEAD_DIM, STATE),
        "x": draw(3, count, HEADS, HEAD_DIM),
        "dt": draw(3, count, HEADS, HEAD_DIM),
        "A": -0.5 - draw(HEADS, HEAD_DIM, STATE).abs(),
        "B": draw(3, count, case.groups, STATE),
        "C": draw(3, count, case.groups, STATE),
        "D": draw(HEADS, HEAD_DIM),
        "dt_bias": draw(HEADS, HEAD_DIM) + case.dt_bias,
        **({"z": draw(3, count, HEADS, HEAD_DIM)} if case.z else {}),
    }
    options = {} if case.rows is None else {"state_batch_indices": torch.tensor(case.rows)}

    def function(update: Any) -> Function:
        def run(state: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor, **more: Any) -> tuple[Tensor, ...]:
            of_token = {name: more.pop(name) for name in ("x", "dt", "B", "C", "z") if name in more}
            if case.tied:  # one value a head, as the mixer gives them: a stride of 0 takes another way through the kernel
                of_token["dt"] = of_token["dt"][..., :1].expand_as(of_token["dt"])
                A, D, dt_bias = A[:, :1, :1].expand_as(A), D[:, :1].expand_as(D), dt_bias[:, :1].expand_as(dt_bias)
            outputs = [
                update(
                    state, A=A, D=D, dt_bias=dt_bias, dt_softplus=True, **{name: value[token] for name, value in of_token.items()}, **more
                )
                for token in range(3)
            ]
            return torch.stack(outputs), state

        return run

    return Pair(function(official.selective_state_update), function(ssd.selective_state_update), tensors, options, differentiable=False)


def convolve(official: SimpleNamespace, case: SimpleNamespace) -> Pair:
    draw, width = drawer(), INNER
    tensors = {"x": draw(case.length, width), "weight": draw(width, TAPS), "bias": draw(width)}
    options = {name: value[1:] for name, value in documents(case).items()}

    def theirs(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None = None) -> tuple[Tensor, ...]:
        lengths = [case.length] if seq_idx is None else seq_idx[0].unique_consecutive(return_counts=True)[1].tolist()
        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        return (official.causal_conv1d_varlen_fn(x, weight, bias, ends),)

    def ours(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None = None) -> tuple[Tensor, ...]:
        return (ssd.causal_conv1d_fn(x.T[None], weight, bias, seq_idx, activation="silu")[0].T,)

    return Pair(theirs, ours, tensors, options, differentiable=False)


def convolve_step(official: SimpleNamespace, case: SimpleNamespace) -> Pair:
    draw = drawer()
    tensors = {"x": draw(3, len(case.rows), INNER), "conv_state": draw(5, INNER, TAPS), "weight": draw(INNER, TAPS), "bias": draw(INNER)}
    options = {"conv_state_indices": torch.tensor(case.rows)}

    def function(update: Any) -> Function:
        return lambda x, conv_state, weight, bias, conv_state_indices: (
            torch.stack([update(token, conv_state, weight, bias, "silu", conv_state_indices) for token in x]),
            conv_state,
        )

    return Pair(function(official.causal_conv1d_update), function(ssd.causal_conv1d_update), tensors, options, differentiable=False)


KINDS: dict[str, Callable[[SimpleNamespace, SimpleNamespace], Pair]] = {
    "scan": scan,
    "split": split,
    "norm": norm,
    "step": step,
    "convolution": convolve,
    "convolution step": convolve_step,
}


def signatures(official: SimpleNamespace) -> dict[str, list[str]]:
    """Return what of ours mamba_ssm's callers would not expect: a parameter, its place or its default; by function."""
    found: dict[str, list[str]] = {}
    for name in ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined", "selective_state_update", "GatedRMSNorm"):
        ours, theirs = (inspect.signature(getattr(owner, name)).parameters for owner in (ssd, official))
        places = list(theirs)
        found[name] = [
            parameter.name
            for place, parameter in enumerate(ours.values())
            if parameter.name not in theirs
            or parameter.default != theirs[parameter.name].default
            or (parameter.kind is parameter.POSITIONAL_OR_KEYWORD and places[place] != parameter.name)
        ]
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
