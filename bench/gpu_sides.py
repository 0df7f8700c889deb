"""The sides of bench/gpu.py: each trains the same shape, and returns the seconds of its steps, its peak memory and its last loss.

Ours is the run itself: build, wrap, kernels.find, loop.fit. Bare is Megatron-Core's own wrapper, optimizer and schedule around our model, with
the settings of NVIDIA's script for this model (Megatron-LM, examples/llama/train_llama3_8b_h100_fp8.sh). transformers is what a user would
write: SDPA, AdamW fused, weights and moments in bf16.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench.trainer import Bare, run_of
from megatron_prism.checkpoint import sharded
from megatron_prism.core import load
from megatron_prism.core.check.optimizer import check_adam
from megatron_prism.core.check.precision import check_machine
from megatron_prism.core.check.train import check_train
from megatron_prism.core.config import GangConfig, ModelConfig, OptimizerConfig, TrainConfig
from megatron_prism.core.errors import raise_problems
from megatron_prism.core.layers import merge
from megatron_prism.families import registry
from megatron_prism.models import build
from megatron_prism.models.batch import Batch
from megatron_prism.parallel import hardware, host
from megatron_prism.parallel.groups import Groups
from megatron_prism.planning.flops import flops_per_token
from megatron_prism.train import against_plan, garbage, kernels, loop, metrics, optim
from megatron_prism.train.against_plan import MEASURED, WARM_UP, AgainstPlan

STEPS = WARM_UP + MEASURED
# the keys of an option: the recipes of FP8, and what NVIDIA's recipes set and we leave off
OPTIONS: dict[str, dict[str, Any]] = {
    "fp8": {"fp8": {}},
    "delayed": {"fp8": {"recipe": "delayed"}},
    "blockwise": {"fp8": {"recipe": "blockwise"}},
    "ce-native": {"fusion": {"cross_entropy": "native"}},
    "ce-te": {"fusion": {"cross_entropy": "te"}},
    "wgrad": {"fusion": {"gradient_accumulation": True}},
    "grads-bf16": {"parallel": {"grad_reduce": "bf16"}},
    "moments": {"optimizer": {"moments": "bf16"}},
    "norms-cudnn": {"environment": {"NVTE_NORM_FWD_USE_CUDNN": "1", "NVTE_NORM_BWD_USE_CUDNN": "1"}},
    "gc": {"gc_interval": 100},
    "chunks": {"logits_chunk_tokens": 2048},
    "all": {"fusion": {"cross_entropy": "te", "gradient_accumulation": True}, "gc_interval": 100},
    "graphs": {"cuda_graphs": True},
}
OWN_PROCESS = {"norms-cudnn", "graphs"}  # libraries read their variables once; graphs stay
NVIDIA = ("ce-native", "grads-bf16", "gc")  # of NVIDIA's script for this model, beside what bare() sets itself


@dataclass(frozen=True)
class Shape:
    """A model, and a step of num_microbatches sequences. documents: the tokens of each packed document, None for unmasked sequences."""

    model: ModelConfig
    seq_length: int
    num_microbatches: int
    documents: int | None = None


@dataclass(frozen=True)
class Trained:
    """What a side did. seconds: of the measured steps. more: what only this side knows."""

    seconds: list[float]
    loss: float
    parameters: int
    more: dict[str, Any] = field(default_factory=dict)


class Times(AgainstPlan):
    """Remembers the time of every step too."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.seconds: list[float] = []

    def record(self, step: int, seconds: float) -> None:
        self.seconds.append(seconds)
        super().record(step, seconds)


def batches(shape: Shape) -> list[list[Batch]]:
    """Return two steps of random tokens, in pinned memory where there is a device."""
    generator = torch.Generator().manual_seed(0)
    return [[_microbatch(shape, generator) for _ in range(shape.num_microbatches)] for _ in range(2)]


def _microbatch(shape: Shape, generator: torch.Generator) -> Batch:
    size_S = shape.seq_length
    tokens_BS = torch.randint(0, shape.model.vocab_size, (1, size_S), generator=generator)
    batch = {"tokens": tokens_BS, "labels": tokens_BS.roll(-1, 1), "loss_mask": torch.ones(1, size_S)}
    batch["position_ids"] = torch.arange(size_S)[None]
    if shape.documents is not None:
        batch["document_ids"] = (batch["position_ids"] // shape.documents).int()
    return {name: tensor.pin_memory() if host.has_cuda() else tensor for name, tensor in batch.items()}


def configure(shape: Shape, folder: Path, options: Sequence[str]) -> TrainConfig:
    """Return the run of a shape: one rank, bf16, a constant rate; nothing is read from `data.prepared`.

    Raises: InputError where this machine cannot run it, as FP8 on a CPU.
    """
    values: dict[str, Any] = {
        "run_dir": str(folder),
        "steps": STEPS,
        "init": {"tokenizer": str(folder)},
        "data": {"prepared": str(folder), "seq_length": shape.seq_length, "document_mask": shape.documents is not None},
        "batch": {"global_size": shape.num_microbatches},
        "schedule": {"kind": "constant"},
        "log": {"interval": 1},
    }
    config = replace(
        load.build(merge([("bench", values), *((name, OPTIONS[name]) for name in options)]), TrainConfig, str), model=shape.model
    )
    machine = hardware.read()
    raise_problems([*check_train(config, 1), *check_machine(config, machine), *check_adam(config, machine)])
    return config


def gang_of(side: str) -> GangConfig:
    """Return what of a side's options a process must know before it joins and lays its grid."""
    layers = [OPTIONS.get(option, {}) for option in side.split("+")]
    variables = {name: value for keys in layers for name, value in keys.get("environment", {}).items()}
    return GangConfig(environment=variables, cuda_graphs=any("cuda_graphs" in keys for keys in layers))


def ours(shape: Shape, options: Sequence[str], grid: Groups) -> Trained:
    """Train with loop.fit; only validation and saving are left out."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        config = configure(shape, Path(folder), options)
        bare = build.build(shape.model, grid, config)
        chunks = optim.wrap(bare, config)
        optimizer = optim.build(chunks, config.optimizer, config)
        computing = kernels.find(chunks, optimizer, config, grid)
        times = Times(against_plan.prediction(shape.model, config, chunks, sharded.weights, grid), 0)
        steps = batches(shape)
        run = run_of(
            config,
            stack,
            groups=grid,
            chunks=chunks,
            against_plan=times,
            optimizer=optimizer,
            train_batches=iter([steps[number % 2] for number in range(STEPS)]),
            flops=flops_per_token(shape.model, shape.seq_length),
            peak_tflops=None,
        )
        loop.fit(run, 0)
        loss = json.loads((config.run_dir / metrics.METRICS).read_text().splitlines()[-1])["loss"]
        return Trained(times.seconds[WARM_UP:], loss, build.num_parameters(bare), _plan(times) | {"kernels": computing})


def _plan(times: Times) -> dict[str, float]:
    """Return the planner's figures; on a CPU there are none."""
    compared = times.comparison
    return {} if compared is None else {"planned_step_s": compared.step_s_planned, "planned_gib": compared.memory_gib_planned}


def bare(shape: Shape, options: Sequence[str], grid: Groups) -> Trained:
    """Train with Megatron-Core alone, its settings those of NVIDIA's script: fused cross-entropy, gradients reduced in bf16, gc by hand."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    with tempfile.TemporaryDirectory() as folder, garbage.collected(100):
        config = configure(shape, Path(folder), [*NVIDIA, *options])
        (chunk,) = build.build(shape.model, grid, config)
        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True, grad_reduce_in_fp32=False
        )
        model = DistributedDataParallel(chunk.config, settings, chunk)
        model.config.finalize_model_grads_func, model.config.no_sync_func = finalize_model_grads, model.no_sync
        adam = config.optimizer
        wanted = OptimizerConfig(
            optimizer="adam",
            lr=adam.lr,
            weight_decay=adam.weight_decay,
            adam_beta1=adam.beta1,
            adam_beta2=adam.beta2,
            adam_eps=adam.eps,
            clip_grad=adam.clip_grad,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
            overlap_param_gather=True,
        )
        optimizer = get_megatron_optimizer(wanted, [model])
        for group in optimizer.param_groups:
            group["weight_decay"] = adam.weight_decay * group["wd_mult"]
        steps = [[{name: tensor.to(host.device()) for name, tensor in each.items()} for each in step] for step in batches(shape)]

        def step(number: int) -> float:
            model.zero_grad_buffer()
            optimizer.zero_grad()
            reports = get_forward_backward_func()(
                forward_step_func=Bare.forward_step,
                data_iterator=iter(steps[number % 2]),
                model=model,
                num_microbatches=shape.num_microbatches,
                seq_length=shape.seq_length,
                micro_batch_size=1,
                forward_only=False,
            )
            optimizer.step()
            return sum(float(part["loss"]) for part in reports) / sum(float(part["tokens"]) for part in reports)

        return _timed(step, build.num_parameters([chunk]))


def transformers(shape: Shape, options: Sequence[str], grid: Groups) -> Trained:
    """Train the same architecture by transformers; packed documents by position_ids that begin anew, which its SDPA masks by."""
    from transformers import AutoConfig, AutoModelForCausalLM

    written = AutoConfig.for_model(**registry.of_model(shape.model).write_config(shape.model))
    with torch.device(host.device()):
        model = AutoModelForCausalLM.from_config(written, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.train()
    model.config.use_cache = False
    adam = OptimizerConfig()
    settings: dict[str, Any] = {"lr": adam.lr, "betas": (adam.beta1, adam.beta2), "eps": adam.eps, "weight_decay": adam.weight_decay}
    optimizer = torch.optim.AdamW(model.parameters(), **settings, fused=host.has_cuda())
    forward = torch.compile(model) if "compile" in options else model
    steps = [[{name: tensor.to(host.device()) for name, tensor in each.items()} for each in step] for step in batches(shape)]

    def step(number: int) -> float:
        total = torch.zeros((), device=host.device())
        for batch in steps[number % 2]:
            documents = {} if shape.documents is None else {"position_ids": batch["position_ids"] % shape.documents}
            loss = forward(input_ids=batch["tokens"], labels=batch["tokens"], **documents).loss / shape.num_microbatches
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return _timed(step, sum(parameter.numel() for parameter in model.parameters()))


def _timed(step: Callable[[int], float], parameters: int) -> Trained:
    """Take STEPS steps, each to the end of what it put on the device."""
    seconds, loss = [], 0.0
    for number in range(STEPS):
        began = time.perf_counter()
        loss = step(number)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return Trained(seconds[WARM_UP:], loss, parameters)


SIDES = {"ours": ours, "bare": bare, "transformers": transformers}
