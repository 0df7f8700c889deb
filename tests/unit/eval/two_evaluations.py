"""Evaluations made up for tests of verdicts: as folders, and as pairs in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prism.core.manifest import sha256_file
from megatron_prism.eval.question import Result, to_line
from megatron_prism.eval.verdicts.paired import Pairs

PROTOCOL = {
    "num_samples": 1,
    "temperature": 0.6,
    "top_p": 0.95,
    "max_tokens": 64,
    "think": "free",
    "answer": "boxed_or_plain",
    "source": "a",
    "style": "plain text",
}


def result(task: str, id: str, score: float | None, sample: int = 0, prompt: str = "") -> Result:
    """Return a response; score None: a fault."""
    outcome: Any = "fault" if score is None else "right" if score == 1 else "wrong"
    return Result(task=task, id=id, sample=sample, seed=1, outcome=outcome, score=score, prompt_sha256=prompt or f"{task} {id}", text="a")


def scores(task: str, values: Iterable[float | None]) -> list[Result]:
    """Return one response to each of some questions."""
    return [result(task, f"q{number:04d}", score) for number, score in enumerate(values)]


def write(folder: Path, results: list[Result], tasks: Mapping[str, Mapping[str, Any]] | None = None, **summary: Any) -> Path:
    """Write an evaluation's folder. tasks: what a task's entry in summary.json says beside, or otherwise than, PROTOCOL."""
    folder.mkdir(parents=True)
    (folder / "results.jsonl").write_text("".join(map(to_line, results)))
    of_tasks = {
        name: {"protocol": PROTOCOL, "set": {"name": name, "path": str(folder)}, "bos": "one"} | dict((tasks or {}).get(name, {}))
        for name in {one.task for one in results} | set(tasks or {})
    }
    results_sha256 = sha256_file(folder / "results.jsonl")
    head = {"kind": "evaluation", "model": {"sha256": folder.name}, "engine": "cached", "precision": "fp32", "versions": {}}
    values = {**head, "tasks": of_tasks, "results_sha256": results_sha256, **summary}
    (folder / "summary.json").write_text(json.dumps(values))
    return folder


def drawn(task: str, old: np.ndarray, new: np.ndarray, num_samples: int, draw: np.random.Generator) -> Pairs:
    """Return pairs of responses drawn with each question's chance under the old and the new model."""
    ids = tuple(f"q{number:05d}" for number in range(len(old)))
    question = np.repeat(np.arange(len(old)), num_samples)
    right = [(draw.random(len(question)) < chance[question]).astype(np.float64) for chance in (old, new)]
    keys = tuple((id, sample) for id in ids for sample in range(num_samples))
    return Pairs(task, ids, keys, question, *right, num_masked=0, num_unpaired=0, only_old=(), only_new=())
