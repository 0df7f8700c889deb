"""Two evaluations side by side: their responses joined by task, question and sample, never by position, and why a task cannot be joined."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.eval.folder import RESULTS, summary_of
from megatron_prism.eval.question import read_results

MAY_DIFFER = (
    "protocol.num_samples",
    "protocol.source",
    "set.path",
    "set.limit",
    "set.num_questions",
)  # more of the same is paired as far as it goes
OF_PROMPTS = ("protocol.style", "bos")
TOLD = ("engine", "precision")  # of a whole evaluation: they change the responses, and not what is asked
TOLD_OF_TASKS = ("num_shortened", "num_clipped")  # questions that a short context leaves less room, or cuts
LM_EVAL = "lm_eval/"
GROUP = "group"  # the tag of an lm-eval task's leaderboard benchmark
NUM_NAMED = 3  # of what one evaluation lacks, a message names so many


@dataclass(frozen=True)
class Scored:
    """What a verdict reads of a response. score: None for a fault."""

    score: float | None
    prompt_sha256: str


Key = tuple[str, int]  # a question's id and the number of its sample


@dataclass(frozen=True)
class Evaluation:
    """An evaluation's folder as read: its summary, the responses of each task, and the benchmark that an lm-eval task is a part of."""

    folder: Path
    summary: Mapping[str, Any]
    tasks: Mapping[str, Mapping[Key, Scored]]
    groups: Mapping[str, str]


@dataclass(frozen=True)
class Pairs:
    """A task's responses that both evaluations have and graded, as scores in the order of `keys`. question: of each, its place in `ids`.

    masked: pairs of responses of which one or both are faults. only_old, only_new: questions that the other evaluation lacks.
    num_unpaired: further responses that the other evaluation lacks, of questions that it has.
    """

    task: str
    ids: tuple[str, ...]
    keys: tuple[Key, ...]
    question: np.ndarray
    old: np.ndarray
    new: np.ndarray
    num_masked: int
    num_unpaired: int
    only_old: tuple[str, ...]
    only_new: tuple[str, ...]


def read(folder: Path) -> Evaluation:
    """Read an evaluation's folder. Raises: InputError where it is none, or holds a response twice, or a score that is no share."""
    summary = summary_of(folder)
    groups: dict[str, str] = {}
    tasks: dict[str, dict[Key, Scored]] = {}
    for number, result in enumerate(read_results(folder / RESULTS), 1):
        of_task, place = tasks.setdefault(result.task, {}), f"{folder / RESULTS}:{number}"
        if (result.id, result.sample) in of_task:
            raise InputError(Problem(place, f"{result.task} {result.id} sample {result.sample} again", "each response once"))
        if (result.score is None) != (result.outcome == "fault"):
            raise InputError(Problem(place, f"outcome {result.outcome}, score {result.score}", "a score, or for a fault none"))
        if result.score is not None and not 0 <= result.score <= 1:
            raise InputError(Problem(place, f"score {result.score}", "a share between 0 and 1"))
        of_task[result.id, result.sample] = Scored(result.score, result.prompt_sha256)
        if result.task.startswith(LM_EVAL) and result.tags.get(GROUP):
            groups[result.task] = result.tags[GROUP]
    return Evaluation(folder, summary, tasks, groups)


def read_all(folders: Sequence[Path]) -> list[Evaluation]:
    """Read evaluations. Raises: InputError with the problems of all folders."""
    evaluations: list[Evaluation] = []
    problems: list[Problem] = []
    for folder in folders:
        try:
            evaluations.append(read(folder))
        except InputError as error:
            problems += error.problems
    raise_problems(problems)
    return evaluations


def pair(task: str, old: Evaluation, new: Evaluation) -> Pairs:
    """Join a task's responses by question and sample. A fault of either masks the pair of responses."""
    before, now = old.tasks.get(task, {}), new.tasks.get(task, {})
    ids_before, ids_now = {id for id, _ in before}, {id for id, _ in now}
    shared = sorted(before.keys() & now.keys())
    keys = tuple(key for key in shared if before[key].score is not None and now[key].score is not None)
    ids = tuple(sorted({id for id, _ in keys}))
    place = {id: number for number, id in enumerate(ids)}
    both = ids_before & ids_now
    return Pairs(
        task,
        ids,
        keys,
        np.array([place[id] for id, _ in keys], dtype=np.int64),
        np.array([before[key].score for key in keys], dtype=np.float64),
        np.array([now[key].score for key in keys], dtype=np.float64),
        num_masked=len(shared) - len(keys),
        num_unpaired=sum(id in both for id, _ in before.keys() ^ now.keys()),
        only_old=tuple(sorted(ids_before - ids_now)),
        only_new=tuple(sorted(ids_now - ids_before)),
    )


def unlike(task: str, old: Evaluation, new: Evaluation, accept_other_prompts: bool = False) -> list[str]:
    """Return why a task of two evaluations cannot be paired: it was asked, sampled or graded otherwise. Empty: it can be."""
    absent = [f"{one.folder} has no responses to it" for one in (old, new) if not one.tasks.get(task)]
    return absent or [
        *_settings(task, old.summary, new.summary, accept_other_prompts),
        *([] if accept_other_prompts else _prompts(old.tasks[task], new.tasks[task])),
    ]


def _settings(task: str, old: Mapping[str, Any], new: Mapping[str, Any], accept_other_prompts: bool) -> Iterator[str]:
    """Yield each setting that differs: of the task's protocol, of grading, of the beginning of a prompt, of lm-eval."""
    before, now = (_settings_of(task, summary) for summary in (old, new))
    for name in dict.fromkeys((*before, *now)):
        if name in MAY_DIFFER or (accept_other_prompts and name in OF_PROMPTS):
            continue
        if before.get(name) != now.get(name):
            yield f"{name} is {now.get(name)!r}, and was {before.get(name)!r}"


def _settings_of(task: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    if task.startswith(LM_EVAL):
        return _settings_of_lm_eval(task.removeprefix(LM_EVAL), summary)
    part = summary["tasks"].get(task, {})
    return {**dict(_flat({name: part.get(name) for name in ("protocol", "set")})), "bos": part.get("bos")}


def _settings_of_lm_eval(name: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return how lm-eval ran a task: the summary has it with the task of ours that asked for it, a leaderboard for example."""
    for part in summary["tasks"].values():
        figures = part.get("lm_eval") or {}
        if name in figures.get("tasks", {}):
            head = {"lm_eval.version": figures.get("version"), "bos": figures.get("bos"), "protocol.style": figures.get("chat")}
            own = ("metric", "filter", "num_fewshot", "version")
            sums = {f"{name}.file": (part.get("set") or {}).get("sums", {}).get(name)}
            return head | {f"{name}.{key}": figures["tasks"][name].get(key) for key in own} | sums
    return {"lm_eval.version": summary.get("versions", {}).get("lm_eval")}


def told(old: Evaluation, new: Evaluation) -> list[str]:
    """Return what differs between two evaluations and does not keep them from being paired, but may be the reason of a change."""
    both = [(name, part, new.summary["tasks"][name]) for name, part in old.summary["tasks"].items() if name in new.summary["tasks"]]
    places = [("", TOLD, old.summary, new.summary), *((f"tasks.{name}.", TOLD_OF_TASKS, *parts) for name, *parts in both)]
    return [
        f"{where}{name} is {now.get(name)!r}, and was {before.get(name)!r}"
        for where, names, before, now in places
        for name in names
        if now.get(name) != before.get(name)
    ]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _prompts(old: Mapping[Key, Scored], new: Mapping[Key, Scored]) -> Iterator[str]:
    """Yield why the prompts are other ones: a changed template would otherwise pass for a change of the model."""
    before = {id: scored.prompt_sha256 for (id, _), scored in old.items()}
    now = {id: scored.prompt_sha256 for (id, _), scored in new.items()}
    both = before.keys() & now.keys()
    changed = sorted(id for id in both if before[id] != now[id])
    if changed:
        yield f"the prompts of {len(changed)} of {len(both)} questions differ ({named(changed)})"
    if not both:
        yield "no question has the same id in both"


def named(ids: tuple[str, ...] | list[str]) -> str:
    """Return the first of some ids as words."""
    more = f", and {len(ids) - NUM_NAMED} more" if len(ids) > NUM_NAMED else ""
    return ", ".join(ids[:NUM_NAMED]) + more
