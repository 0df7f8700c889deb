"""RULER as a task: which sub-tasks at which lengths a config asks for, and their questions, which the ranks of a gang make together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_prism.core.config import RulerConfig, TaskConfig
from megatron_prism.core.errors import PrismError, Problem, raise_problems
from megatron_prism.core.manifest import sha256_file
from megatron_prism.eval.question import Question
from megatron_prism.eval.ruler.draft import Sources
from megatron_prism.eval.ruler.make import PROTOCOL, SUB_TASKS, make
from megatron_prism.eval.tasks import Task, protocol_of
from megatron_prism.parallel.groups import Groups, gather, to_first

RULER = "ruler"
FILES = ("essays", "squad", "hotpotqa")  # Sources'


def read(name: str, config: TaskConfig) -> Task:
    """Return a task of RULER, its questions not made yet. Raises: InputError for what it cannot be made of."""
    wanted, where = config.ruler or RulerConfig(), f"tasks.{name}"
    problems = [
        Problem(f"{where}.ruler.sub_tasks", one, f"some of {', '.join(SUB_TASKS)}") for one in wanted.sub_tasks if one not in SUB_TASKS
    ]
    for file, path in wanted.files.items():
        if file not in FILES:
            problems.append(Problem(f"{where}.ruler.files.{file}", "an unknown name", f"one of {', '.join(FILES)}"))
        elif not path.is_file():
            problems.append(Problem(f"{where}.ruler.files.{file}", f"{path}, which is not there", "a file in its published form"))
    problems += [
        Problem(
            f"{where}.ruler.sub_tasks", f"{one} without its file", f"{where}.ruler.files.{SUB_TASKS[one].shape}", "docs/EVALUATE.md, RULER"
        )
        for one in wanted.sub_tasks
        if one in SUB_TASKS and SUB_TASKS[one].shape in FILES and SUB_TASKS[one].shape not in wanted.files
    ]
    problems += [
        Problem(f"{where}.ruler.{key}", f"{value} {count} times", "each once: a question has an id of its own")
        for key, values in (("lengths", wanted.lengths), ("sub_tasks", wanted.sub_tasks))
        for value, count in Counter(values).items()
        if count > 1
    ]
    if not wanted.lengths:
        problems.append(Problem(f"{where}.ruler.lengths", "none", "at least one"))
    if config.chat:
        problems.append(Problem(f"{where}.chat", "true", "false: RULER's lengths are those of plain prompts"))
    if config.path is not None or config.max_tokens is not None:
        problems.append(Problem(where, "path or max_tokens", "neither: each sub-task has its own", "its files are ruler.files"))
    raise_problems(problems)
    made_of = {file: sha256_file(path) for file, path in wanted.files.items()}
    origin = {
        "lengths": list(wanted.lengths),
        "sub_tasks": list(sub_tasks(wanted)),
        "num_questions": num_questions(config),
        "files": made_of,
    }
    return Task(name, RULER, (), protocol_of(config, PROTOCOL), False, origin)


def sub_tasks(wanted: RulerConfig) -> tuple[str, ...]:
    """Return the sub-tasks that are asked: those named, or all for which there are files."""
    there = [one for one, sub_task in SUB_TASKS.items() if sub_task.shape not in FILES or sub_task.shape in wanted.files]
    return wanted.sub_tasks or tuple(there)


def num_questions(config: TaskConfig) -> int:
    """Return the questions of a sub-task at a length."""
    wanted = (config.ruler or RulerConfig()).num_questions
    return wanted if config.limit is None else min(wanted, config.limit)


def total(config: TaskConfig) -> int:
    """Return the number of questions of a task."""
    wanted = config.ruler or RulerConfig()
    return num_questions(config) * len(sub_tasks(wanted)) * len(wanted.lengths)


def most_tokens(config: TaskConfig) -> tuple[int, int]:
    """Return the tokens that one sample of every question may take together, and those of the longest prompt: of what is not made yet."""
    wanted = config.ruler or RulerConfig()
    responses = [SUB_TASKS[one].max_tokens for one in sub_tasks(wanted)]
    return sum(responses) * num_questions(config) * len(wanted.lengths), max(wanted.lengths) - min(responses)


def questions(
    config: TaskConfig, seed: int, count_tokens: Callable[[str], int], groups: Groups, doing: Callable[[str], None]
) -> tuple[Question, ...]:
    """Return a task's questions on rank 0, by length and sub-task; every rank of the gang calls this, and makes its part of them.

    doing: told of each part. Raises: on every rank, InputError for a length that is too short, or a file that does not fill it.
    """
    wanted = config.ruler or RulerConfig()
    sources = Sources(**{name: Path(path) for name, path in wanted.files.items()})
    units = [(length, sub_task) for length in wanted.lengths for sub_task in sub_tasks(wanted)]
    mine: dict[int, Any] = {}
    by_cost = sorted(range(len(units)), key=lambda number: -units[number][0])  # the longest first, dealt in turn
    for number in by_cost[groups.rank :: groups.world_size]:
        length, sub_task = units[number]
        doing(f"making {sub_task} of {length} tokens")
        mine[number] = _attempt(partial(make, sub_task, length, num_questions(config), seed, count_tokens, sources))
    failed = {number: value for number, value in mine.items() if isinstance(value, PrismError)}
    if failures := {number: error for part in gather(failed) for number, error in part.items()}:
        raise failures[min(failures)].agreed()
    made = {number: value for part in to_first(mine) for number, value in part.items()}  # some GB at the default lengths
    return tuple(question for number in sorted(made) for question in made[number])


def _attempt(make_one: Callable[[], tuple[Question, ...]]) -> tuple[Question, ...] | PrismError:
    try:
        return make_one()
    except PrismError as error:
        return error
