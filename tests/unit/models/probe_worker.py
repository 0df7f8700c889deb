"""Runs the probes of the GPU path on a host, where plain torch stands for each kernel: right, and then with one fault after another.

Prints {"right": {probe: whether it holds}, "faulty": {fault: whether its probe holds}}. So the references, masks and inputs of the probes are
tested without a GPU.
"""

from __future__ import annotations

import json
import sys
import types
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from megatron_prism.models import probes, ssd
from megatron_prism.parallel import host

FAULTS = {  # by the probe that must see it
    "linear": "linear bf16",
    "causal": "attention 64",
    "unfused": "attention 64",
    "window": "attention 64 window",
    "packed": "attention 64 packed",
    "convolution": "Mamba convolution",
    "scan": "Mamba scan",
    "adam": "FusedAdam",
}


class Linear(torch.nn.Linear):
    def __init__(self, fault: str, inputs: int, outputs: int, bias: bool, params_dtype: torch.dtype, device: str):
        super().__init__(inputs, outputs, bias=bias, dtype=params_dtype)
        self.fault = fault

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * (1.2 if self.fault == "linear" else 1.0)


class DotProductAttention(torch.nn.Module):
    """Attention query by query."""

    def __init__(self, fault: str, heads: int, size: int, num_gqa_groups: int, **options: Any):
        super().__init__()
        self.fault = fault

    def forward(self, query: Any, key: Any, value: Any, attn_mask_type: str, window_size: Any = None, **documents: Any) -> torch.Tensor:
        query, key, value = (tensor if "cu_seqlens_q" in documents else tensor[:, 0] for tensor in (query, key, value))
        ends = documents["cu_seqlens_q"].tolist() if documents and self.fault != "packed" else [0, len(query)]
        outputs = []
        for place in range(len(query)):
            first = max(end for end in ends if end <= place)
            if window_size is not None:
                first = max(first, place - window_size[0] - (self.fault == "window"))
            last = place + 1 + (self.fault == "causal")
            scores = torch.einsum("hd,tgd->hgt", query[place].float(), key[first:last].float())
            scores = torch.stack([scores[head, head // 4] for head in range(8)]) / query.shape[-1] ** 0.5
            outputs.append(torch.einsum("ht,thd->hd", scores.softmax(-1), value[first:last].float().repeat_interleave(4, 1)))
        return torch.stack(outputs).to(query.dtype)


def stand_in(fault: str) -> None:
    """Put plain torch, with a fault, in the place of each package."""
    backends = {f"use_{name}_attention": name == ("unfused" if fault == "unfused" else "fused") for name in ("flash", "fused", "unfused")}
    scan = ssd.mamba_chunk_scan_combined
    modules: dict[str, dict[str, Any]] = {
        "transformer_engine": {},
        "transformer_engine.common": {
            "recipe": types.SimpleNamespace(Float8CurrentScaling=int, DelayedScaling=int, Float8BlockScaling=int)
        },
        "transformer_engine.pytorch": {
            "Linear": partial(Linear, fault),
            "DotProductAttention": partial(DotProductAttention, fault),
            "fp8_autocast": lambda **settings: nullcontext(),
        },
        "transformer_engine.pytorch.attention": {},
        "transformer_engine.pytorch.attention.dot_product_attention": {"_attention_backends": backends},
        "transformer_engine.pytorch.optimizers": {"FusedAdam": torch.optim.Adam if fault == "adam" else torch.optim.AdamW},
        "causal_conv1d": {"causal_conv1d_fn": (lambda x, *rest, **more: x) if fault == "convolution" else ssd.causal_conv1d_fn},
        "mamba_ssm": {},
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.ssd_combined": {
            "mamba_chunk_scan_combined": (lambda *values, **more: scan(*values, **more | {"dt_softplus": False}))
            if fault == "scan"
            else scan
        },
    }
    for name, values in modules.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(values)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])


def holds(probe: probes.Probe) -> bool:
    return probe.run().error <= probe.max_error


def main() -> None:
    host.install()
    torch.manual_seed(0)
    probes.REPEATS = 1
    on_host = {probe.name: probe for probe in probes.PROBES if probe.name != "NCCL"}  # its library alone
    stand_in("")
    right = {name: holds(probe) for name, probe in on_host.items() if "128" not in name}
    faulty = {}
    for fault, name in FAULTS.items():
        stand_in(fault)
        faulty[fault] = holds(on_host[name])
    print(json.dumps({"right": right, "faulty": faulty}))


if __name__ == "__main__":
    main()
