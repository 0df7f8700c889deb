"""Checks between the values of an evaluation's config: pure functions that return every problem, before anything starts."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_prism.core.check.bounds import check_bounds
from megatron_prism.core.check.gang import check_gang
from megatron_prism.core.check.policy import check_rules
from megatron_prism.core.config import EvaluateConfig, TaskConfig
from megatron_prism.core.config.policy import PolicyConfig
from megatron_prism.core.errors import Problem

NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"  # a task's: it stands in keys of a command line
OWN_SECTION, LEADERBOARD = ("ruler", "lm_eval", "held_out"), "leaderboard_"
MIN_TEMPERATURE = 1e-30  # logits are fp32
ONLY_OF_QUESTIONS = ("num_samples", "temperature", "top_p", "think", "answer")


def check_evaluate(config: EvaluateConfig, world_size: int) -> list[Problem]:
    """Return the problems of an evaluation's values on `world_size` ranks, and between them."""
    problems = [*check_bounds(config), *check_gang(config, world_size), *_check_model(config, world_size)]
    if config.policy != PolicyConfig() and config.against is None:
        problems.append(Problem("policy", "a policy without against", "the evaluation that this one is held against"))
    problems += check_rules(config.policy, "policy.")
    if not config.tasks:
        problems.append(Problem("tasks", "none", "at least one task"))
    for name, task in config.tasks.items():
        if not re.fullmatch(NAME, name, re.ASCII):
            problems.append(
                Problem(f"tasks.{name}", "a name with other characters", "letters, digits, _ and -", "name the set by tasks.NAME.set")
            )
        problems += _check_task(f"tasks.{name}", task)
    return problems


def _check_model(config: EvaluateConfig, world_size: int) -> Iterator[Problem]:
    model = config.model
    given = [name for name in ("checkpoint", "hf", "endpoint") if getattr(model, name) is not None]
    if len(given) != 1:
        yield Problem("model", " and ".join(given) or "none of them", "one of checkpoint, hf and endpoint")
    if model.endpoint is None:
        return
    if world_size > 1:
        yield Problem("model.endpoint", f"{world_size} processes", "one: the model is served elsewhere", "leave --nproc out")
    if model.endpoint.api == "chat" and not all(task.chat for task in config.tasks.values()):
        yield Problem("model.endpoint.api", "chat, and tasks without chat", "tasks.NAME.chat: true: the server applies its template")
    if model.endpoint.api == "completions" and any(task.chat for task in config.tasks.values()):
        yield Problem("model.endpoint.api", "completions, and tasks with chat", "chat for them: the template is the server's")
    if config.bos != "tokenizer":
        yield Problem("bos", config.bos, "tokenizer: the server encodes the prompt")
    if any(kind_of(name, task) in ("lm_eval", "held_out") for name, task in config.tasks.items()):
        yield Problem("tasks", "lm_eval or held_out of a model behind an endpoint", "a checkpoint or a Hugging Face folder for them")


def _check_task(where: str, task: TaskConfig) -> Iterator[Problem]:
    sections = [name for name in OWN_SECTION if getattr(task, name) is not None]
    kind = kind_of(where.rpartition(".")[2], task)
    for name in sections:
        if name != kind:
            yield Problem(f"{where}.{name}", f"a section of a task of the set {task.set}", f"only with set: {name}")
    if (
        kind == "lm_eval"
        and not set_of(where.rpartition(".")[2], task).startswith(LEADERBOARD)
        and not (task.lm_eval and task.lm_eval.names)
    ):
        yield Problem(f"{where}.lm_eval.names", "none", "lm-eval's names of tasks; or set: leaderboard_v1, leaderboard_v2")
    if kind == "held_out" and task.held_out is None:
        yield Problem(f"{where}.held_out", "no value", "{mixture, seq_length}")
    if task.temperature is not None and 0 < task.temperature < MIN_TEMPERATURE:
        yield Problem(f"{where}.temperature", str(task.temperature), f"0 (greedy), or at least {MIN_TEMPERATURE}: logits / it is finite")
    for name in ONLY_OF_QUESTIONS if kind in ("lm_eval", "held_out") else ():
        if getattr(task, name) is not None:
            yield Problem(f"{where}.{name}", str(getattr(task, name)), f"null: a task of {kind} has its own")


def kind_of(name: str, task: TaskConfig) -> str:
    """Return ruler, lm_eval, held_out, or questions: how a task is evaluated."""
    said = set_of(name, task)
    if said.startswith(LEADERBOARD):
        return "lm_eval"
    return said if said in OWN_SECTION else "questions"


def set_of(name: str, task: TaskConfig) -> str:
    """Return the name of the set that a task asks."""
    if task.set is not None or name.startswith(LEADERBOARD):
        return task.set or name
    return next((section for section in OWN_SECTION if getattr(task, section) is not None), name)
