"""`prism analyze responses`: what the responses of evaluations are like, by model and task, and what changed from each model to the next."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from megatron_prism.analysis import flips, responses
from megatron_prism.analysis.responses import Responses
from megatron_prism.core import log
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.eval.folder import RESULTS
from megatron_prism.eval.question import Result, read_results
from megatron_prism.eval.score import pass_at
from megatron_prism.eval.verdicts import paired
from megatron_prism.eval.verdicts.paired import Evaluation
from megatron_prism.prepare.texts import named_path

CUT = ("max_tokens", "max_context")  # ends of a response for want of room
NULLS = {
    "solvability": "the same chance of each problem, the mean pass rate (binomial)",
    "flips": "the first model against itself: two draws from its own responses to a problem, without putting back; no draws, of one model or of both, have "
    "a sample's number in common, since one number is one seed",
    "edge": "halves of the responses by number: one of the first model's gives the bin, the other of both models' the gain; gain_naive has regression to the mean in it",
}


@dataclass(eq=False)
class Read:
    """A task's responses as they are read: a row each. faults are counted, and have no row."""

    rows: list[tuple[str, int, bool, int, float, bool]] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    num_steps: int = 0
    repetition: list[float | None] = field(default_factory=list)
    compression: list[float | None] = field(default_factory=list)

    def add(self, result: Result, steps: re.Pattern[str] | None) -> None:
        """Count a response."""
        self.outcomes[result.outcome] += 1
        if result.outcome == "fault":
            return
        neg_logprob = math.nan if result.mean_logprob is None else -result.mean_logprob
        is_cut, is_right = result.ended in CUT, result.outcome == "right"
        self.rows.append((result.id, result.sample, is_right, result.num_tokens, neg_logprob, is_cut))
        self.num_steps += responses.has_steps(result.text, steps)
        self.repetition.append(responses.repetition(result.text))
        self.compression.append(responses.compression(result.text))

    def arrays(self, ids: Sequence[str]) -> Responses:
        """Return the responses to some problems, which are numbered in their order."""
        place = {id: number for number, id in enumerate(ids)}
        rows = [(place[id], *rest) for id, *rest in self.rows if id in place]
        problem, sample, is_right, num_tokens, neg_logprob, is_cut = zip(*rows, strict=True) if rows else ((),) * 6
        whole = [np.array(values, dtype=np.int64) for values in (problem, sample, num_tokens)]
        return Responses(whole[0], whole[1], np.array(is_right, bool), whole[2], np.array(neg_logprob, float), np.array(is_cut, bool))


def run(named: Sequence[str], tasks: Sequence[str], steps: str | None) -> dict[str, Any]:
    """Return the figures of each model and task, and of each model against the next. named: evaluations' folders, each as NAME=DIR or DIR.

    tasks: those looked at; empty: all whose responses were sampled. steps: a regular expression that a response with steps holds.
    Raises: InputError where a folder is no evaluation that has ended, a name comes twice, or a task is in none.
    """
    folders, pattern = _folders(named), _pattern(steps)
    evaluations = dict(zip(folders, paired.read_all([*folders.values()]), strict=True))
    read = {name: _read(folder, tasks, pattern) for name, folder in folders.items()}
    absent = [task for task in tasks if not any(task in of for of in read.values())]
    known = ", ".join(dict.fromkeys(task for one in evaluations.values() for task in one.tasks))
    raise_problems([Problem("--task", task, f"a task with sampled responses; there are responses to {known}") for task in absent])
    return {
        "kind": "analysis",
        "analysis": "responses",
        "steps": steps or "text before </think>, or two lines with text",
        "null": NULLS,
        "models": {
            name: {
                "folder": str(folders[name]),
                "model": dict(evaluations[name].summary["model"]),
                "tasks": {task: {**_figures(of), **_sampling(evaluations[name], task)} for task, of in read[name].items()},
            }
            for name in folders
        },
        "flips": {
            f"{old}->{new}": {
                task: _change(task, (evaluations[old], evaluations[new]), (read[old][task], read[new][task]))
                for task in read[old]
                if task in read[new]
            }
            for old, new in pairwise(folders)
        },
    }


def _folders(named: Sequence[str]) -> dict[str, Path]:
    pairs = [named_path(word) for word in named]
    names = [name or Path(path).resolve().name for name, path in pairs]
    twice = [name for name, count in Counter(names).items() if count > 1]
    raise_problems([Problem("RUN", f"the name {name!r} twice", "a name used once", "give a name: NAME=DIR") for name in twice])
    return dict(zip(names, (Path(path) for _, path in pairs), strict=True))


def _pattern(steps: str | None) -> re.Pattern[str] | None:
    try:
        return None if steps is None else re.compile(steps, re.DOTALL)
    except re.error as error:
        raise InputError(Problem("--steps", f"{steps!r}: {error}", "a regular expression")) from None


def _read(folder: Path, tasks: Sequence[str], steps: re.Pattern[str] | None) -> dict[str, Read]:
    """Return the responses by task. A task that was not sampled (lm-eval's log-probabilities) has none."""
    by_task: dict[str, Read] = {}
    for result in read_results(folder / RESULTS):
        if (result.ended or result.outcome == "fault") and (not tasks or result.task in tasks):
            by_task.setdefault(result.task, Read()).add(result, steps)
    return {task: of for task, of in by_task.items() if of.rows}


def _sampling(evaluation: Evaluation, task: str) -> dict[str, Any]:
    """Return how a task was sampled: log-probabilities of the engine are those of softmax(logits / temperature), and at 0 of softmax(logits)."""
    protocol = evaluation.summary["tasks"].get(task, {}).get("protocol") or {}
    return {"sampling": {key: protocol.get(key) for key in ("temperature", "top_p", "max_tokens")}}


def _figures(read: Read) -> dict[str, Any]:
    """Return a task's figures."""
    ids = list(dict.fromkeys(id for id, *_ in read.rows))
    of = read.arrays(ids)
    solved, is_right_N = responses.solvability(of), of.is_right_N
    return {
        "num_problems": len(ids),
        "num_responses": len(read.rows),
        "num_faults": read.outcomes["fault"],
        "pass_rate": asdict(responses.pass_rate(of)),
        "tokens": {
            "all": asdict(responses.lengths(of.num_tokens_N)),
            "right": asdict(responses.lengths(of.num_tokens_N[is_right_N])),
            "wrong": asdict(responses.lengths(of.num_tokens_N[~is_right_N])),
        },
        "share_cut": float(of.is_cut_N.mean()),
        "share_with_format": 1 - read.outcomes["no_format"] / len(read.rows),
        "share_with_steps": read.num_steps / len(read.rows),
        "repetition": responses.mean_of(read.repetition),
        "compression": responses.mean_of(read.compression),
        "neg_logprob": asdict(responses.certainty(of)),
        "solvability": {
            **asdict(solved),
            **{key: dict(_by_place(values)) for key, values in (("histogram", solved.histogram), ("null", solved.null))},
        },
        "pass_at": _pass_at(of, len(ids)),
    }


def _by_place(values: Sequence[float]) -> list[tuple[str, float]]:
    """Return values by their place, as keys of JSON."""
    return [(str(number), value) for number, value in enumerate(values)]


def _pass_at(of: Responses, num_problems: int) -> dict[str, float]:
    """Return the whole curve of pass@k, unbiased, of the problems with at least k responses."""
    num_P, right_P = (values.tolist() for values in flips.counts(of, num_problems))
    return {
        str(k): fmean(pass_at(num, right, k) for num, right in zip(num_P, right_P, strict=True) if num >= k)
        for k in range(1, max(num_P, default=0) + 1)
    }


def _change(task: str, evaluations: tuple[Evaluation, Evaluation], read: tuple[Read, Read]) -> dict[str, Any]:
    """Return the flips of a task and its gain by pass rate; or why there are none: it was asked, sampled or graded otherwise."""
    if reasons := paired.unlike(task, *evaluations):
        log.get().warning("%s: not compared: %s", task, "; ".join(reasons))
        return {"not_compared": reasons}
    both = {id for id, *_ in read[0].rows} & {id for id, *_ in read[1].rows}
    ids = sorted(both)
    if not ids:
        return {"not_compared": ["no problem that both answered"]}
    old, new = (one.arrays(ids) for one in read)
    made = flips.flips(old, new)
    return {**asdict(made), "edge": {one.name: asdict(one) for one in flips.edges(old, new, len(ids))}}
