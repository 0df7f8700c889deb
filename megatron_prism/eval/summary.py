"""summary.json: what an evaluation came to, and all that a reader must know to compare it with another. It has no times and no layout in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megatron_prism.eval import averages, folder, score
from megatron_prism.eval.question import Result
from megatron_prism.eval.requests import Asked
from megatron_prism.eval.tasks import Task

COUNTED = ("none", "one", "two")  # begin-of-text tokens


def of_task(task: Task, asked: Sequence[Asked], results: Sequence[Result], style: str, versions: Mapping[str, str]) -> dict[str, Any]:
    """Return a task's part. style: how it was asked, in words: plain text, or the chat template and its sum."""
    tags = sorted({tag for question in task.questions for tag in question.tags})
    scored = score.as_values(score.of_task(results, tags))
    return {
        **scored,
        "num_samples": task.protocol.num_samples,
        **settings_of(task, asked, style, versions),
        "num_clipped": sum(one.num_clipped > 0 for one in asked),
        "num_shortened": sum(one.is_shortened for one in asked),
    }


def settings_of(task: Task, asked: Sequence[Asked], style: str, versions: Mapping[str, str]) -> dict[str, Any]:
    """Return what of a task's part is known before it is sampled, and must be alike in two evaluations that are compared."""
    return {
        "protocol": {**asdict(task.protocol), "style": style, "grader": dict(versions)},
        "set": {"name": task.set, **task.origin},
        "bos": num_bos(asked),
    }


def num_bos(asked: Sequence[Asked]) -> str:
    """Return how many begin-of-text tokens the prompts have: none, one, two (or more), or mixed. Empty: of a model that is served elsewhere."""
    words = {COUNTED[min(one.num_bos, 2)] for one in asked if one.tokens}
    return "mixed" if len(words) > 1 else words.pop() if words else ""


def whole(identity: Mapping[str, Any], how: Mapping[str, Any], versions: Mapping[str, str], by_task: Mapping[str, Any]) -> dict[str, Any]:
    """Return the summary. identity: the model's. how: the engine, the precision, the seed. by_task: each task's part.

    An average takes a set's score from the task of the set's name, or from the only task of the set.
    """
    words = {part["bos"] for part in by_task.values() if part.get("bos")}
    by_set: dict[str, dict[str, float | None]] = {}
    for name, part in by_task.items():
        by_set.setdefault(part["set"]["name"], {})[name] = part.get("score")
    scores = {of: own[of] if of in own else next(iter(own.values())) for of, own in by_set.items() if of in own or len(own) == 1}
    for part in by_task.values():
        versions = {**versions, **({"lm_eval": part["lm_eval"]["version"]} if "lm_eval" in part else {})}
        leaderboards = part.get("lm_eval", {}).get("averages", {})
        scores |= {f"leaderboard_{name}": value for name, value in leaderboards.items() if value is not None}
    return {
        "kind": folder.KIND,
        "model": dict(identity),
        **how,
        "bos": "mixed" if len(words) > 1 else words.pop() if words else "",
        "versions": dict(versions),
        "tasks": dict(by_task),
        "averages": averages.averages(scores),
    }
