"""The golden runs: make their inputs, run a case from the command line, compare what it computed.

Nothing here imports megatron_prism: whatever moves within the package, these runs stay as they are.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parent
RECORD = FOLDER / "figures.json"
TOLERANCE = 2e-6  # between processors; a case may have its own
NUM_WORDS = 118
PINNED = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
PINNED |= {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": ""}  # on the host, wherever it runs
Figures = dict[str, dict[str, float]]  # {metric: {step: value}}


class RunFailed(Exception):
    """A command that did not end with exit code 0; its words."""


def cases() -> dict[str, dict[str, Any]]:
    """Return the cases of cases.yaml by name."""
    return _read()["cases"]


def _read() -> dict[str, Any]:
    return yaml.safe_load((FOLDER / "cases.yaml").read_text(encoding="utf-8"))


def prepare(tree: Path, home: Path) -> None:
    """Write a tokenizer, texts and a config for each model to a new folder, and let the code of `tree` prepare the mixture."""
    home.mkdir()
    where = _python(tree, home, "-c", "import megatron_prism; print(megatron_prism.__file__)")
    if not Path(where.strip()).resolve().is_relative_to(tree.resolve()):
        raise RunFailed(f"{where.strip()} would run, which is not of {tree}")
    _write_tokenizer(home / "tokenizer")
    _write_texts(home)
    data = _read()
    models = {name: {**data["run"], "model": model} for name, model in data["models"].items()}
    for name, config in {"mixture": data["mixture"], **models}.items():
        (home / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML
    _prism(tree, home, "prepare", "mixture.yaml")


def _write_tokenizer(folder: Path) -> None:
    """Write a tokenizer that knows the words w0 to w117, as plain data."""
    words = ["<unk>", "</s>", *(f"w{number}" for number in range(NUM_WORDS))]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": {word: number for number, word in enumerate(words)}, "unk_token": "<unk>"},
    }
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "unk_token": "<unk>"}))


def _write_texts(home: Path) -> None:
    """Write documents of 5 to 25 words, each word following from the one before, one in eight of them by chance."""
    rng = random.Random(1234)
    for name, num_documents, factor, step in (("up", 300, 1, 1), ("times", 40, 3, 7)):
        lines = []
        for _ in range(num_documents):
            words = [int(rng.random() * NUM_WORDS)]
            for _ in range(4 + int(rng.random() * 21)):
                words.append((words[-1] * factor + step if rng.random() < 7 / 8 else int(rng.random() * NUM_WORDS)) % NUM_WORDS)
            lines.append(json.dumps({"text": " ".join(f"w{word}" for word in words)}) + "\n")
        (home / f"{name}.jsonl").write_text("".join(lines))


def run(tree: Path, home: Path, name: str, *overrides: str) -> Figures:
    """Train a case with the code of `tree` in a prepared folder, with further overrides; return its figures."""
    case = cases()[name]
    run_dir = home / "_".join([name, *overrides])
    command = ["train", f"{case['model']}.yaml", f"run_dir={run_dir}", *case["set"], *overrides, "--nproc", str(case.get("nproc", 1))]
    _prism(tree, home, *command)
    if "resume_after" in case:
        kept = _cut(run_dir, case["resume_after"])
        _prism(tree, home, *command)
        if _lines(run_dir)[: len(kept)] != kept:  # each holds the seconds that its step took
            raise RunFailed(f"{name} did not resume after step {case['resume_after']}")
    return figures(_lines(run_dir))


def _cut(run_dir: Path, step: int) -> list[str]:
    """Remove what a run wrote after a step: checkpoints and metrics; return the lines of metrics that are left."""
    for path in (run_dir / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    kept = [line for line in _lines(run_dir) if json.loads(line)["step"] <= step]
    (run_dir / "metrics.jsonl").write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    return kept


def _lines(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()


def figures(lines: list[str]) -> Figures:
    """Return what is compared of a metrics.jsonl: losses, gradient norms, validation losses, and which steps were passed over."""
    kept: Figures = {}
    for values in map(json.loads, lines):
        for metric, value in values.items():
            if metric in ("loss", "grad_norm", "passed_over") or metric.startswith("valid_loss/"):
                kept.setdefault(metric, {})[str(values["step"])] = float(value)
    return kept


def first_difference(before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]], tolerance: float) -> str | None:
    """Return the first step that differs, and both values; None where there is none.

    tolerance: absolute, of a gradient norm above 1 relative; 0 asks for the same bits.
    """
    metrics = sorted({*before, *after})
    steps = {step for values in (*before.values(), *after.values()) for step in values}
    for step in sorted(steps, key=int):
        for metric in metrics:
            old, new = before.get(metric, {}).get(step), after.get(metric, {}).get(step)
            scale = max(1.0, old or 0.0) if metric == "grad_norm" else 1.0
            if old != new and (old is None or new is None or not abs(old - new) <= tolerance * scale):
                return f"step {step}: {metric} {old!r} became {new!r}"
    return None


def _prism(tree: Path, home: Path, *arguments: str) -> None:
    _python(tree, home, "-m", "megatron_prism.cli", *arguments)


def _python(tree: Path, home: Path, *arguments: str) -> str:
    """Run this interpreter in `home` with the package of `tree`; return its standard output."""
    environment = {**os.environ, **PINNED, "PYTHONPATH": str(tree)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=home, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900)
    if done.returncode != 0:
        raise RunFailed(f"python {' '.join(arguments)}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    return done.stdout
