"""Two paired evaluations in the form that NeMo Evaluator's `nel gate` reads: nel gate nel/baseline nel/candidate --policy nel/policy.yaml.

Source: nemo-evaluator 0.3.0, engine/bundles.py, engine/comparison.py (load_paired_records), config/gate_policy.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prism.core.config.policy import PolicyConfig
from megatron_prism.core.manifest import write_json, write_text
from megatron_prism.eval.verdicts.change import Change

FOLDER, METRIC = "nel", "mean_reward"
SIDES, POLICY = ("baseline", "candidate"), "policy.yaml"


def others(folder: Path) -> list[str]:
    """Return the names in the folder of pairs that `write` did not write and would remove."""
    root = folder / FOLDER
    return sorted(path.name for path in root.iterdir() if path.name not in (*SIDES, POLICY)) if root.is_dir() else []


def write(folder: Path, changes: Mapping[str, Change], policy: PolicyConfig) -> None:
    """Write the pairs of responses of each task, and the policy's rules on tasks.

    A question's number is its place among the paired ids; faults are left out on both sides. A rule on an average has no form there: its tasks
    are advisory, as are those without a rule.
    """
    root = folder / FOLDER
    shutil.rmtree(root, ignore_errors=True)
    for side in SIDES:
        for task, change in changes.items():
            place = root / side / task.replace("/", "__")
            place.mkdir(parents=True)
            scores, mean = (change.pairs.old, change.old_score) if side == "baseline" else (change.pairs.new, change.new_score)
            write_json(place / "eval-prism.json", _bundle(task, mean))
            write_text(place / "results.jsonl", "".join(_record(change, row, scores) for row in range(len(scores))))
    if changes:
        write_text(root / POLICY, _policy(changes, policy))


def _bundle(task: str, mean: float) -> dict[str, Any]:
    return {"run_id": "prism", "benchmark": {"name": task, "scores": {METRIC: {"value": mean}}}}


def _record(change: Change, row: int, scores: np.ndarray) -> str:
    id, sample = change.pairs.keys[row]
    values = {
        "problem_idx": int(change.pairs.question[row]),
        "repeat": sample,
        "reward": float(scores[row]),
        "metadata": {"id": id},  # without a category, by which nel would cluster
    }
    return json.dumps(values) + "\n"


def _policy(changes: Mapping[str, Change], policy: PolicyConfig) -> str:
    """Return nel's policy as YAML, written as JSON, of which YAML is a superset."""
    rules = {task: {"tier": "critical", "max_drop": drop, "metric": METRIC} for task, drop in policy.max_drop.items() if task in changes}
    value = {"version": 1, "defaults": {"tier": "advisory", "metric": METRIC}, "benchmarks": rules}
    return json.dumps(value, indent=2) + "\n"
