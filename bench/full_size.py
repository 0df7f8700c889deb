"""What the jobs that read whole checkpoints need at a published model's real size: wall and CPU seconds, peak memory, and whether bytes come back.

Run: python -m bench.full_size [--preset configs/models/llama-3.1-8b.yaml] [--work FOLDER] [--keep]
The weights are random bf16 in the shapes and names of the preset's model, in shards of 5 GB as published models have them. Each job is a command
of its own, in the order of a user's walk. FOLDER needs the room of three models: 48 GB for one of 8 billion parameters. A job that needs the whole
model in memory (verify, generate) is left out where the machine has less.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="2", MKL_NUM_THREADS="2", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")  # read by torch at import

import psutil
import torch
from safetensors.torch import save_file

from bench.analyze import timed
from megatron_prism.core.config import ModelConfig
from megatron_prism.core.layers import merge, read_layers
from megatron_prism.core.load import build
from megatron_prism.families import registry
from tools.smoke import write_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SEED, SHARD_BYTES, GB = 1234, 5e9, 1e9
TEXTS = [f"The sum of {a} and {b} is {a + b}." for a in range(40) for b in range(40)]
SELF_MERGE = (0.15, 0.85)  # the paper's; of a model with itself: the same bytes


def shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Yield the names of each file's tensors, in the model's order, up to SHARD_BYTES a file."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        num_bytes = 2 * torch.Size(shape).numel()
        if names and size + num_bytes > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += num_bytes
    yield names


def write_model(root: Path, model: ModelConfig) -> int:
    """Write a random bf16 model as a Hugging Face folder, a shard in memory at a time; return the bytes of its tensors."""
    write_tokenizer(root, TEXTS)
    config = registry.of_model(model).write_config(model) | {"torch_dtype": "bfloat16"}
    (root / "config.json").write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(SEED)
    shapes = {name: shape for rule in registry.rules(model) for name, shape in rule.hf}
    files = list(shards(shapes))
    weight_map = {}
    for number, names in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02, generator=generator) for name in names}
        save_file(tensors, root / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return total


def differing(one: Path, other: Path) -> list[str]:
    """Return the safetensors files that two folders do not both have with the same bytes."""
    names = {path.name for folder in (one, other) for path in folder.glob("*.safetensors")}
    _, unequal, absent = filecmp.cmpfiles(one, other, sorted(names), shallow=False)
    return unequal + absent


def prism(*words: object) -> dict[str, float]:
    """Run one of our commands; return what it took."""
    print("prism", *words, file=sys.stderr, flush=True)
    return timed([sys.executable, "-m", "megatron_prism.cli", *map(str, words)])


def walk(work: Path, model: ModelConfig) -> dict[str, Any]:
    """Make the model, take it through the jobs, and return its bytes, what each job took, and which files came back otherwise."""
    hf, ckpt, out = work / "hf", work / "ckpt", work / "out"
    size = write_model(hf, model)
    jobs = {"convert import": prism("convert", "import", "--hf", hf, "--out", ckpt)}
    whole = psutil.virtual_memory().available > 1.15 * size
    if whole:
        jobs["generate, 8 tokens"] = prism("generate", "--ckpt", ckpt, "--prompt", "The sum of", "--max-tokens", 8, "--greedy")
        jobs["generate --hf, 8 tokens"] = prism("generate", "--hf", hf, "--prompt", "The sum of", "--max-tokens", 8, "--greedy")
    if psutil.virtual_memory().available > 2.3 * size:
        jobs["convert verify, bf16"] = prism("convert", "verify", "--hf", hf, "--ckpt", ckpt, "--precision", "bf16")
    jobs["convert export"] = prism("convert", "export", "--ckpt", ckpt, "--out", out)
    unequal = {"export": differing(hf, out)}
    shutil.rmtree(ckpt)
    jobs["analyze weights"] = prism("analyze", "weights", "--base", hf, "--other", out)
    one, other = SELF_MERGE
    merged = work / "merged"
    jobs["merge"] = prism("merge", "--model", f"{hf}={one}", "--model", f"{out}={other}", "--out", merged)
    unequal["merge of the model with itself"] = differing(hf, merged)
    return {"bytes": size, "jobs": jobs, "differing": unequal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--preset", type=Path, default=ROOT / "configs" / "models" / "llama-3.1-8b.yaml")
    parser.add_argument("--work", type=Path, help="a folder with room, in which a new one is made")
    parser.add_argument("--keep", action="store_true", help="leave the models there")
    args = parser.parse_args()
    model = build(merge(read_layers(args.preset, ()))["model"], ModelConfig, str)
    work = Path(tempfile.mkdtemp(prefix="full_size_", dir=args.work))
    try:
        found = walk(work, model)
    finally:
        if not args.keep:
            shutil.rmtree(work)
    print(
        f"{args.preset.stem}, {found['bytes'] / GB:.2f} GB in bf16\n\n| job | wall s | CPU-s | memory of its own, GB | peak RSS, GB |\n| --- | --- | --- | --- | --- |"
    )
    for name, took in found["jobs"].items():
        memory = f"{took['peak_bytes'] / GB:.2f} | {took['peak_rss_bytes'] / GB:.2f}"
        print(f"| {name} | {took['wall_s']:.1f} | {took['cpu_s']:.1f} | {memory} |")
    for name, files in found["differing"].items():
        print(f"{name}: {'every file byte for byte' if not files else 'DIFFERS: ' + ', '.join(files)}")
    versions = {"torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
    print(json.dumps({"preset": args.preset.stem, **found, **versions}))


if __name__ == "__main__":
    main()
