"""What `prism analyze weights` costs beside reading both checkpoints once: wall seconds, CPU-seconds and peak memory, the sides in turn.

Run: python bench/analyze.py [--gb SIZE] [--rounds N] [--threads N]
Both sides are commands, and begin either with the files out of the page cache (posix_fadvise, after a sync) or in it (read once before).
The analysis pays for its imports. Reading is `dd` with blocks of 1 MiB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")  # read by torch at import

import torch
from safetensors.torch import save_file

SEED, MOVED = 1234, 0.01
HIDDEN, FFN, VOCAB, HEADS, GROUPS = 2048, 8192, 32768, 16, 4
MODELS = {"8B": 8.03e9, "24B": 23.57e9}  # parameters of LLaMA-3.1 8B and Mistral-Small 24B


def shapes(num_layers: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the tensors of a LLaMA, a file at a time: the ends, then each layer."""
    head = HIDDEN // HEADS
    yield {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    for layer in range(num_layers):
        matrices = {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (GROUPS * head, HIDDEN),
            "self_attn.v_proj": (GROUPS * head, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (FFN, HIDDEN),
            "mlp.up_proj": (FFN, HIDDEN),
            "mlp.down_proj": (HIDDEN, FFN),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }
        yield {f"model.layers.{layer}.{name}.weight": shape for name, shape in matrices.items()}


def write_models(root: Path, num_bytes: float) -> tuple[list[Path], int]:
    """Write two random bf16 LLaMAs of about so many bytes, the second one the first moved by 1 %; a file a layer. Return their bytes too."""
    ends, layer = list(shapes(1))
    count = [sum(torch.Size(shape).numel() for shape in of.values()) for of in (ends, layer)]
    num_layers = max(1, round((num_bytes / 2 - count[0]) / count[1]))
    folders = [root / "base", root / "other"]
    generator = torch.Generator().manual_seed(SEED)
    weight_map = {}
    for folder in folders:
        folder.mkdir()
    for number, of in enumerate(shapes(num_layers)):
        file = f"model-{number:05d}.safetensors"
        weight_map |= dict.fromkeys(of, file)
        base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in of.items()}
        other = {name: value + MOVED * 0.02 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
        for folder, values in zip(folders, (base, other), strict=True):
            save_file({name: value.to(torch.bfloat16) for name, value in values.items()}, folder / file, metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    for folder in folders:
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folders, sum(file.stat().st_size for file in folders[0].glob("*.safetensors"))


def place(files: list[Path], cached: bool) -> None:
    """Put files into the page cache, or out of it."""
    for file in files:
        with file.open("rb") as stream:
            if cached:
                while stream.read(1 << 24):
                    pass
            else:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(command: list[str]) -> dict[str, float]:
    """Run a command, and return its wall and CPU seconds and its peak memory beyond files' pages."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        peak = largest = 0
        while child.poll() is None:
            sizes = _memory(child.pid)
            peak, largest = max(peak, sizes.get("RssAnon:", 0)), max(largest, sizes.get("VmRSS:", 0))
            time.sleep(0.02)
        said = child.stderr.read() if child.stderr else ""
    wall_s = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert child.returncode == 0, said[-3000:]
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall_s, "cpu_s": cpu_s, "peak_bytes": peak, "peak_rss_bytes": largest}


def _memory(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split()[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "VmRSS:"))}


def measure(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Make the models, run the sides in turn with and without the page cache, and return medians."""
    models, num_bytes = write_models(root, args.gb * 1e9)
    os.sync()  # dirty pages cannot leave the cache, and nobody pays for writing them
    files = [file for model in models for file in sorted(model.glob("*.safetensors"))]
    analyze = [sys.executable, "-m", "megatron_prism.cli", "analyze", "weights", "--base", str(models[0]), "--other", str(models[1])]
    read = 'for file in "$@"; do dd if="$file" of=/dev/null bs=1M status=none; done'
    sides = {"analyze": [*analyze, "--num-threads", str(args.threads)], "read": ["sh", "-c", read, "sh", *map(str, files)]}
    rounds: dict[str, dict[str, list[dict[str, float]]]] = {}
    for cache in ("without", "with"):
        rounds[cache] = {name: [] for name in sides}
        for number in range(args.rounds):
            for name in list(sides)[:: -1 if number % 2 else 1]:
                place(files, cached=cache == "with")
                rounds[cache][name].append(timed(sides[name]))
    medians = {
        cache: {name: {key: statistics.median(one[key] for one in each) for key in each[0]} for name, each in of.items()}
        for cache, of in rounds.items()
    }
    start = timed([sys.executable, "-m", "megatron_prism.cli", "analyze", "weights", "--help"])
    return {
        "bench": "analyze",
        "bytes_a_model": num_bytes,
        "parameters": num_bytes / 2,
        "rounds": args.rounds,
        "threads": args.threads,
        "medians": medians,
        "ratios": {
            cache: [two["wall_s"] / one["wall_s"] for one, two in zip(of["analyze"], of["read"], strict=True)]
            for cache, of in rounds.items()
        },
        "help": start,
        "load": os.getloadavg(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def show(result: dict[str, Any]) -> None:
    """Print the table, what larger models would take by proportion, and one line of JSON."""
    print(f"two models of {result['bytes_a_model'] / 1e9:.2f} GB, {result['rounds']} rounds, {result['threads']} threads; medians")
    print(f"load {result['load'][0]:.1f}\n\n{'':<24}{'wall s':>8}{'CPU-s':>8}{'GB/s':>8}{'own MB':>8}{'RSS MB':>8}")
    for cache, sides in result["medians"].items():
        for name, row in sides.items():
            speed = 2 * result["bytes_a_model"] / row["wall_s"] / 1e9
            sizes = f"{row['peak_bytes'] / 1e6:>8.0f}{row['peak_rss_bytes'] / 1e6:>8.0f}"
            print(f"{name + ', ' + cache + ' cache':<24}{row['wall_s']:>8.2f}{row['cpu_s']:>8.2f}{speed:>8.2f}{sizes}")
        print(f"{'  of the reading speed':<24}{statistics.median(result['ratios'][cache]):>8.2f}")
    for name, parameters in MODELS.items():
        cpu_s = result["medians"]["with"]["analyze"]["cpu_s"] * parameters / result["parameters"]
        print(f"{name}: {cpu_s:.0f} CPU-s by proportion")
    print(json.dumps(result))


def main() -> None:
    """Measure in a folder that goes away, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0, help="gigabytes a model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="where the files are written; default: the system's temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        result = measure(Path(name), args)
    show(result)


if __name__ == "__main__":
    main()
