"""Checkpoints written while training goes on, beside those that are waited for: python -m tests.gpu.saving FIXTURES WORK.

Every sum of SHA256SUMS holds, and every tensor has the bits that it has where training waits.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from megatron_prism.checkpoint import run_folder
from tests.gpu import options, runs
from tests.gpu.options import Options
from tests.gpu.report import check
from tests.gpu.resume import other_tensors

LARGE = {
    "family": "llama",
    "num_layers": 8,
    "hidden_size": 1024,
    "ffn_hidden_size": 2816,
    "num_attention_heads": 16,
    "num_query_groups": 8,
    "kv_channels": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 1024,
}
STEPS, INTERVAL = 12, 3


def main(given: Options) -> None:
    """Train both ways; a checkpoint of LARGE has some 2 GB."""
    model: dict[str, Any] = {"model": LARGE, "init": {"checkpoint": None, "tokenizer": str(given.fixtures / "tokenizer")}}
    keys = {"steps": STEPS, "data": {"num_workers": 2}, **({} if given.tiny else model)}
    ways = {name: given.work / name for name in ("background", "waited")}
    seconds: dict[str, float] = {}
    with check("saving", "background and waited") as result:
        for name, run_dir in ways.items():
            save = {"interval": INTERVAL, "background": name == "background"}
            ended = runs.must(runs.prism("train", runs.config(given, run_dir, save=save, **keys)))
            seconds[name] = ended.seconds
        result.figures, result.ok = {f"{name}_run_s": value for name, value in seconds.items()}, True
    for step in range(INTERVAL, STEPS + 1, INTERVAL):
        with check("saving", f"step {step}") as result:
            one, other = (run_folder.step_folder(path, step) for path in ways.values())
            result.figures = {"sums_hold": sums_hold(one), "other_tensors": other_tensors(one, other), "bytes": size_of(one)}
            result.ok = result.figures["sums_hold"] and result.figures["other_tensors"] == 0
    with check("saving", "control: another step has other bits, a changed byte another sum") as result:
        first, second = (run_folder.step_folder(ways["background"], step) for step in (INTERVAL, 2 * INTERVAL))
        result.figures["other_tensors"] = other_tensors(first, second)
        change_a_byte(first)
        result.figures["sums_hold"] = sums_hold(first)
        result.ok = result.figures["other_tensors"] > 0 and not result.figures["sums_hold"]


def sums_hold(checkpoint: Path) -> bool:
    """Let sha256sum check a checkpoint's sums."""
    done = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=checkpoint, capture_output=True, check=False)
    return done.returncode == 0


def size_of(checkpoint: Path) -> int:
    """Return the bytes of a checkpoint's files."""
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


def change_a_byte(checkpoint: Path) -> None:
    """Flip a bit in the middle of the largest file."""
    path = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


if __name__ == "__main__":
    main(options.read())
