"""`prism analyze weights --run`: how far each checkpoint of a run is from its start and from the one before, as stored and in fp32 main weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prism.analysis import weights
from megatron_prism.checkpoint import at_rest, folder
from megatron_prism.checkpoint.at_rest import AtRest
from megatron_prism.core.errors import InputError, Problem
from megatron_prism.jobs import analyze


def run(run_dir: Path, base: Path | None, num_threads: int, seed: int) -> dict[str, Any]:
    """Return the change of each checkpoint of a run by step, without its single tensors. base: what the run began from; None: its first checkpoint.

    Raises: InputError, CheckpointError where there are no two models to compare, or they differ in more than their weights.
    """
    if not run_dir.is_dir():
        raise InputError(Problem("--run", f"{run_dir}, which is no folder", "a folder of prism train or prism rl"))
    steps = [path for path in folder.steps(run_dir / "checkpoints") or folder.steps(run_dir) if (path / folder.META).is_file()]
    if len(steps) < (1 if base else 2):
        fix = "save.keep_every keeps them" if steps else "a folder of prism train or prism rl"
        raise InputError(Problem(str(run_dir), f"{len(steps)} checkpoints", "two to compare, or one and --base", fix))
    models = [at_rest.read(path) for path in ([base] if base else []) + steps]
    first, compared = models[0], models[1:]
    checkpoints: dict[str, Any] = {}
    for previous, model in zip(models, compared, strict=False):
        is_first = previous.path == first.path
        from_base, main = _change(first, model, num_threads, seed), analyze.compare_masters(first, model, num_threads, seed)
        checkpoints[str(folder.read(model.path).step)] = {
            "from_base": from_base,
            "from_previous": from_base if is_first else _change(previous, model, num_threads, seed),
            "masters": None if main is None else _masters(main, previous, model, is_first, num_threads, seed),
        }
    return {
        "kind": "analysis",
        "analysis": "trajectory",
        "run": str(run_dir),
        "base": str(first.path),
        "thresholds": list(weights.THRESHOLDS),
        "null": analyze.WEIGHTS_NULL,
        "checkpoints": checkpoints,
    }


def _change(old: AtRest, new: AtRest, num_threads: int, seed: int) -> dict[str, Any]:
    return analyze.without_tensors(analyze.compare([old, new], num_threads, seed))


def _masters(main: Mapping[str, Any], previous: AtRest, model: AtRest, is_first: bool, num_threads: int, seed: int) -> dict[str, Any]:
    """Return a checkpoint's figures of its main weights. main: against the start, with the rounding."""
    from_base = {key: value for key, value in main.items() if key != "rounding"}
    whole = at_rest.masters(model)
    assert whole is not None
    return {
        "from_base": from_base,
        "from_previous": from_base if is_first else _change(at_rest.masters(previous) or previous, whole, num_threads, seed),
        "rounding": main["rounding"],
    }
