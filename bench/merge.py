"""What a merge costs beside mergekit on the same folders: CPU-seconds, wall seconds and peak memory, each method, the sides in turn.

Run: python bench/merge.py --mergekit .venv-mergekit/bin/mergekit-yaml [--rounds N] [--layers N] [--methods NAME...]
Both are commands, so both pay for their imports. mergekit runs in fp32 with one rounding, as we do. tools/test_mergekit.sh makes its environment.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")  # read by torch at import

import torch
import yaml
from safetensors.torch import load_file, save_file

SEED, SHARD = 1234, "200MB"
SIZE = {"hidden_size": 1024, "intermediate_size": 3456, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32768}
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weights": (0.15, 0.85)},
    "slerp": {"t": 0.85},
    "task_arithmetic": {"weights": (0.85,)},
    "ties": {"weights": (0.85,), "density": 0.3},
}


def write_models(root: Path, num_layers: int) -> list[Path]:
    """Write a random bf16 LLaMA as `save_pretrained` does, and a copy whose weights moved."""
    import transformers

    torch.manual_seed(SEED)
    config = transformers.LlamaConfig(num_hidden_layers=num_layers, dtype="bfloat16", max_position_embeddings=512, **SIZE)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(root / "base", max_shard_size=SHARD)
    shutil.copytree(root / "base", root / "mid")
    for file in (root / "mid").glob("*.safetensors"):
        moved = {name: value + 0.01 * torch.randn_like(value) for name, value in load_file(file).items()}
        save_file(moved, file, metadata={"format": "pt"})
    return [root / "base", root / "mid"]


def ours(models: list[Path], method: str, out: Path) -> list[str]:
    """Return our command."""
    case, (base, mid) = METHODS[method], map(str, models)
    weights = case.get("weights", ())
    words = [sys.executable, "-m", "megatron_prism.cli", "merge", "--method", method, "--out", str(out)]
    if len(weights) == 1:
        words += ["--base", base, "--model", f"{mid}={weights[0]}"]
    else:
        named = [f"{path}={weight}" for path, weight in zip((base, mid), weights, strict=True)] if weights else [base, mid]
        words += [word for name in named for word in ("--model", name)]
    return words + [word for key in ("t", "density") if key in case for word in (f"--{key}", str(case[key]))]


def theirs(models: list[Path], method: str, out: Path, mergekit: str) -> list[str]:
    """Return mergekit's command, and write its YAML."""
    case = METHODS[method]
    entries: list[dict[str, Any]] = [{"model": str(path)} for path in models]
    weights = case.get("weights", ())
    for entry, weight in zip(entries[len(entries) - len(weights) :], weights, strict=True):
        entry["parameters"] = {"weight": weight, **({"density": case["density"]} if "density" in case else {})}
    settings: dict[str, Any] = {"merge_method": method, "models": entries, "dtype": "float32", "out_dtype": "bfloat16"}
    settings["parameters"] = {"t": case["t"]} if "t" in case else {"normalize": method == "ties"}
    if method != "linear":
        settings["base_model"] = str(models[0])
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings))
    return [mergekit, str(file), str(out)]


def timed(command: list[str], out: Path) -> dict[str, float]:
    """Run a command whose output is then removed, and return its CPU-seconds, wall seconds and peak resident bytes."""
    os.sync()  # nobody pays for what another left to be written
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        peak = 0
        while child.poll() is None:
            peak = max(peak, _anonymous_bytes(child.pid))
            time.sleep(0.02)
        said = child.stderr.read() if child.stderr else ""
    wall = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert child.returncode == 0, said[-3000:]
    shutil.rmtree(out)
    return {"cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, "wall_s": wall, "peak_bytes": peak}


def _anonymous_bytes(pid: int) -> int:
    """Return the memory that a process holds of its own: pages of files, such as torch's libraries, can be dropped at any time."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def agreement(models: list[Path], method: str, root: Path, mergekit: str) -> dict[str, float]:
    """Return what share of the values of both outputs differ, and by how many bf16 steps at most."""
    outs = {"ours": root / "one", "theirs": root / "two"}
    subprocess.run(ours(models, method, outs["ours"]), check=True, capture_output=True)
    subprocess.run(theirs(models, method, outs["theirs"], mergekit), check=True, capture_output=True)
    differing, largest, total = 0, 0, 0
    found, wanted = (
        {key: value for file in sorted(out.glob("*.safetensors")) for key, value in load_file(file).items()} for out in outs.values()
    )
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        ordered = [torch.where(bits >= 0, bits, -32768 - bits) for bits in (one.view(torch.int16).int() for one in (value, wanted[name]))]
        apart = (ordered[0] - ordered[1]).abs()
        differing, largest, total = differing + int((apart > 0).sum()), max(largest, int(apart.max())), total + apart.numel()
    for out in outs.values():
        shutil.rmtree(out)
    return {"differing_share": differing / total, "largest_steps": largest}


def measure(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Make the models, run both sides of each method in turn, and return what was measured."""
    models, out = write_models(root, args.layers), root / "out"
    sizes = sorted(path.stat().st_size for path in models[0].glob("*.safetensors"))
    methods: dict[str, Any] = {}
    for method in args.methods:
        sides = {"ours": ours(models, method, out), "mergekit": theirs(models, method, out, args.mergekit)}
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for number in range(args.rounds):
            for name in list(sides)[:: -1 if number % 2 else 1]:
                rounds[name].append(timed(sides[name], out))
        medians = {name: {key: statistics.median(one[key] for one in each) for key in each[0]} for name, each in rounds.items()}
        ratios = [one["cpu_s"] / two["cpu_s"] for one, two in zip(rounds["ours"], rounds["mergekit"], strict=True)]
        methods[method] = {**medians, "cpu_ratio": statistics.median(ratios), "cpu_ratios": ratios}
        if args.agree:
            methods[method] |= agreement(models, method, root, args.mergekit)
    return {
        "bench": "merge",
        **SIZE,
        "layers": args.layers,
        "bytes": sum(sizes),
        "shards": len(sizes),
        "two_shards_bytes": sum(sizes[-2:]),
        "rounds": args.rounds,
        "methods": methods,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def show(result: dict[str, Any]) -> None:
    """Print the table and one line of JSON."""
    print(f"{result['bytes'] / 1e6:.0f} MB a model in {result['shards']} shards, {result['rounds']} rounds; medians")
    print(f"two shards: {result['two_shards_bytes'] / 1e6:.0f} MB\n")
    print(f"{'':<18}{'CPU-s':>8}{'mergekit':>10}{'ratio':>8}{'wall s':>8}{'mergekit':>10}{'peak MB':>9}{'mergekit':>10}")
    for name, row in result["methods"].items():
        one, two = row["ours"], row["mergekit"]
        times = f"{one['cpu_s']:>8.2f}{two['cpu_s']:>10.2f}{row['cpu_ratio']:>8.2f}{one['wall_s']:>8.2f}{two['wall_s']:>10.2f}"
        print(f"{name:<18}{times}{one['peak_bytes'] / 1e6:>9.0f}{two['peak_bytes'] / 1e6:>10.0f}")
    print(json.dumps(result))


def main() -> None:
    """Measure in a folder that goes away, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", required=True, help="its command mergekit-yaml")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=28, help="28 make 876 MB a model")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--agree", action="store_true", help="compare the outputs too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = measure(Path(name), args)
    show(result)


if __name__ == "__main__":
    main()
