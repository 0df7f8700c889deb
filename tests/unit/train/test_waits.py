"""Where the host waits for the device in a training step, counted on a host: whatever would read a tensor of the device, by who asks for it.

Python's calls are seen, of our code and of Megatron-Core's, forward and backward; what kernels and C++ do is not.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode

from megatron_prism.core.config import MambaConfig, ModelConfig, TrainConfig
from megatron_prism.core.load import build

READS = {"item", "tolist", "numpy", "cpu", "nonzero", "unique", "masked_select", "equal", "__bool__", "__float__", "__int__", "__index__"}
STEPS, MICROBATCHES = 3, 2
NOT_ON_A_GPU = (  # what waits for no device, or runs on no GPU
    "models/ssd.py",  # stands in for mamba_ssm's kernels
    "models/local_attention.py",  # for Transformer Engine's attention
    "megatron/core/utils.py: local_multi_tensor",  # for its multi-tensor functions
    "megatron/core/optimizer/optimizer.py: step_with_ready_grads",  # torch's AdamW, for its FusedAdam, which counts steps in Python
    "megatron/core/tensor_parallel/random.py: fork",  # the state of the host's own generator
    "megatron/core/models/common/embeddings/rotary_pos_embedding.py: get_emb",  # once, at the first step
    "megatron/core/models/common/embeddings/rope_utils.py: _apply_rotary_pos_emb_thd",  # for its fused rotary positions
    "models/batch.py: packed_documents",  # documents are counted in the host's memory
    "parallel/groups.py",  # what ranks agree on and tell each other, from the host's memory, over gloo
)
DENSE = ModelConfig(
    family="llama",
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=320,
    max_position_embeddings=64,
)
HYBRID = replace(DENSE, family="nemotron_h", num_layers=4, layer_pattern="M-*-", activation="relu2", position_embedding="none")
HYBRID = replace(HYBRID, mamba=MambaConfig(num_heads=8, head_dim=8, state_dim=8, num_groups=2, chunk_size=16))


class Waits(TorchFunctionMode):
    """Counts calls that read a tensor, and copies to the device that wait, by the file and function that make them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        places = [str(each) for each in (*args, *kwargs.values()) if isinstance(each, (str, torch.device))]
        copies = func is torch.tensor or (func is torch.Tensor.to and not kwargs.get("non_blocking"))
        leaves = func is torch.Tensor.to and "cpu" in places
        if getattr(func, "__name__", "") in READS or leaves or (copies and any(place.startswith("cuda") for place in places)):
            self.found[_asker()] += 1
        return func(*args, **kwargs)


def _asker() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        for package in ("megatron_prism/", "megatron/core/"):
            before, found, file = frame.f_code.co_filename.rpartition(package)
            if found and not before.endswith("tests/"):
                return f"{'' if package == 'megatron_prism/' else package}{file}: {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Within the block waits are counted, in backward passes too, where torch would disable the mode."""
    mode, run = Waits(), torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def run_counted(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return run(*args, **kwargs)

    with mode, mock.patch.object(torch.autograd, "_engine_run_backward", run_counted):
        yield mode.found


def waits_of(grid: Any, model: dict[str, Any], keys: dict[str, Any], reads_twice: bool) -> dict[str, int]:
    """On a rank: the waits of STEPS steps of the loop itself, by who asks. reads_twice: with a loop that reads the loss when it has it."""
    from bench.trainer import run_of
    from megatron_prism.models import build as models
    from megatron_prism.parallel import host
    from megatron_prism.planning.flops import Flops
    from megatron_prism.train import loop, optim
    from megatron_prism.train.against_plan import AgainstPlan

    architecture = build(model, ModelConfig, str)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        data, batch = {"prepared": folder, "seq_length": 32}, {"global_size": MICROBATCHES}
        values = {"run_dir": folder, "steps": STEPS, "data": data, "batch": batch, "schedule": {"kind": "constant"}}
        config = build({**values, **keys}, TrainConfig, str)
        chunks = optim.wrap(models.build(architecture, grid, config), config)
        run = run_of(
            config,
            stack,
            groups=grid,
            chunks=chunks,
            optimizer=optim.build(chunks, config.optimizer, config),
            train_batches=iter([[_microbatch(keys) for _ in range(MICROBATCHES)] for _ in range(STEPS)]),
            flops=Flops(1.0, 1.0),
            peak_tflops=None,
            against_plan=AgainstPlan(None, 0),
        )
        if reads_twice:
            original = loop.forward_backward
            stack.enter_context(mock.patch.object(loop, "forward_backward", lambda *args: _read(original(*args))))
        stack.enter_context(
            mock.patch.object(host, "device", lambda: torch.device("cuda", 0))
        )  # the host's stand-in makes it the host again
        with counted() as found:
            loop.fit(run, 0)
    return {name: number for name, number in found.items() if not name.startswith(NOT_ON_A_GPU)}


def _read(sums: Any) -> Any:
    float(sums.values[0])
    return sums


def _microbatch(keys: dict[str, Any]) -> dict[str, torch.Tensor]:
    tokens_BS = torch.arange(32)[None] % 300
    batch = {"tokens": tokens_BS, "labels": tokens_BS, "loss_mask": torch.ones(1, 32), "position_ids": torch.arange(32)[None]}
    return batch | ({"document_ids": (batch["position_ids"] // 16).int()} if keys.get("data", {}).get("document_mask") else {})


OURS = {"train/step.py: read": STEPS}
# one a step, and only before 0.19 (or without Transformer Engine): there the norm stays on the device, and `read` brings it too
MEGATRON = {"megatron/core/optimizer/clip_grads.py: get_grad_norm_fp32": STEPS}


PLAIN = {"precision": "fp32", "parallel": {"distributed_optimizer": False}}
MASKED = {"data": {"prepared": "none", "seq_length": 32, "document_mask": True}}
CASES: dict[str, tuple[ModelConfig, dict[str, Any], int]] = {
    "dense": (DENSE, {}, 1),
    "hybrid": (HYBRID, {}, 1),
    "fp32 without a distributed optimizer": (DENSE, PLAIN, 1),
    "masked documents": (DENSE, MASKED, 1),
    "hybrid, masked documents": (HYBRID, MASKED, 1),
    "tp 2": (DENSE, {"parallel": {"tp": 2, "sequence_parallel": True}}, 2),
    "pp 2": (HYBRID, {"parallel": {"pp": 2}}, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_once_in_our_code(run_distributed: Callable[..., list[Any]], case: str) -> None:
    model, keys, ranks = CASES[case]
    found = run_distributed(waits_of, ranks, parallel=keys.get("parallel", {}), model=asdict(model), keys=keys, reads_twice=False)
    assert found == [OURS | MEGATRON] * ranks


def test_control_a_loss_that_is_read_at_once_is_seen(run_distributed: Callable[..., list[Any]]) -> None:
    found = run_distributed(waits_of, 1, model=asdict(DENSE), keys={}, reads_twice=True)[0]
    assert found != OURS | MEGATRON and sum(found.values()) == 3 * STEPS
