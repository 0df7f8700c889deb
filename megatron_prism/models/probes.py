"""Each kernel of the GPU path run once, on small inputs, beside plain torch: what `prism doctor` shows on a machine with a GPU.

A probe returns its relative error against the reference and its time. As a program this file runs one probe, in a process of its own, since a
broken kernel may end its process: `python -m megatron_prism.models.probes NAME` prints one line of JSON.
Shape legend: T tokens, H heads, D the size of a head, G groups of keys.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

REPEATS = 5


@dataclass(frozen=True)
class Outcome:
    """What one kernel did. error: relative, against plain torch. ms: the median of some calls, forward and backward."""

    error: float
    ms: float
    detail: str = ""


@dataclass(frozen=True)
class Probe:
    """A kernel to run: the packages it needs, the largest error it may have, and what does not work without it."""

    name: str
    run: Callable[[], Outcome]
    packages: tuple[str, ...]
    max_error: float
    absence_costs: str


def linear(recipe: str | None) -> Outcome:
    """Multiply by Transformer Engine's linear layer, in bf16 or by an FP8 recipe, and back."""
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    made = {"tensorwise": "Float8CurrentScaling", "delayed": "DelayedScaling", "blockwise": "Float8BlockScaling"}
    layer = te.Linear(1024, 1024, bias=False, params_dtype=torch.bfloat16, device="cuda")
    input_TH = _random(1024, 1024)

    def call() -> torch.Tensor:
        with te.fp8_autocast(enabled=recipe is not None, fp8_recipe=None if recipe is None else getattr(recipes, made[recipe])()):
            output = layer(input_TH)
        output.sum().backward()
        return output

    return _outcome(call, input_TH.float() @ layer.weight.float().T)


def attention(size_D: int, window: int | None = None, packed: bool = False) -> Outcome:
    """Attend by Transformer Engine over 1,024 tokens: causal, in a window, or over two packed documents."""
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch.attention.dot_product_attention import _attention_backends

    size_T, size_H, size_G, cut = 1024, 8, 2, 400
    query, key, value = (_random(size_T, heads, size_D) for heads in (size_H, size_G, size_G))
    options: dict[str, Any] = {"attn_mask_type": "padding_causal" if packed else "causal"}
    if window is not None:
        options["window_size"] = (window - 1, 0)
    layer = te.DotProductAttention(
        size_H, size_D, num_gqa_groups=size_G, attention_dropout=0.0, qkv_format="thd" if packed else "sbhd", **options
    )
    ends = torch.tensor([0, cut, size_T], dtype=torch.int32, device="cuda")
    documents = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_kv"), ends) | dict.fromkeys(("max_seqlen_q", "max_seqlen_kv"), size_T - cut)

    def call() -> torch.Tensor:
        inputs = (query, key, value) if packed else (query[:, None], key[:, None], value[:, None])
        output = layer(*inputs, **options, **(documents if packed else {}))
        output.sum().backward()
        return output.reshape(size_T, size_H, size_D)

    place = torch.arange(size_T, device="cuda")
    mask = place[:, None] >= place
    if window is not None:
        mask &= place[:, None] - place < window
    if packed:
        mask &= (place[:, None] < cut) == (place < cut)
    heads_first = [tensor.float().transpose(0, 1) for tensor in (query, key, value)]
    reference = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True).transpose(0, 1)  # type: ignore[arg-type,misc]
    outcome = _outcome(call, reference)
    kinds = [name for name in ("flash", "fused", "unfused") if _attention_backends[f"use_{name}_attention"]]
    return Outcome(outcome.error if kinds != ["unfused"] else float("inf"), outcome.ms, ", ".join(kinds))


def convolution() -> Outcome:
    """Convolve by causal_conv1d."""
    from causal_conv1d import causal_conv1d_fn

    from megatron_prism.models import ssd

    x, weight, bias = _random(2, 256, 512), _random(256, 4), _random(256)
    call = partial(causal_conv1d_fn, x, weight, bias, activation="silu")
    return _outcome(call, ssd.causal_conv1d_fn(x, weight, bias, activation="silu"))


def scan() -> Outcome:
    """Scan by mamba_ssm's Triton kernels, which are compiled at their first call."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    from megatron_prism.models import ssd

    x, dt, A = _random(1, 512, 8, 64), _random(1, 512, 8), -torch.rand(8, device="cuda")
    B, C = _random(1, 512, 1, 64), _random(1, 512, 1, 64)
    call = partial(mamba_chunk_scan_combined, x, dt, A, B, C, chunk_size=128, dt_softplus=True)
    return _outcome(call, ssd.mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=128, dt_softplus=True))


def adam() -> Outcome:
    """Take a step of Transformer Engine's FusedAdam."""
    from transformer_engine.pytorch.optimizers import FusedAdam

    start, gradient = torch.randn(1 << 20, device="cuda"), torch.randn(1 << 20, device="cuda")
    weights = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    steps = [kind([weight], lr=0.1, weight_decay=0.1) for kind, weight in zip((FusedAdam, torch.optim.AdamW), weights, strict=True)]
    for weight, step in zip(weights, steps, strict=True):
        weight.grad = gradient.clone()
        step.step()
    moved, reference = (weight.detach().clone() - start for weight in weights)
    return Outcome(_error(moved, reference), _outcome(lambda: steps[0].step() or moved, moved).ms)


def nccl() -> Outcome:
    """Reduce over NCCL, with this process alone: its library, and the device's end of it."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    value = torch.ones(1 << 20, device="cuda")

    def call() -> torch.Tensor:
        dist.all_reduce(value)
        return value

    outcome = _outcome(call, torch.ones_like(value))
    dist.destroy_process_group()
    return Outcome(outcome.error, outcome.ms, ".".join(map(str, torch.cuda.nccl.version())))


TE, MAMBA, CONV = ("transformer_engine",), ("mamba_ssm",), ("causal_conv1d",)
PROBES = (
    Probe("linear bf16", partial(linear, None), TE, 1e-2, "no training on a GPU"),
    *(
        Probe(f"linear fp8 {kind}", partial(linear, kind), TE, 0.1, f"no fp8.recipe: {kind}")
        for kind in ("tensorwise", "delayed", "blockwise")
    ),
    *(Probe(f"attention {size_D}", partial(attention, size_D), TE, 2e-2, "attention at twice the time of a step") for size_D in (64, 128)),
    *(
        Probe(f"attention {size_D} window", partial(attention, size_D, window=128), TE, 2e-2, "no Mistral of a sliding window")
        for size_D in (64, 128)
    ),
    *(
        Probe(f"attention {size_D} packed", partial(attention, size_D, packed=True), TE, 2e-2, "no data.document_mask")
        for size_D in (64, 128)
    ),
    Probe("Mamba convolution", convolution, CONV, 1e-2, "no Mamba hybrids on GPUs"),
    Probe("Mamba scan", scan, MAMBA, 2e-2, "no Mamba hybrids on GPUs"),
    Probe("FusedAdam", adam, TE, 1e-4, "a slower optimizer step"),
    Probe("NCCL", nccl, (), 0.0, "no gang of GPUs"),
)


def _random(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, dtype=torch.bfloat16, device="cuda", requires_grad=True)


def _outcome(call: Callable[[], torch.Tensor], reference: torch.Tensor) -> Outcome:
    """Call once for the result and some times for the time."""
    error, times = _error(call(), reference), []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return Outcome(error, 1e3 * sorted(times)[REPEATS // 2])


def _error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the relative error. NaN counts as infinite."""
    error = float((result.detach().float() - reference.detach().float()).norm() / reference.detach().float().norm())
    return error if error == error else float("inf")


def main(name: str) -> None:
    """Run a probe by name and print its outcome."""
    torch.manual_seed(0)
    probe = next(probe for probe in PROBES if probe.name == name)
    print(json.dumps(asdict(probe.run())), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
