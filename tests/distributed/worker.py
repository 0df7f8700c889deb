"""One rank of a test gang: trains the cases of a folder's cases.json in turn; rank 0 writes its results.json."""

from __future__ import annotations

import faulthandler
import gc
import importlib.util
import itertools
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_prism.checkpoint import optimizer_state, sharded
from megatron_prism.core import log
from megatron_prism.core.config import TrainConfig
from megatron_prism.core.load import build
from megatron_prism.core.manifest import write_json
from megatron_prism.jobs import train
from megatron_prism.parallel import groups, megatron_versions


def main(home: Path) -> None:
    """Train the cases of one folder after another, as the files 1, 2, ... of `home` name them; an empty one ends it."""
    log.setup()
    groups.join(timeout_s=7200.0)
    gc.freeze()  # what was imported so far: forget() need not look through that again and again
    for number in itertools.count(1):
        folder = groups.from_first(next_folder(home / str(number)) if dist.get_rank() == 0 else None)
        if folder is None:
            break
        train_cases(folder)
    dist.destroy_process_group()


def next_folder(path: Path) -> Path | None:
    """Wait for a file, and return the folder that it names."""
    while not path.is_file():
        time.sleep(0.05)
    text = path.read_text()
    return Path(text) if text else None


def train_cases(folder: Path) -> None:
    results = {}
    for case in json.loads((folder / "cases.json").read_text()):
        faulthandler.dump_traceback_later(600)  # no case takes nearly as long: show where the rank hangs
        config = build(case["config"], TrainConfig, lambda key: str(key))
        if case["start_from"] and dist.get_rank() == 0:
            start_from(config.run_dir, case["start_from"])
        dist.barrier()
        again = saved_again(config.run_dir) if case["save_again"] else nullcontext()
        with fault(case["control"]), again, groups.grid(config) as grid:
            if case["call"]:
                results[case["name"]] = call(case["call"], config, grid)
            else:
                train.train_in_gang(train.resolve(config, grid.world_size), grid)
                results[case["name"]] = summary(Path(case["config"]["run_dir"]))
        del grid
        forget()
        dist.barrier()
    faulthandler.cancel_dump_traceback_later()
    if dist.get_rank() == 0:
        write_json(folder / "results.json", results)


def call(named: dict[str, Any], config: TrainConfig, grid: groups.Groups) -> Any:
    """Return what a function of a file finds: {"file", "function", and its further arguments}."""
    arguments = dict(named)
    path, name = Path(arguments.pop("file")), arguments.pop("function")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)(config, grid, **arguments)


def forget() -> None:
    """Let go of what Megatron-Core keeps of a model that is gone: its process groups hold threads, which spin once a peer has closed its own."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    RotaryEmbedding.forward.cache_clear()  # its keys are modules and groups
    for nodes in [found.grad_accs for found in gc.get_objects() if isinstance(found, DistributedDataParallel)]:
        nodes.clear()  # autograd's, whose hooks hold the wrapper: a cycle that no collection sees
    gc.collect()


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
    from megatron_prism.models import build as models
    from megatron_prism.models import norm

    kept_restore, kept_boxes, kept_load = optimizer_state.restore, optimizer_state.boxes, sharded.load_training
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

        def restore_sharing_step(optimizer: Any, loaded: Any) -> None:
            kept_restore(optimizer, loaded)
            states = [state for part in optimizer.chained_optimizers for state in part.optimizer.state.values()]
            for state in states:
                state["step"] = states[0]["step"]

        optimizer_state.restore = restore_sharing_step
    elif name == "shifted_boxes":

        def shifted(start: int, end: int, shape: Any) -> list[Any]:
            found = kept_boxes(start, end, shape)
            fits = len(shape) > 1 and all(box.offset[0] + box.size[0] < shape[0] for box in found)
            return [replace(box, offset=(box.offset[0] + fits, *box.offset[1:])) for box in found]

        def load_shifted(*args: Any) -> None:
            optimizer_state.boxes = shifted
            try:
                kept_load(*args)
            finally:
                optimizer_state.boxes = kept_boxes

        sharded.load_training = load_shifted
    try:
        yield
    finally:
        models.transformer_config, models.mask_padded_vocabulary = kept[0], kept[2]
        norm.LocalNorm.__init__ = kept[1]  # type: ignore[method-assign]
        optimizer_state.restore, sharded.load_training = kept_restore, kept_load


@contextmanager
def saved_again(run_dir: Path) -> Iterator[None]:
    """Save what a run resumes from as soon as it is loaded, on the layout that it is loaded to."""
    from megatron.core import dist_checkpointing

    kept = sharded.load_training

    def load_and_save(path: Path, chunks: Any, optimizer: Any, grid: Any, *beside: Any) -> None:
        kept(path, chunks, optimizer, grid, *beside)
        if grid.rank == 0:
            (run_dir / "again").mkdir()
        dist.barrier()
        state = sharded.training_state(chunks, optimizer, grid, is_loading=False)
        dist_checkpointing.save(state, str(run_dir / "again"), **megatron_versions.save_arguments())

    sharded.load_training = load_and_save
    try:
        yield
    finally:
        sharded.load_training = kept


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
