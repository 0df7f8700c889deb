"""What each model can do, from base to RL: the score of each task with its interval, and the change since the first model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean, stdev

from megatron_prism.report import draw
from megatron_prism.report.document import Column, Figure, Measured, Section, Table, Value
from megatron_prism.report.draw import Series
from megatron_prism.report.material import Figures, Material
from megatron_prism.report.sections import ancestors
from megatron_prism.report.sections.common import Asked, Paper, absent, from_paper, over_studies, seeds, slug, tasks
from megatron_prism.report.statistics import NORMAL, by_error

ID, TITLE = "benchmarks", "Benchmarks"
Change = tuple[str, str, str]  # a model, since which other one, the task
RETAINED = ("held_out", "ruler", "lm_eval", "leaderboard_v1", "leaderboard_v2")  # sets that say what was kept (retention.py)
TEXT = (
    "A score is the mean over a task's questions of the mean over a question's responses. Intervals are 95 %, clustered by question, of the normal distribution: near 0 and 100 "
    "they may reach beyond. A change is "
    "paired by question where both models answered the same questions of one file; else the two evaluations are taken as independent, and its interval is wider: the table says which, and why."
)


def section(materials: Sequence[Material], paper: Paper) -> Section:
    """Return the scores, their changes, and a figure a task."""
    evaluations = [one for material in materials for one in material.evaluations]
    if not evaluations:
        return absent(ID, TITLE, "No evaluation was given.")
    scores = over_studies(materials, _scores)
    models, names = (list(dict.fromkeys(part)) for part in zip(*scores, strict=True)) if scores else ([], [])
    models = ancestors.in_order(materials, models)
    open_rows = tuple(
        (material.name, one.name, "not finished") for material in materials for one in material.evaluations if not one.has_ended
    )
    pending = (
        [
            Table(
                "benchmarks_open",
                "Evaluations that have not ended",
                (Column("study"), Column("model"), Column("state")),
                open_rows,
                num_keys=2,
            )
        ]
        if open_rows
        else []
    )
    if not models:
        return Section(ID, TITLE, blocks=tuple(pending), absent="" if pending else "No evaluation has a task with a score.")
    columns = (Column("model"), *(Column(name, "%", ".1f") for name in names), Column("gate"))
    rows = tuple((model, *(scores.get((model, name)) for name in names), _gate(materials, model)) for model in models)
    note = "; ".join(f"{name}: {_size(name, materials)}" for name in names)
    blocks: list[Table | Figure] = [*pending, Table("benchmarks", "Scores by model and task", columns, rows, note)]
    if changes := _changes(materials, models, names):
        blocks.append(changes)
    blocks += _figures(scores, models, names)
    ours = {str(of.get("set", {}).get("name")) for one in evaluations for of in one.tasks.values()}
    papers = (
        ("t05_domains", "t11_pipeline")
        if ours & set(paper["t11_pipeline"].columns if "t11_pipeline" in paper else ())
        else ("t05_domains",)
    )
    blocks += [table for name in papers for table in from_paper(paper, name, f"benchmarks_{name}")]
    return Section(ID, TITLE, tuple(filter(None, (TEXT, seeds(materials)))), tuple(blocks))


def _scored(material: Material) -> Iterator[tuple[tuple[str, str], Asked]]:
    """Yield each model's tasks that have a score of what it can do."""
    return (
        (key, one) for key, one in tasks(material) if one.of.get("score") is not None and one.of.get("set", {}).get("name") not in RETAINED
    )


def _scores(material: Material) -> Iterator[tuple[tuple[str, str], Measured]]:
    """Yield each model's score of each task, in percent."""
    return ((key, of_task(one.of)) for key, one in _scored(material))


def _gate(materials: Sequence[Material], model: str) -> str | None:
    """Return what the verdicts on a model decided, of several studies how often each. None: there is none."""
    decided = [
        str(verdict.values.get("decision"))
        for one in materials
        for verdict in one.verdicts
        if verdict.model == model and verdict.values.get("decision")
    ]
    words = list(dict.fromkeys(decided))
    return words[0] if len(words) == 1 else ", ".join(f"{word} in {decided.count(word)}" for word in words) or None


def of_task(of: Figures) -> Measured:
    """Return a task's score in percent with its interval. n: its questions."""
    error, count = of.get("standard_error"), of.get("num_questions")
    return by_error(100 * float(of["score"]), None if error is None else 100 * float(error), None if count is None else int(count))


def _size(name: str, materials: Sequence[Material]) -> str:
    of = next(one.of for material in materials for (_, own), one in _scored(material) if own == name)
    protocol = of.get("protocol") or {}
    temperature = "" if protocol.get("temperature") is None else f", T {protocol['temperature']:g}"
    return f"n {of.get('num_questions', '?')} questions x {of.get('num_samples', 1)} responses{temperature}"


def _compared(materials: Sequence[Material], models: Sequence[str]) -> Iterator[tuple[Change, Asked, Asked]]:
    """Yield each task of a model beside that of the first and the last of the models that it was made of."""
    for material in materials:
        own, made_of = dict(_scored(material)), ancestors.of(material, models)
        for (model, name), new in own.items():
            for since in dict.fromkeys([*made_of[model][:1], *made_of[model][-1:]]):
                if old := own.get((since, name)):
                    yield (model, since, name), new, old


def _changes(materials: Sequence[Material], models: Sequence[str], tasks: Sequence[str]) -> Table | None:
    """Return each model's changes since the models that it was made of. None: no model was made of another."""
    changes = over_studies(materials, lambda one: ((key, _change(new, old)) for key, new, old in _compared([one], models)))
    pairs = sorted({(models.index(model), models.index(since)) for model, since, _ in changes})
    columns = (Column("model"), Column("since"), *(Column(task, "points", ".1f", signed=True) for task in tasks))
    rows: list[tuple[Value, ...]] = [
        (models[to], models[since], *(changes.get((models[to], models[since], task)) for task in tasks)) for to, since in pairs
    ]
    return (
        Table(
            "benchmarks_change",
            "Change since the model that training began with, and since the one before",
            columns,
            tuple(rows),
            _independent(_compared(materials, models)),
            num_keys=2,
        )
        if rows
        else None
    )


def _change(new: Asked, old: Asked) -> Measured:
    """Return a change in points, with the interval of the questions' differences where the two are paired."""
    if _unpaired(new, old):
        return difference(of_task(new.of), of_task(old.of))
    changes = [100 * (score - old.questions[id]) for id, score in sorted(new.questions.items())]
    return by_error(fmean(changes), stdev(changes) / math.sqrt(len(changes)), len(changes))


def _unpaired(new: Asked, old: Asked) -> str:
    """Return why two tasks are not paired by question, empty where they are."""
    if not new.questions or not old.questions:
        return "one of the two has no scores by question"
    if _set(new) != _set(old):
        return "not the same set"
    if new.questions.keys() != old.questions.keys():
        return "not the same questions"
    return "" if len(new.questions) > 1 else "a single question"


def _independent(compared: Iterable[tuple[Change, Asked, Asked]]) -> str:
    """Return which changes are not paired, and why. Of several studies a change has their interval, whatever each one's is."""
    compared = list(compared)
    of_studies = Counter(key for key, _, _ in compared)
    names: dict[str, dict[str, list[str]]] = {}
    for (model, since, name), new, old in compared:
        if of_studies[model, since, name] == 1 and (why := _unpaired(new, old)):
            names.setdefault(why, {}).setdefault(f"{model} since {since}", []).append(name)
    of_why = {why: "; ".join(f"{pair}: {', '.join(own)}" for pair, own in pairs.items()) for why, pairs in names.items()}
    return f"Taken as independent: {'; '.join(f'{why} ({pairs})' for why, pairs in of_why.items())}." if of_why else ""


def _set(one: Asked) -> dict[str, object]:
    """Return what says which questions a task asks: not the path, by which two models may name one file."""
    return {key: value for key, value in (one.of.get("set") or {}).items() if key not in ("path", "notes")}


def difference(new: Measured, old: Measured) -> Measured:
    """Return a change with the interval of two independent figures."""
    if None in (new.low, old.low):
        return Measured(new.value - old.value)
    errors = [(one.value - (one.low or 0.0)) / NORMAL for one in (new, old)]
    return by_error(new.value - old.value, math.hypot(*errors), new.n)


def _figures(scores: dict[tuple[str, str], Measured], models: Sequence[str], tasks: Sequence[str]) -> Iterator[Figure]:
    used: set[str] = set()
    for task in tasks:
        have = [model for model in models if (model, task) in scores]
        series = [Series(task, (), tuple(scores[model, task] for model in have))]
        yield draw.dots(f"benchmark_{slug(task, used)}", f"{task}: score by model", Column("score", "%", ".1f"), have, series, "model")
