"""What a checkpoint costs the training that goes on: seconds blocked in the background, against waiting for it; and what hashing adds.

Run: python bench/save.py [--gib SIZE] [--rounds N]
One process, a model of random weights with its optimizer's state, written to a folder that goes away. The ways alternate, their order
changes every round. The blocked time is Saver.begin and, once the writers are done, Saver.finish; while they write nothing else runs here.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")  # read by torch at import: one thread, on the host

import numpy as np
import torch

from megatron_prism.checkpoint import folder, saving, sharded, writers
from megatron_prism.core import config as conf
from megatron_prism.core.config import SaveConfig
from megatron_prism.models import build
from megatron_prism.parallel import groups, megatron_versions
from megatron_prism.train import optim

BYTES_A_WEIGHT = 16  # fp32: the weight, its copy in the optimizer, and two moments


def model_of(gib: float, hidden: int) -> conf.ModelConfig:
    """Return a LLaMA whose checkpoint takes about so much."""
    layers = max(1, round(gib * 2**30 / BYTES_A_WEIGHT / (12 * hidden**2)))
    return conf.ModelConfig(
        family="llama",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=8 * hidden // 3 // 32 * 32,
        num_attention_heads=hidden // 64,
        num_query_groups=hidden // 64,
        kv_channels=64,
        vocab_size=512,
        max_position_embeddings=128,
    )


def cpu_s() -> float:
    """Return the CPU-seconds of this process and of those that it has waited for."""
    return sum(
        used.ru_utime + used.ru_stime for used in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


class Bare:
    """What the bench's checkpoints hold beside their tensors: a name."""

    def write(self, path: Path, step: int, facts: Any) -> None:
        folder.write_meta(path, {})


def save(run_dir: Path, trained: tuple[Any, Any, Any], step: int, background: bool) -> dict[str, float]:
    """Write one checkpoint of (chunks, optimizer, groups); return seconds blocked and in all, and CPU-seconds, of the writers too."""
    saver = saving.Saver(run_dir, SaveConfig(keep_last=1), Bare(), *trained)
    with saver:  # which waits for removals, off the clock
        started, used = time.perf_counter(), cpu_s()
        saver.begin(step, {})
        began = time.perf_counter()
        while background and saver.is_writing():
            time.sleep(0.01)
        written = time.perf_counter()
        saver.finish()
        ended = time.perf_counter()
        for child in multiprocessing.active_children():
            child.join()  # so that its CPU-seconds are known
        used = cpu_s() - used
    blocked = (began - started) + (ended - written) if background else ended - started
    return {"blocked_s": blocked, "total_s": ended - started, "cpu_s": used}


def measure(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Save in each way, round by round; return medians and the ratios' medians."""
    gang, model = conf.GangConfig(precision="fp32", seed=0), model_of(args.gib, args.hidden)
    with groups.gang(gang) as grid:
        chunks = optim.wrap(build.build(model, grid, gang), gang)
        optimizer = optim.build(chunks, conf.OptimizerConfig(), gang)

        trained = (chunks, optimizer, grid)
        ways: dict[str, Callable[[int], dict[str, float]]] = {
            "waited for": lambda step: save(root, trained, step, background=False),
            "in the background": lambda step: save(root, trained, step, background=True),
            "waited for, not hashed": lambda step: unhashed(root, trained, step),
            "Megatron-Core's own": lambda step: by_megatron(root, trained),
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for number in range(args.rounds + 1):
            for position, name in enumerate(list(ways)[:: -1 if number % 2 else 1]):
                os.sync()  # nobody waits for what another left to be written
                found[name].append(ways[name](len(ways) * number + position + 1))
        size = sum(path.stat().st_size for path in root.rglob("step_*/*/*.distcp"))
        shutil.rmtree(root)
    rounds = {name: values[1:] for name, values in found.items()}  # the first one warms up
    medians = {name: {key: float(np.median([value[key] for value in values])) for key in values[0]} for name, values in rounds.items()}

    def ratio(name: str, key: str, other: str) -> float:
        return float(np.median([a[key] / b[key] for a, b in zip(rounds[name], rounds[other], strict=True)]))

    return {
        "bench": "save",
        "hidden": args.hidden,
        "gib": size / 2**30,
        "rounds": args.rounds,
        "seconds": medians,
        "blocked_percent": 100 * ratio("in the background", "blocked_s", "waited for"),
        "blocked_percent_of_megatron": 100 * ratio("in the background", "blocked_s", "Megatron-Core's own"),
        "hashing_cpu_percent": 100 * (1 - ratio("waited for, not hashed", "cpu_s", "waited for")),
        "hashing_wall_percent": 100 * (1 - ratio("waited for, not hashed", "total_s", "waited for")),
        "torch": torch.__version__,
    }


def unhashed(root: Path, trained: tuple[Any, Any, Any], step: int) -> dict[str, float]:
    """Save without the sha256 of what is written."""
    with mock.patch.object(writers, "_sha256_behind", lambda path, is_written: "0" * 64):
        return save(root, trained, step, background=False)


def by_megatron(root: Path, trained: tuple[Any, Any, Any]) -> dict[str, float]:
    """Save as Megatron-Core does of itself: synchronously, into its folder, with neither sums nor a rename."""
    from megatron.core import dist_checkpointing

    folder = root / "megatron"
    folder.mkdir(parents=True)
    started, used = time.perf_counter(), cpu_s()
    dist_checkpointing.save(sharded.training_state(*trained, is_loading=False), str(folder), **megatron_versions.save_arguments())
    total = time.perf_counter() - started
    shutil.rmtree(folder)
    return {"blocked_s": total, "total_s": total, "cpu_s": cpu_s() - used}


def main() -> None:
    """Measure, and print the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--hidden", type=int, default=2048, help="of the model: the smaller, the more tensors hold those bytes")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = measure(Path(name) / "run", args)
    for way, values in result["seconds"].items():
        print(f"{way:<30}" + "  ".join(f"{key} {value:.3f}" for key, value in values.items()))
    for key in ("blocked_percent", "blocked_percent_of_megatron", "hashing_cpu_percent", "hashing_wall_percent"):
        print(f"{key:<30}{result[key]:.1f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
