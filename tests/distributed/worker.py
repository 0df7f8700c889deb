"""One rank of a test gang: trains the cases of FOLDER/cases.json in turn; rank 0 writes FOLDER/results.json."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_prism.core import log
from megatron_prism.core.config import TrainConfig
from megatron_prism.core.load import build
from megatron_prism.jobs import train
from megatron_prism.parallel import compat, groups


def main(folder: Path) -> None:
    log.setup()
    groups.join()
    results = {}
    for case in json.loads((folder / "cases.json").read_text()):
        config = build(case["config"], TrainConfig, lambda key: str(key))
        if case["start_from"] and dist.get_rank() == 0:
            start_from(config.run_dir, case["start_from"])
        dist.barrier()
        with fault(case["control"]), groups.grid(config.parallel, config.seed) as grid:
            train.train_on(config, train.plan(config, grid.world_size), grid)
        results[case["name"]] = summary(Path(case["config"]["run_dir"]))
        dist.barrier()
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def summary(run_dir: Path) -> dict[str, Any]:
    """Return a run's losses and gradient norms by step, its validation losses, and its last checkpoint."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "loss" in line}
    return {
        "loss": [steps[step]["loss"] for step in sorted(steps)],
        "grad_norm": [steps[step]["grad_norm"] for step in sorted(steps)],
        "valid_loss": [line for line in lines if "valid_loss/math" in line],
        "run_dir": str(run_dir),
    }


@contextmanager
def fault(name: str | None) -> Iterator[None]:
    """Build a known fault into the trainer: a parity test must see it."""
    if name is None:
        yield
        return
    if name in ("contiguous", "unreduced", "lost_gradient"):
        with patched(name):
            yield
        return
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megatron_prism.models import build as models
    from megatron_prism.models import norm

    compat.distributed_optimizer_with_torch_adamw()
    kept_load = DistributedOptimizer.load_state_dict
    kept = models.transformer_config, norm.LocalNorm.__init__, models.mask_padded_vocabulary
    if name == "batched_p2p":

        def batched(*args: Any) -> Any:
            config = kept[0](*args)
            config.overlap_p2p_comm, config.batch_p2p_comm = False, True
            return config

        models.transformer_config = batched
    elif name == "unmarked_norm":

        def unmarked(self: Any, *args: Any, **kwargs: Any) -> None:
            kept[1](self, *args, **kwargs)
            self.weight.sequence_parallel = False

        norm.LocalNorm.__init__ = unmarked  # type: ignore[method-assign]
    elif name == "unmasked_vocabulary":
        models.mask_padded_vocabulary = lambda *args: None
    elif name == "shared_step":

        def load_sharing_step(self: Any, state_dict: Any) -> None:
            kept_load(self, state_dict)
            states = [state for state in self.optimizer.state.values() if "step" in state]
            for state in states:
                state["step"] = states[0]["step"]

        DistributedOptimizer.load_state_dict = load_sharing_step
    try:
        yield
    finally:
        models.transformer_config, models.mask_padded_vocabulary = kept[0], kept[2]
        norm.LocalNorm.__init__ = kept[1]  # type: ignore[method-assign]
        DistributedOptimizer.load_state_dict = kept_load


@contextmanager
def patched(name: str) -> Iterator[None]:
    """Mask as if a context-parallel rank held neighbouring tokens; leave what other ranks' queries give out of the gradients; or
    ask for no gradient of a frozen embedding's output."""
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    from megatron_prism.models import local_attention, trainable

    def contiguous(size: int, rank: int, cp: int, device: Any) -> torch.Tensor:
        return torch.arange(size, device=device) + rank * size

    def unreduced(part: torch.Tensor, group: Any) -> torch.Tensor:
        return gather_from_sequence_parallel_region(part.contiguous(), tensor_parallel_output_grad=False, group=group)

    faults: dict[str, tuple[Any, str, Any]] = {
        "contiguous": (local_attention, "zigzag", contiguous),
        "unreduced": (local_attention, "gathered", unreduced),
        "lost_gradient": (trainable, "_with_gradient", lambda module, args, output: output),
    }
    with mock.patch.object(*faults[name]):
        yield


def start_from(run_dir: Path, other: dict[str, Any]) -> None:
    """Make a run folder look as if the run `other["run_dir"]` had been killed after its checkpoint of step `other["step"]`."""
    from megatron_prism.checkpoint import folder

    shutil.copytree(other["run_dir"], run_dir)
    name = f"step_{other['step']:08d}"
    for path in (run_dir / "checkpoints").glob("step_*"):
        if path.name != name:
            shutil.rmtree(path)
    folder.point_latest(run_dir / "checkpoints", name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
