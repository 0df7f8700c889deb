"""`prism prepare` of a mixture in the paper's proportions, at a small part of its size: what is read of what is offered, and what that costs.

Run: python bench/mixture.py --text FILE... [--scale N] [--whole]
The sources, their weights and their tokens are those of configs/mixtures/math_code_science.yaml, divided by N (10,000); the text is drawn from
the files given, no two documents alike. It is prepared in one process, as 4 tasks of which one is killed and run again, and with --whole
without a plan, as all of it. Figures for the full size are these times N: the same work a byte is assumed, not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from prepare import make_text, make_tokenizer

from megatron_prism.core.config import PrepareConfig
from megatron_prism.core.load import load

ROOT = Path(__file__).resolve().parents[1]
MIXTURE = ROOT / "configs" / "mixtures" / "math_code_science.yaml"
NUM_FILES, GROUP_ROWS, NUM_TASKS, NUM_KILLED, TEXT_MB = 8, 32, 4, 9, 4.0


def documents(lines: Sequence[str], draw: random.Random) -> Iterator[str]:
    """Yield documents without end, no two alike."""
    for number in range(1 << 60):
        yield f"{draw.choice(lines)}\n{number} {draw.randrange(10**6)}"


def write_source(folder: Path, num_bytes: float, texts: Iterator[str]) -> int:
    """Write a source's .parquet files of about so many bytes of text, and return the bytes."""
    folder.mkdir(parents=True)
    written = 0
    for number in range(NUM_FILES):
        rows: list[str] = []
        while written < num_bytes * (number + 1) / NUM_FILES:
            rows.append(next(texts))
            written += len(rows[-1].encode())
        if rows:
            pq.write_table(pa.table({"text": rows}), folder / f"{number}.parquet", row_group_size=GROUP_ROWS, compression="none")
    return written


def make(root: Path, text: Sequence[Path], scale: int) -> tuple[dict[str, Any], int]:
    """Write tokenizer and sources, and return the config of the mixture and the bytes of text offered."""
    from tokenizers import Tokenizer

    make_text(text, root / "text.jsonl", TEXT_MB)
    make_tokenizer(root / "text.jsonl", root / "tokenizer")
    lines = [json.loads(line)["text"] for line in (root / "text.jsonl").read_text("utf-8").splitlines()]
    encoded = Tokenizer.from_file(str(root / "tokenizer" / "tokenizer.json")).encode_batch(lines[:500])
    bytes_a_token = sum(len(line.encode()) for line in lines[:500]) / sum(len(each.ids) for each in encoded)
    paper, texts, sources, offered = load(MIXTURE, PrepareConfig), documents(lines, random.Random(1)), [], 0
    for source in paper.sources:
        assert source.available_tokens is not None
        offered += write_source(root / source.name, source.available_tokens / scale * bytes_a_token, texts)
        facts = {"name": source.name, "weight": source.weight, "dedup": source.dedup, "available_tokens": source.available_tokens // scale}
        sources.append({**facts, "path": [str(root / source.name / "*.parquet")]})
    assert paper.tokens is not None
    return {"tokenizer": str(root / "tokenizer"), "tokens": paper.tokens // scale, "num_workers": 1, "sources": sources}, offered


def run(root: Path, name: str, config: dict[str, Any], *words: str, kill_at: int | None = None) -> float:
    """Run `prism prepare` and return its CPU-seconds. kill_at: it is killed once it has made so many shards."""
    (root / f"{name}.yaml").write_text(json.dumps(config | {"out": str(root / name)}))
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "megatron_prism.cli", "prepare", str(root / f"{name}.yaml"), *words]
    with (root / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env)
        if kill_at is not None:
            while len(list(root.glob(f"{name}.partial/*/*.json"))) < kill_at:
                if process.poll() is not None:
                    said = (root / f"{name}.log").read_text(errors="replace")[-3000:]
                    sys.exit(
                        f"{said}\nended with exit code {process.returncode} before it had made {kill_at} shards: a smaller --scale has more"
                    )
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode and kill_at is None:
        sys.exit((root / f"{name}.log").read_text(errors="replace")[-3000:])
    return usage.ru_utime + usage.ru_stime


def contents(folder: Path) -> dict[str, Any]:
    """Return the bytes of a mixture's files, of its manifest what is the same in each run."""
    files: dict[str, Any] = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    manifest = json.loads(files.pop("manifest.json"))
    return files | {key: manifest[key] for key in ("sources", "blend", "inputs")}


def main() -> None:
    """Measure, and print the tables and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--scale", type=int, default=10_000)
    parser.add_argument("--whole", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        config, offered_bytes = make(root, args.text, args.scale)
        start_s = run(root, "start", config, "--dry-run")
        cpu_s = run(root, "one", config)
        killed_s = run(root, "tasks", config, "--task", f"1/{NUM_TASKS}", kill_at=NUM_KILLED)
        task_s = [run(root, "tasks", config, "--task", f"{task}/{NUM_TASKS}") for task in range(NUM_TASKS)]
        seal_s = run(root, "tasks", config)
        whole_s = run(root, "whole", config | {"read": "all"}) if args.whole else None
        manifest = json.loads((root / "one" / "manifest.json").read_text())
        is_equal = contents(root / "one") == contents(root / "tasks")
        written = sum(path.stat().st_size for path in (root / "one").rglob("*") if path.is_file())
    show(manifest, config, args.scale)
    read_bytes = sum(source["reading"]["num_bytes"] for source in manifest["sources"])
    facts = {
        "offered_text_bytes": offered_bytes,
        "read_bytes": read_bytes,
        "written_bytes": written,
        "cpu_s": cpu_s,
        "start_cpu_s": start_s,
        "tasks_cpu_s": [*task_s, seal_s],
        "killed_after_cpu_s": killed_s,
        "whole_cpu_s": whole_s,
        "equal_on_4_tasks_and_after_a_kill": is_equal,
        "full_size_cpu_hours": (cpu_s - start_s) * args.scale / 3600,
        "full_size_whole_cpu_hours": None if whole_s is None else (whole_s - start_s) * args.scale / 3600,
    }
    for key, value in facts.items():
        print(f"{key:<36}{value}")
    print(json.dumps({"bench": "mixture", "scale": args.scale, **facts}))


def show(manifest: dict[str, Any], config: dict[str, Any], scale: int) -> None:
    """Print a line a source: tokens offered, needed, prepared; the blend; bytes read and left."""
    print(f"{'':<24}{'offered':>12}{'needed':>10}{'prepared':>10}{'share %':>9}{'epochs':>8}{'read MB':>9}{'unread MB':>10}{'files':>6}")
    blend = {part["name"]: part for part in manifest["blend"]["sources"]}
    for source, asked in zip(manifest["sources"], config["sources"], strict=True):
        part, reading = blend[source["name"]], source["reading"]
        print(
            f"{source['name']:<24}{asked['available_tokens']:>12,}{part['tokens']:>10,}{source['train_tokens']:>10,}{100 * part['share']:>9.3f}"
            f"{part['epochs']:>8.2f}{reading['num_bytes'] / 1e6:>9.2f}{reading['unread_bytes'] / 1e6:>10.2f}{reading['num_files']:>6}"
        )
    error = max(abs(part["share"] * 100 - part["weight"]) for part in blend.values())
    needed = sum(min(blend[source["name"]]["tokens"], source["train_tokens"]) for source in manifest["sources"])
    prepared = sum(source["train_tokens"] for source in manifest["sources"])
    print(
        f"prepared {prepared:,} of {needed:,} tokens needed: {prepared / needed:.4f}; largest error of the blend {error:.6f} points; 1/{scale:,}"
    )


if __name__ == "__main__":
    main()
