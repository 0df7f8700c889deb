"""Import or export a folder, or merge the folders `0` and `1` in it, and print the memory it took beyond the interpreter's, in bytes: peak.py JOB SOURCE TARGET TINY.

The peak is Linux's own (VmHWM), reset once everything is imported and a tiny model has gone the same way:
ru_maxrss would begin with the peak of the parent process.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

from megatron_prism.core import log
from megatron_prism.core.config import MergeConfig, MergeModelConfig
from megatron_prism.hf import safetensors
from megatron_prism.jobs import convert, merge


def status_bytes(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def run(job: str, source: Path, target: Path) -> object:
    if job == "import":
        return convert.run_import(source, target, dry_run=False)
    if job == "export":
        return convert.run_export(source, target, dry_run=False)
    if job == "merge":
        models = tuple(MergeModelConfig(path=source / str(number), weight=0.5) for number in range(2))
        return merge.run(MergeConfig(out=target, models=models))
    shards = safetensors.open_shards(source)
    with safetensors.open_files(source, shards) as files:  # the control: all at once
        return [safetensors.read_values(files[shard.file], place, 0, math.prod(place.shape)) for shard in shards for place in shard.tensors]


def main(job: str, source: Path, target: Path, tiny: Path) -> None:
    log.setup()
    torch.set_num_threads(1)
    run(job, tiny, target.with_name(target.name + "-tiny"))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status_bytes("VmRSS")
    kept = run(job, source, target)
    print(status_bytes("VmHWM") - before)
    del kept


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:5]))
