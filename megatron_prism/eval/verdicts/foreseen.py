"""Whether a verdict can be made, before anything is sampled: an evaluation that has ended against what a config will ask."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_prism.core.config import EvaluateConfig
from megatron_prism.core.errors import Problem
from megatron_prism.eval import summary
from megatron_prism.eval.evaluation import grader_versions, style_of
from megatron_prism.eval.measured import Measured
from megatron_prism.eval.reader import Reader
from megatron_prism.eval.requests import Asked
from megatron_prism.eval.tasks import Task
from megatron_prism.eval.verdicts.paired import LM_EVAL, Evaluation, Key, Scored
from megatron_prism.eval.verdicts.verdict import matched


def check(
    config: EvaluateConfig,
    old: Evaluation,
    reader: Reader | None,
    tasks: Mapping[str, Task],
    asked: Mapping[str, tuple[Asked, ...]],
    measured: Mapping[str, Measured],
) -> list[Problem]:
    """Return why a policy's rules could not be judged on an earlier evaluation and this one, once this one has ended.

    What is known only then is taken to be as it was: the questions that RULER makes, and how lm-eval runs its tasks. A held-out loss has no
    responses, so that no rule can be on it.
    """
    of_lm_eval = {f"{LM_EVAL}{task}": group for one in measured.values() for task, group in one.groups.items()}
    parts: dict[str, Any] = {f"{name} as it was": part for name, part in old.summary["tasks"].items() if part.get("lm_eval")}
    answers: dict[str, Mapping[Key, Scored]] = {name: old.tasks.get(name) or {("", 0): Scored(0.0, "")} for name in of_lm_eval}
    for name, task in tasks.items():
        parts[name] = summary.settings_of(task, asked[name], style_of(reader, task), grader_versions())
        answers[name] = {
            (one.question.id, sample): Scored(0.0, one.prompt_sha256) for one in asked[name] for sample in range(task.protocol.num_samples)
        }
        if not asked[name]:  # made later
            parts[name]["bos"] = old.summary["tasks"].get(name, {}).get("bos")
            answers[name] = old.tasks.get(name) or {("", 0): Scored(0.0, "")}
    foreseen = {"tasks": json.loads(json.dumps(parts)), "versions": old.summary.get("versions", {})}  # tuples as the file has them
    new = Evaluation(config.out, foreseen, answers, of_lm_eval)
    return matched(old, new, config.policy)[2]
