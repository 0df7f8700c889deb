"""TP 2, PP 2 and CP 2 beside one rank, over NCCL where there are two GPUs: python -m tests.gpu.layouts FIXTURES WORK."""

from __future__ import annotations

from typing import Any

import torch

from megatron_prism.parallel import host
from tests.gpu import options, runs
from tests.gpu.fixtures import HYBRID
from tests.gpu.options import Options
from tests.gpu.report import check

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp 2": {"tp": 2, "sequence_parallel": True},
    "pp 2": {"pp": 2},
    "cp 2": {"cp": 2},
    "dp 2": {"overlap_grad_reduce": True, "overlap_param_gather": True},
}
TOLERANCE = {
    True: 2e-3,
    False: 1e-5,
}  # of a loss, in fp32: with CUDA as if matrix products were in TF32, until figures show that they are not
STEPS = 6


def main(given: Options) -> None:
    """Train a dense model and a hybrid on each layout, in fp32; tiny: the dense one on TP 2."""
    families = ["llama"] if given.tiny else ["llama", HYBRID]
    for family in families:
        if host.has_cuda() and torch.cuda.device_count() < 2:
            with check("layouts", family) as result:
                result.skip("this machine has one GPU")
            continue
        layouts = {name: LAYOUTS[name] for name in (("tp 2",) if given.tiny else LAYOUTS)}
        one = train(given, family, "one", {}, 1)
        other = train(given, family, "control", {}, 1, optimizer={"lr": 7e-4})
        for name, parallel in layouts.items():
            with check("layouts", f"{family} {name}") as result:
                losses = train(given, family, name, parallel, 2)
                result.figures = {
                    "largest_difference": runs.largest_difference(one, losses),
                    "control": runs.largest_difference(other, losses),  # a learning rate a sixth larger
                }
                tolerance = TOLERANCE[host.has_cuda()]
                result.ok = result.figures["largest_difference"] <= tolerance < result.figures["control"]


def train(given: Options, family: str, name: str, parallel: dict[str, Any], nproc: int, **more: Any) -> dict[int, tuple[float, float]]:
    """Return the losses of a run on a layout."""
    run_dir = given.work / f"{family}_{name.replace(' ', '')}"
    keys = {"precision": "fp32", "steps": STEPS, "parallel": parallel, **more}
    runs.must(runs.prism("train", runs.config(given, run_dir, family, **keys), "--nproc", nproc))
    return runs.losses(run_dir)


if __name__ == "__main__":
    main(options.read())
