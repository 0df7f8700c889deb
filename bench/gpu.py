"""Our training step on a GPU at real widths: beside transformers, a bare Megatron-Core loop, a matrix product, and the planner's figures.

Run: python -m bench.gpu [--shape NAME] [--sides SIDE ...] [--tiny] [--budget-s S]      (from the repository's root)
A side is a trainer (bench/gpu_sides.py) with options behind plus signs. The trainers: ours, bare, transformers. The options: fp8, delayed,
blockwise (of ours and bare); ce-native, ce-te, wgrad, grads-bf16, moments, norms-cudnn, gc, chunks, graphs, and all, which is ce-te, wgrad and gc
(of ours); compile (of transformers). matmul is a matrix product.
All sides of one run share a process, but those with environment variables of their own (norms-cudnn, graphs): for a peak of memory that nothing
before it can touch, run a side alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.gpu_sides import OWN_PROCESS, SIDES, Shape, gang_of
from megatron_prism.core import log
from megatron_prism.core.config import GangConfig, ModelConfig
from megatron_prism.core.layers import merge, read_layers
from megatron_prism.core.load import build
from megatron_prism.parallel import environment, groups, host
from megatron_prism.planning.flops import flops_per_token
from tests.distributed.worker import forget

MODELS = Path(__file__).resolve().parents[1] / "configs" / "models"
CUBE = 8192
# every shape has 32,768 tokens a step; of a preset its widths, with fewer layers
SHAPES: dict[str, tuple[str, dict[str, Any], int, int | None]] = {
    "dense": ("llama-3.1-8b", {"num_layers": 8}, 8192, None),
    "hybrid": ("nemotron-h-8b", {"layer_pattern": "M-M-M-M*-M-M-", "num_layers": 13}, 8192, None),
    "window": ("mistral-7b-v0.1", {"num_layers": 8}, 8192, None),
    "32k": ("llama-3.1-8b", {"num_layers": 4}, 32768, None),
    "packed": ("llama-3.1-8b", {"num_layers": 8}, 8192, 1024),
}
TOKENS = 32768
ALONE = ("ce-native", "ce-te", "wgrad", "grads-bf16", "moments", "norms-cudnn", "gc", "chunks", "graphs")
TOGETHER = ("all", "all+grads-bf16", "all+moments", "all+grads-bf16+moments", "all+grads-bf16+moments+norms-cudnn", "all+graphs")
FULL = (
    "matmul",
    "ours",
    *(f"ours+{name}" for name in (*ALONE, *TOGETHER)),
    "ours+fp8",
    "ours+fp8+all",
    "ours+fp8+all+grads-bf16+moments",
    "ours+delayed",
    "ours+blockwise",
    "bare",
    "bare+fp8",
)
PEERS = ("transformers", "transformers+compile")
DEFAULT = {"dense": (*FULL, *PEERS), "hybrid": ("ours", "ours+all", "ours+all+moments", "ours+fp8", "ours+graphs", "transformers")}
SMALL: dict[str, Any] = {"hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16}


def shape_of(name: str, tiny: bool) -> Shape:
    """Return a shape; tiny: for a CPU, with all its kinds of layers."""
    preset, changes, seq_length, documents = SHAPES[name]
    model = build(merge(read_layers(MODELS / f"{preset}.yaml", ()))["model"] | changes, ModelConfig, str)
    if not tiny:
        return Shape(model, seq_length, TOKENS // seq_length, documents)
    window = None if model.window_size is None else 16
    model = replace(model, **SMALL, vocab_size=256, window_size=window)
    if model.mamba is not None:
        model = replace(model, mamba=replace(model.mamba, num_heads=16, head_dim=16, state_dim=16, num_groups=2))
    return Shape(model, 64, 2, None if documents is None else 24)


def measure(name: str, side: str, tiny: bool) -> dict[str, Any]:
    """Return the figures of a side of a shape, or its error: others can be measured all the same. The process group is joined."""
    shape, (trainer, *options) = shape_of(name, tiny), side.split("+")
    result: dict[str, Any] = {"shape": name, "side": side}
    forget()  # the side before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        if trainer == "matmul":
            return result | {"tflops": matmul_tflops()}
        with groups.grid(gang_of(side)) as grid:
            trained = SIDES[trainer](shape, options, grid)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's own, and what a library asserts
        return result | {"error": f"{type(error).__name__}: {error}"[:600]}
    step_s, num_tokens = statistics.median(trained.seconds), shape.num_microbatches * shape.seq_length
    return result | {
        "parameters": trained.parameters,
        "step_s": step_s,
        "spread": max(trained.seconds) / min(trained.seconds),
        "tokens_per_s": num_tokens / step_s,
        "tflops": num_tokens / step_s * flops_per_token(shape.model, shape.seq_length).causal / 1e12,
        "peak_gib": host.peak_memory_bytes() / 2**30,
        "loss": trained.loss,
        **trained.more,
    }


def measure_alone(name: str, side: str, tiny: bool) -> dict[str, Any]:
    """Return the figures of a side that is measured by a process of its own."""
    command = [sys.executable, "-m", "bench.gpu", "--shape", name, "--sides", side, *["--tiny"] * tiny]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"shape": name, "side": side, "error": done.stderr[-600:]}
    return json.loads(done.stdout.splitlines()[-1])["results"][0]


def matmul_tflops() -> float:
    """Return the rate of a bf16 matrix product of CUBE by CUBE by CUBE (64 on a CPU)."""
    size, repeats = (CUBE, 20) if host.has_cuda() else (64, 20)
    one, other = (torch.randn(size, size, device=host.device(), dtype=torch.bfloat16) for _ in range(2))
    for _ in range(repeats):
        one @ other
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        one @ other
    torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - began) / 1e12


def run(name: str, sides: Sequence[str], tiny: bool, budget_s: float) -> list[dict[str, Any]]:
    """Measure the sides of a shape one after another, as long as the budget lasts; print each."""
    ends, results = time.monotonic() + budget_s, []
    environment.set_variables(gang_of(sides[0]) if len(sides) == 1 else GangConfig())
    groups.join()
    for side in sides:
        if time.monotonic() > ends:
            results.append({"shape": name, "side": side, "error": "the time budget is spent"})
        elif len(sides) > 1 and not OWN_PROCESS.isdisjoint(side.split("+")):
            results.append(measure_alone(name, side, tiny))
        else:
            results.append(measure(name, side, tiny))
        show(results[-1])
    return results


def show(result: dict[str, Any]) -> None:
    """Print a side as a line."""
    words = {name: f"{value:,.4g}" if isinstance(value, float) else value for name, value in result.items() if name != "kernels"}
    print("  ".join(f"{name} {value}" for name, value in words.items()), file=sys.stderr, flush=True)


def main() -> None:
    """Measure, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="dense")
    parser.add_argument("--sides", nargs="+", help="default: all that the shape is for")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, to see that it runs")
    parser.add_argument("--budget-s", type=float, default=3600.0, help="no side is begun after this time")
    given = parser.parse_args()
    log.setup()
    sides = given.sides or DEFAULT.get(given.shape, ("ours", "transformers"))
    results = run(given.shape, sides, given.tiny, given.budget_s)
    print(json.dumps({"bench": "gpu", "device": host.device_name(), "torch": torch.__version__, "tiny": given.tiny, "results": results}))
    sys.stdout.flush()
    os._exit(0)  # a process group's end could wait


if __name__ == "__main__":
    main()
