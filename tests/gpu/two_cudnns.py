"""A run with two cuDNNs in its process ends with exit code 4 and the cure; with the cure it trains: python -m tests.gpu.two_cudnns FIXTURES WORK.

Transformer Engine loads the cuDNN of CUDNN_HOME, else the one under CUDA's own folder, before torch loads the one that came with it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from megatron_prism.parallel import host
from tests.gpu import options, runs
from tests.gpu.options import Options
from tests.gpu.report import Check, check
from tests.gpu.saving import LARGE

LONG = 2048  # a run of shorter sequences than train/kernels.py's LONG is not refused


def main(given: Options) -> None:
    """Run with both, then with torch's alone."""
    home = cudnn_of_torch()
    for name in ("two cuDNNs", "CUDNN_HOME"):
        with check("two_cudnns", name) as result:
            if not host.has_cuda():
                result.skip("no CUDA device")
            elif home is None:
                result.skip("torch's cuDNN is no package of its own here")
            elif name == "CUDNN_HOME":
                cured(given, result, home)
            else:
                refused(given, result, home)


def refused(given: Options, result: Check, home: Path) -> None:
    """Train without CUDNN_HOME: refused, with the cure, where a second cuDNN is loaded then."""
    run_dir, ended = train(given, "refused", None)
    if ended.code == 0 and len(runs.kernels(run_dir)["cudnn"]["loaded_from"]) < 2:
        result.skip("this machine has one cuDNN")
        return
    said = next((line for line in ended.said.splitlines() if "CUDNN_HOME" in line), ended.said[-600:])
    result.figures = {"exit_code": ended.code, "said": said}
    result.ok = ended.code == 4 and f"CUDNN_HOME={home}" in said


def cured(given: Options, result: Check, home: Path) -> None:
    """Train with CUDNN_HOME: with fused attention."""
    run_dir, ended = train(given, "cured", str(home))
    runs.must(ended)
    result.figures = {"attention": runs.attention(run_dir), "cudnn": runs.kernels(run_dir)["cudnn"]}
    result.ok = result.figures["attention"] in ("fused", "flash")


def train(given: Options, name: str, cudnn_home: str | None) -> tuple[Path, runs.Ended]:
    """Train some steps from scratch on long sequences."""
    run_dir = given.work / name
    keys = {
        "init": {"checkpoint": None, "tokenizer": str(given.fixtures / "tokenizer")},
        "model": {**LARGE, "num_layers": 2, "max_position_embeddings": LONG},
        "data": {"seq_length": LONG},
        "batch": {"global_size": 2, "micro_size": 1},
        "deterministic": False,
        "schedule": {"warmup_steps": 0},
        "steps": 3,
    }
    path = runs.config(given, run_dir, **keys)
    return run_dir, runs.prism("train", path, more={"CUDNN_HOME": cudnn_home, "CUDNN_PATH": None})


def cudnn_of_torch() -> Path | None:
    """Return the folder of the cuDNN that pip installed for torch."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).resolve().parents[1] / "nvidia" / "cudnn"  # as /proc names what is loaded
    return folder if (folder / "lib").is_dir() else None


if __name__ == "__main__":
    main(options.read())
