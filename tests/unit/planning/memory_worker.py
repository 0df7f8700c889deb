"""Measures what a tiny model holds, as one rank of a world of which no other rank is there: memory_worker.py FOLDER reads cases.json,
writes held.json. A case: {"name", "model", "config": keys of TrainConfig, "world_size", "rank"}. With it the planner's own stages.

The layers are Megatron-Core's and ours for a host. Four kernels that a GPU has are stood in for by functions that keep for the backward pass
what those keep: Transformer Engine's RMSNorm and SwiGLU, flash attention, mamba_ssm's scan. They compute no values worth reading.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_prism.core.config import ModelConfig, TrainConfig
from megatron_prism.core.load import build as read
from megatron_prism.jobs import plan
from megatron_prism.models import build, shapes
from megatron_prism.parallel import host
from megatron_prism.train import optim

STAGES = {"built": plan.built, "derived": plan.derived}


def main(root: Path) -> None:
    host.install()
    found = {}
    for case in json.loads((root / "cases.json").read_text()):
        model, config = read(case["model"], ModelConfig, str), read(case["config"], TrainConfig, str)
        with shapes.world(config, case["world_size"], case["rank"]) as groups, kernels():
            chunks = build.build(model, groups, config)
            chunks[0].config.bias_activation_fusion = model.activation == "swiglu"
            measured = {"kept": [kept(chunk, model, config) for chunk in chunks], **states(chunks, config)}
        counted = {name: [dataclasses.asdict(stage) for stage in stages(model, config)] for name, stages in STAGES.items()}
        found[case["name"]] = {**measured, **counted}
    (root / "held.json").write_text(json.dumps(found))


class Keep(torch.autograd.Function):
    """Keeps tensors for a backward pass, and gives zeros of a shape."""

    @staticmethod
    def forward(ctx: Any, shape: torch.Size, *tensors: torch.Tensor) -> torch.Tensor:
        out = tensors[0].new_zeros(shape)
        ctx.save_for_backward(*tensors)
        return out


class Kept(torch.autograd.Function):
    """The same, and keeps its output too."""

    @staticmethod
    def forward(ctx: Any, shape: torch.Size, *tensors: torch.Tensor) -> torch.Tensor:
        out = tensors[0].new_zeros(shape)
        ctx.save_for_backward(*tensors, out)
        return out


class Flash(torch.nn.Module):
    """Keeps queries, keys and values each on its own (Transformer Engine makes a view of several contiguous), output and fp32 sums."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def forward(self, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        sums = torch.zeros(query.shape[:3], dtype=torch.float32)
        tokens, rows = query.shape[:2]
        return Kept.apply((tokens, rows, query.shape[2] * query.shape[3]), query, key.clone(), value.clone(), sums)


def norm(self: Any, hidden: torch.Tensor, *gate: Any) -> torch.Tensor:
    return Keep.apply(hidden.shape, hidden)


def scan(
    zxbcdt: torch.Tensor, weight: torch.Tensor, bias: Any, dt_bias: Any, A: torch.Tensor, D: Any, ngroups: int, **kwargs: Any
) -> torch.Tensor:
    """Keeps its input and its output before the gate, as mamba_ssm's MambaSplitConv1dScanCombinedFn."""
    states = weight.shape[0]  # x, B and C
    inner = zxbcdt.shape[-1] - states - A.shape[0]
    shape = (*zxbcdt.shape[:2], inner)
    return Keep.apply(shape, zxbcdt, zxbcdt.new_zeros(shape))


@contextmanager
def kernels() -> Any:
    from megatron_prism.models import local_attention, mamba, ssd
    from megatron_prism.models.norm import LocalNorm

    with ExitStack() as stack:
        for kind in ("data", "expert_data"):  # the world has none
            stack.enter_context(mock.patch(f"megatron.core.parallel_state.get_{kind}_parallel_group_gloo", lambda *args, **kwargs: None))
        stack.enter_context(mock.patch.object(local_attention, "core_attention", lambda: Flash))
        stack.enter_context(mock.patch.object(LocalNorm, "forward", norm))
        stack.enter_context(mock.patch.object(ssd.GatedRMSNorm, "forward", norm))
        stack.enter_context(mock.patch.object(mamba.mixer_module(), "mamba_split_conv1d_scan_combined", scan))
        yield


def kept(chunk: Any, model: ModelConfig, config: TrainConfig) -> int:
    """Return the bytes that a chunk keeps of one microbatch, each storage once, weights apart; a tensor of no batch is left out."""
    size_B, size_S = config.batch.micro_size, config.data.seq_length // config.parallel.cp
    weights = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    storages: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.numel() >= size_B * size_S:
            storages[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    tokens_BS = torch.zeros(size_B, size_S, dtype=torch.long)
    inner = build.unwrap(chunk)
    if not inner.pre_process:
        split = config.parallel.tp if config.parallel.sequence_parallel else 1
        inner.set_input_tensor(torch.zeros(size_S // split, size_B, model.hidden_size, dtype=inner.config.params_dtype, requires_grad=True))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = chunk(tokens_BS, tokens_BS, None, labels=tokens_BS)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


def states(chunks: list[Any], config: TrainConfig) -> dict[str, int]:
    """Return the bytes of weights, gradients and optimizer once it has taken a step."""
    wrapped = optim.wrap(chunks, config)
    optimizer = optim.build(wrapped, config.optimizer, config)
    (part,) = optimizer.chained_optimizers
    adam = part.optimizer
    for group in adam.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    adam.step()
    moments = sum(value.nbytes for state in adam.state.values() for name, value in state.items() if name != "step")
    masters = sum(parameter.nbytes for group in adam.param_groups for parameter in group["params"]) if config.precision == "bf16" else 0
    return {
        "weights": sum(parameter.nbytes for chunk in wrapped for parameter in chunk.parameters()),
        "gradients": sum(parameter.main_grad.nbytes for chunk in wrapped for parameter in chunk.parameters()),
        "buffers": sum(buffer.grad_data.nbytes for chunk in wrapped for buffer in chunk.buffers),
        "optimizer": moments + masters,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
