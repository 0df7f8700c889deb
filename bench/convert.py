"""What a conversion costs over a copy of the same files: CPU-seconds and wall seconds, import and export, at TP=1 and TP=4.

Run: python bench/convert.py [--rounds N] [--gang-rounds N] [--layers N]
Each side writes the same weights and has them on disk (fsync) when its clock stops. Sides alternate, their order turns every round.
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
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")  # read by torch at import

import torch
import torch.distributed as dist

from megatron_prism.checkpoint import convert as engine
from megatron_prism.checkpoint import folder, saving, sharded
from megatron_prism.core import log
from megatron_prism.core.config import GangConfig, ParallelConfig
from megatron_prism.core.manifest import sha256_file
from megatron_prism.jobs import convert
from megatron_prism.models import build
from megatron_prism.parallel import groups

SEED, SHARD, TP = 1234, "100MB", 4
PEAK = Path(__file__).resolve().parents[1] / "tests" / "unit" / "checkpoint" / "peak.py"
SIZE = {
    "hidden_size": 1024,
    "intermediate_size": 3456,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32768,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
TINY = SIZE | {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64}
Side = Callable[[Path], object]  # writes a folder
Times = dict[str, list[tuple[float, float]]]  # by side: (CPU-seconds, wall seconds) of each round


def write_model(root: Path, size: dict[str, Any], num_layers: int) -> None:
    """Write a random bf16 LLaMA as `save_pretrained` does, in shards of SHARD."""
    import transformers

    torch.manual_seed(SEED)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=num_layers, dtype="bfloat16", **size))
    model.to(torch.bfloat16).save_pretrained(root, max_shard_size=SHARD)


def on_disk(root: Path) -> None:
    """Have every file of a folder written through."""
    for path in root.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def copy(source: Path) -> Side:
    """Return cp: the limit."""

    def run(target: Path) -> None:
        target.mkdir()
        subprocess.run(["cp", *map(str, source.iterdir()), str(target)], check=True)
        on_disk(target)

    return run


def load_and_save(source: Path) -> Side:
    """Return transformers' way: the model in memory, from_pretrained and save_pretrained."""
    import transformers

    def run(target: Path) -> None:
        transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(target, max_shard_size=SHARD)
        on_disk(target)

    return run


def import_without_hashes(source: Path) -> Side:
    """Return our import without the sha256 of the weights in its manifest."""

    def run(target: Path) -> None:
        with mock.patch.object(engine, "sha256_file", lambda path: ""):
            convert.run_import(source, target, dry_run=False)

    return run


def cpu_s() -> float:
    """Return the CPU-seconds, user and system, of this process with its threads and of the children it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def timed(job: Callable[[], object]) -> tuple[float, float]:
    """Return the CPU-seconds and wall seconds of a job."""
    cpu, wall = cpu_s(), time.monotonic()
    job()
    return cpu_s() - cpu, time.monotonic() - wall


def alternate(sides: dict[str, Side], root: Path, rounds: int) -> Times:
    """Return each side's times by round; what it wrote is removed off the clock, and the order turns every round."""
    found: Times = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            os.sync()  # nobody pays for what another left to be written
            found[name].append(timed(lambda name=name: sides[name](root / "out")))
            shutil.rmtree(root / "out", ignore_errors=True)
    return found


def gang_member(root: Path, rounds: int) -> None:
    """Be a rank of a gang of TP: load the imported checkpoint and save it at TP, again and again; rank 0 writes the times."""
    log.setup()
    config, found = GangConfig(parallel=ParallelConfig(tp=TP), seed=SEED), []
    origin = folder.read(root / "ckpt")
    with groups.gang(config) as grid:
        chunks = build.build(origin.model, grid, config)
        facts = folder.describe(origin.model, 0, 0, dtype=origin.facts["dtype"], world_size=grid.world_size)

        def finish_folder(path: Path) -> None:
            folder.copy_hf(origin.root, path)
            folder.write_meta(path, facts)

        for number in range(rounds + 1):
            target = root / "tp" / f"step_{number:08d}"
            jobs = {
                "load": lambda: sharded.load_weights(origin.root, chunks),
                "save": lambda target=target: saving.Saving(target, sharded.weights(chunks), finish_folder, 600.0).finish(),
            }
            times = {}
            for name, job in jobs.items():
                dist.barrier()
                cpu, wall = timed(job)
                total = torch.tensor([cpu])
                dist.all_reduce(total)
                times[name] = (float(total), wall)
            found.append(times)
            if grid.rank == 0 and number:
                shutil.rmtree(root / "tp" / f"step_{number - 1:08d}")
    if grid.rank == 0:
        (root / "gang.json").write_text(json.dumps({name: [times[name] for times in found[1:]] for name in jobs}))


def gang(root: Path, rounds: int) -> Times:
    """Return the times of a gang of TP ranks loading and saving, summed over its ranks; root/tp is then its checkpoint."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={TP}", __file__]
    done = subprocess.run([*command, "--gang", str(root), "--gang-rounds", str(rounds)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((root / "gang.json").read_text())


def peak_bytes(job: str, source: Path, root: Path, tiny: Path) -> int:
    """Return what a conversion in a process of its own holds beyond the interpreter, at its peak."""
    command = [sys.executable, str(PEAK), job, str(source), str(root / "out"), str(tiny)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"MALLOC_ARENA_MAX": "1"})
    shutil.rmtree(root / "out")
    shutil.rmtree(root / "out-tiny")
    return int(done.stdout)


def same_files(source: Path, side: Side, target: Path) -> bool:
    """Return whether a side writes the very files of a folder."""
    side(target)
    same = {path.name: sha256_file(path) for path in target.iterdir()} == {path.name: sha256_file(path) for path in source.iterdir()}
    shutil.rmtree(target)
    return same


def measure(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Make the model, run every side, and return what was found."""
    hf, ckpt, tiny = root / "hf", root / "ckpt", root / "tiny"
    write_model(hf, SIZE, args.layers)
    write_model(tiny / "hf", TINY, 2)
    convert.run_import(tiny / "hf", tiny / "ckpt", dry_run=False)
    convert.run_export(tiny / "ckpt", tiny / "out", dry_run=False)  # both directions once: everything is imported now
    convert.run_import(hf, ckpt, dry_run=False)
    by_gang = gang(root, args.gang_rounds)
    sharded_export = f"export from TP={TP}"
    sides: dict[str, Side] = {
        "cp": copy(hf),
        "import": lambda target: convert.run_import(hf, target, dry_run=False),
        "import, weights not hashed": import_without_hashes(hf),
        "export": lambda target: convert.run_export(ckpt, target, dry_run=False),
        sharded_export: lambda target: convert.run_export(root / "tp", target, dry_run=False),
        "from_pretrained + save_pretrained": load_and_save(hf),
    }
    same = {name: same_files(hf, sides[name], root / "out") for name in ("export", sharded_export)}
    times = alternate(sides, root, args.rounds)
    weights = sorted(hf.glob("*.safetensors"))
    times["sha256 of the weights alone"] = [timed(lambda: [sha256_file(path) for path in weights]) for _ in range(args.rounds)]
    sizes = [path.stat().st_size for path in weights]
    peaks = {
        job: peak_bytes(job.split()[0], source, root, tiny / source.name if source != root / "tp" else tiny / "ckpt")
        for job, source in (("import", hf), ("export", ckpt), (sharded_export, root / "tp"))
    }
    return {
        "bench": "convert",
        **SIZE,
        "layers": args.layers,
        "bytes": sum(sizes),
        "shards": len(sizes),
        "two_shards_bytes": sum(sorted(sizes)[-2:]),
        "rounds": args.rounds,
        "gang_rounds": args.gang_rounds,
        "byte_identical": same,
        "peak_bytes": peaks,
        "sides": {name: summary(found, times["cp"]) for name, found in times.items()},
        "gang": {f"{name} at TP={TP}, Megatron's own": summary(found, times["cp"]) for name, found in by_gang.items()},
        "torch": torch.__version__,
        "megatron_core": version("megatron-core"),
        "transformers": version("transformers"),
    }


def summary(found: list[tuple[float, float]], limit: list[tuple[float, float]]) -> dict[str, float]:
    """Return a side's median seconds, and the median over rounds of its ratio to cp (of the medians, where the rounds are not the same)."""
    rounds = zip(found, limit, strict=True) if len(found) == len(limit) else [(middle(found), middle(limit))]
    ratios = [(one[0] / base[0], one[1] / base[1]) for one, base in rounds]
    return dict(zip(("cpu_s", "wall_s", "cpu_ratio", "wall_ratio"), (*middle(found), *middle(ratios)), strict=True))


def middle(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the medians of both."""
    return statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)


def show(result: dict[str, Any]) -> None:
    """Print the tables and one line of JSON."""
    print(f"{result['bytes'] / 1e6:.0f} MB in {result['shards']} shards, {result['rounds']} rounds; medians\n")
    print(f"{'':<36}{'CPU-s':>8}{'to cp':>8}{'wall s':>8}{'to cp':>8}")
    for name, row in (result["sides"] | result["gang"]).items():
        print(f"{name:<36}{row['cpu_s']:>8.3f}{row['cpu_ratio']:>8.2f}{row['wall_s']:>8.3f}{row['wall_ratio']:>8.2f}")
    peaks = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in result["peak_bytes"].items())
    print(f"\npeak memory: {peaks}; two shards are {result['two_shards_bytes'] / 1e6:.0f} MB")
    print(f"byte for byte the source: {result['byte_identical']}")
    print(json.dumps(result))


def main() -> None:
    """Measure in a folder that goes away, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--gang-rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12, help="12 make 452 MB")
    parser.add_argument("--gang", type=Path, help=argparse.SUPPRESS)  # this process is a rank of the gang
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.gang is not None:
        gang_member(args.gang, args.gang_rounds)
        return
    with tempfile.TemporaryDirectory() as name, (Path(name) / "stderr.log").open("w") as stream, redirect_stderr(stream):
        log.setup()
        result = measure(Path(name), args)
    show(result)


if __name__ == "__main__":
    main()
