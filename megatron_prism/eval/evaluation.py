"""An evaluation on rank 0: every response that it wants, what is kept of them, who grades, and the folder at its end."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megatron_prism.core import log, manifest
from megatron_prism.core.config import EvaluateConfig
from megatron_prism.core.config.grade import GradeConfig
from megatron_prism.core.load import to_dict
from megatron_prism.eval import folder, requests, summary
from megatron_prism.eval.cache import Kept
from megatron_prism.eval.judge import Judge
from megatron_prism.eval.question import Result
from megatron_prism.eval.reader import Reader
from megatron_prism.eval.requests import Asked, Request
from megatron_prism.eval.tasks import Task
from megatron_prism.grade import grader

SHOWN = ("score", "standard_error", "num_questions", "num_samples", "num_faults", "losses", "by")


@dataclass(frozen=True)
class Evaluation:
    """What rank 0 has. identity: the model's. wanted: every response, in the order of the tasks. measured: of tasks that ask the model themselves."""

    config: EvaluateConfig
    identity: Mapping[str, Any]
    reader: Reader | None
    tasks: Mapping[str, Task]
    asked: Mapping[str, tuple[Asked, ...]]
    wanted: Sequence[Request]
    judge: Judge
    measured: Kept
    answers: Kept

    def to_do(self) -> tuple[list[list[Request]], list[Request]]:
        """Return the shards to sample, and the requests whose response is there and has no grade."""
        most, served = self.config.shard_responses, self.config.model.endpoint
        if served is not None:
            most = min(most, 4 * served.num_requests)  # a signal is heeded between shards
        missing = [one for one in self.wanted if one.key not in self.judge.samples]
        log.get().info("%d responses, of which %d are kept from before", len(self.wanted), len(self.wanted) - len(missing))
        return requests.shards(missing, most), self.judge.ungraded(self.wanted)

    def finish(self, measured_by: Mapping[str, str]) -> dict[str, Any]:
        """Write results and summary from what is kept, in the config's order, and return the scores for the user.

        measured_by: the key of each task that asked the model itself.
        """
        config, judge = self.config, self.judge
        by_task: dict[str, list[Request]] = {name: [] for name in self.tasks}
        for request in self.wanted:
            by_task[request.task].append(request)
        parts: dict[str, Any] = {}
        for name in config.tasks:
            if name in measured_by:
                parts[name] = self.measured[measured_by[name]]["part"]
            else:
                results = [replace(judge.result(one), text="") for one in by_task[name]]
                parts[name] = summary.of_task(
                    self.tasks[name], self.asked[name], results, style_of(self.reader, self.tasks[name]), judge.versions
                )
        how = {"engine": "endpoint", "seed": config.seed}
        if self.reader is not None:
            how |= {"engine": config.engine, "precision": config.precision}
        whole = summary.whole(self.identity, how, manifest.versions(), parts)
        folder.finish(config.out, self._results(by_task, measured_by), whole)
        num_faults = {name: part["num_faults"] for name, part in parts.items() if part.get("num_faults")}
        for name, count in num_faults.items():
            log.get().warning("%s: %d responses without a verdict; the same command tries them again", name, count)
        return {
            "out": str(config.out),
            "responses": len(self.wanted),
            "faults": sum(num_faults.values()),
            "tasks": {name: {key: part[key] for key in SHOWN if key in part} for name, part in parts.items()},
            "averages": {name: value for name, value in whole["averages"].items() if value is not None},
        }

    def _results(self, by_task: Mapping[str, Sequence[Request]], measured_by: Mapping[str, str]) -> Iterator[Result]:
        """Yield every result, in the config's order of the tasks."""
        for name in self.config.tasks:
            if name in measured_by:
                yield from (Result(**values) for values in self.measured[measured_by[name]]["results"])
            else:
                yield from map(self.judge.result, by_task[name])


def style_of(reader: Reader | None, task: Task) -> str:
    """Return how a task is asked, in words."""
    if not task.is_chat and all(isinstance(one.prompt, str) for one in task.questions):
        return "plain text"
    if reader is None or reader.template is None:
        return "the server's chat template"
    return f"chat template {reader.template.sha256}"


def begin(
    config: EvaluateConfig,
    identity: Mapping[str, Any],
    reader: Reader | None,
    tasks: Mapping[str, Task],
    asked: Mapping[str, tuple[Asked, ...]],
    stack: ExitStack,
) -> Evaluation:
    """Hold an evaluation's folder until the stack ends, and return what is wanted and what is kept there.

    Raises: EnvironmentFault where another process holds it. InputError where it is another model's.
    """
    stack.enter_context(folder.held(config.out, partial(_describe, config, identity)))
    samples, grades, measured, answers = (Kept(config.out / name) for name in (folder.SAMPLES, folder.GRADES, folder.TASKS, folder.ANSWERS))
    graders: dict[GradeConfig, grader.Grader] = {}
    kinds = {question.kind for task in tasks.values() for question in task.questions}

    def grader_of(wanted: GradeConfig) -> grader.Grader:
        if wanted not in graders:
            graders[wanted] = stack.enter_context(grader.Grader(wanted, kinds))
        return graders[wanted]

    how: dict[str, Any] = {"sha256": identity["sha256"]}  # what decides a response beside its prompt, its sampling and its seed
    end_ids: tuple[int, ...] = ()
    if reader is not None:
        how |= {"context": reader.context, "engine": config.engine, "precision": config.precision, "tokenizer": reader.spec.sha256}
        end_ids = reader.spec.end_ids
    wanted = [one for name, task in tasks.items() for one in requests.of_task(task, asked[name], how, config.seed, end_ids)]
    _warn(config, asked)
    judge = Judge(tasks, config.grade, samples, grades, grader_of, grader_versions())
    return Evaluation(config, identity, reader, tasks, asked, wanted, judge, measured, answers)


def _describe(config: EvaluateConfig, identity: Mapping[str, Any]) -> dict[str, Any]:
    return manifest.describe(folder.KIND, {}, model=dict(identity), config=to_dict(config))


def grader_versions() -> dict[str, str]:
    """Return the versions that a grade may change with."""
    versions = {"prism": grader.VERSION}
    with suppress(importlib.metadata.PackageNotFoundError):
        versions["math-verify"] = importlib.metadata.version("math-verify")
    return versions


def _warn(config: EvaluateConfig, asked: Mapping[str, tuple[Asked, ...]]) -> None:
    for name, own in asked.items():
        if summary.num_bos(own) in ("two", "mixed"):
            log.get().warning("%s: prompts begin with %s begin-of-text tokens (bos: %s)", name, summary.num_bos(own), config.bos)
        if num := sum(one.is_shortened for one in own):
            log.get().warning("%s: the context leaves %d of %d prompts less room than max_tokens (overlong: shorten)", name, num, len(own))
        if num := sum(one.num_clipped > 0 for one in own):
            log.get().warning("%s: %d of %d prompts lose their beginning (overlong: clip)", name, num, len(own))
