"""Our training step's speed and memory, judged: python -m tests.gpu.throughput FIXTURES WORK --group dense|hybrid|lengths.

The figures are bench/gpu.py's, of one run on one device. On a CPU nothing is judged but that every side runs.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from typing import Any

from bench import gpu
from megatron_prism.core.config import GangConfig
from megatron_prism.parallel import environment, groups, host
from tests.gpu import options
from tests.gpu.options import Options
from tests.gpu.report import Check, check

GROUPS: dict[str, dict[str, tuple[str, ...]]] = {  # by group, of each shape its sides, by worth
    "dense": {"dense": ("ours", "transformers", "matmul", "ours+fp8", "bare")},
    "hybrid": {"hybrid": ("ours", "ours+fp8", "transformers")},
    "lengths": {name: ("ours", "transformers") for name in ("window", "32k", "packed")},
}
FASTER_THAN_TRANSFORMERS, NEAR_BARE, OF_THE_MATRIX_RATE, FP8_GAIN, NEAR_PLAN = 1.15, 0.03, 0.70, 1.3, 0.05
LIMIT_S = 90.0  # no side of a group is begun after this time
Sides = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Claim:
    """What is claimed of a side beside another: a name, the two sides, and the bounds of the ratio of a figure of both."""

    name: str
    side: str
    other: str
    figure: str
    low: float
    high: float = float("inf")


CLAIMS = (
    Claim("faster than transformers", "ours", "transformers", "tokens_per_s", FASTER_THAN_TRANSFORMERS),
    Claim("as fast as a bare Megatron-Core loop", "ours", "bare", "tokens_per_s", 1 - NEAR_BARE),
    Claim("of the matrix rate", "ours", "matmul", "tflops", OF_THE_MATRIX_RATE),
    Claim("FP8 tensorwise beside bf16", "ours+fp8", "ours", "tokens_per_s", FP8_GAIN),
)


def main(given: Options) -> None:
    """Measure the shapes of the group in one process, then judge."""
    began = time.monotonic()
    os.environ.pop("MAMBA_DETERMINISTIC", None)  # speed is that of the kernels which mamba_ssm's autotuner chooses
    environment.set_variables(GangConfig())
    groups.join()
    for shape, names in GROUPS[given.group].items():
        sides: Sides = {}
        for name in names:
            with check(f"throughput {given.group}", f"{shape}: {name}") as result:
                if time.monotonic() - began > LIMIT_S * (3 if given.tiny else 1):
                    result.skip("the time is spent")
                elif "fp8" in name and not host.has_cuda():
                    result.skip("FP8 needs a device")
                else:
                    sides[name] = gpu.measure(shape, name, given.tiny)
                    result.figures = shown(sides[name])
                    result.ok = "error" not in result.figures
        judge(given, shape, sides)
    sys.stdout.flush()
    os._exit(0)


def shown(figures: dict[str, Any]) -> dict[str, Any]:
    """Return a side's figures without its name, and of its kernels the attention."""
    attention = figures.get("kernels", {}).get("attention")
    backend = attention["backend"] if isinstance(attention, dict) else attention
    kept = {name: value for name, value in figures.items() if name not in ("shape", "side", "kernels")}
    return kept | ({} if backend is None else {"attention": backend})


def judge(given: Options, shape: str, sides: Sides) -> None:
    """Check the claims of a shape whose two sides were measured, and our memory and time against the plan."""
    for claim in CLAIMS:
        pair = [sides.get(name, {}) for name in (claim.side, claim.other)]
        if all(claim.figure in each for each in pair):
            with check(f"throughput {given.group}", f"{shape}: {claim.name}") as result:
                ratio = pair[0][claim.figure] / pair[1][claim.figure]
                result.figures = {"ratio": ratio, "required": claim.low}
                settle(result, claim.low <= ratio <= claim.high)
    for name, figures in sides.items():
        if "planned_gib" in figures:
            with check(f"throughput {given.group}", f"{shape}: {name} against the plan") as result:
                memory, step = figures["peak_gib"] / figures["planned_gib"] - 1, figures["step_s"] / figures["planned_step_s"] - 1
                result.figures = {"memory": memory, "step": step, "required_memory": NEAR_PLAN}
                settle(result, abs(memory) <= NEAR_PLAN)


def settle(result: Check, holds: bool) -> None:
    """Judge on a device; on a CPU a ratio means nothing."""
    result.ok = holds if host.has_cuda() else None
    if result.ok is None:
        result.figures["skipped"] = "judged on a device alone"


if __name__ == "__main__":
    main(options.read())
