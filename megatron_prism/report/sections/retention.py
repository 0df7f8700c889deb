"""What was kept of what the base knew: what a gate lets fall by so much at most, lm-eval's tasks, held-out losses, scores by length of the context."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from megatron_prism.report import draw
from megatron_prism.report.document import Column, Figure, Measured, Section, Table, number_of
from megatron_prism.report.draw import Series
from megatron_prism.report.material import Material
from megatron_prism.report.sections import ancestors
from megatron_prism.report.sections.benchmarks import RETAINED, of_task
from megatron_prism.report.sections.common import Paper, absent, apart, from_paper, over_studies, seeds, tasks
from megatron_prism.report.statistics import by_error

ID, TITLE = "retention", "Retention and long context"
Cells = dict[tuple[str, str], Measured]


def section(materials: Sequence[Material], paper: Paper) -> Section:
    """Return a table of each kind of retention that was measured."""
    kept, losses, lengths = (over_studies(materials, read) for read in (_scores, _losses, _lengths))
    blocks: list[Table | Figure] = []
    blocks += _table(materials, "retention", "Scores of what is to be kept", kept, "%", ".1f")
    blocks += _table(materials, "retention_loss", "Held-out loss by source: less is better", losses, "nats a token", ".4g")
    if lengths:
        blocks += _table(materials, "retention_length", "Score by the length of the context", lengths, "%", ".1f")
        blocks += _by_length(lengths)
        blocks += from_paper(paper, "t07_long_context", "retention_paper_length")
    if not blocks:
        return absent(ID, TITLE, "No evaluation measured retention: no held-out loss, no task of lm-eval, no score by length.")
    return Section(ID, TITLE, tuple(filter(None, [seeds(materials)])), tuple(blocks))


def _scores(material: Material) -> Iterator[tuple[tuple[str, str], Measured]]:
    return apart(_kept(material))


def _kept(material: Material) -> Iterator[tuple[str, str, str, Measured]]:
    """Yield scores of what is to be kept: model, name, and of a part of a task, which two tasks may have, the task's name."""
    guarded = {rule["measure"] for verdict in material.verdicts for rule in verdict.values["rules"] if rule["least_change"] <= 0}
    for (model, name), asked in tasks(material):
        parts = dict((asked.of.get("lm_eval") or {}).get("tasks", {}))
        own = parts.pop(asked.task) if parts.keys() == {asked.task} else asked.of  # a task that is one part is that part, with its error
        if (asked.task in guarded or asked.of.get("set", {}).get("name") in RETAINED) and own.get("score") is not None:
            yield model, name, "", of_task(own)
        for part, of in parts.items():
            if of.get("score") is not None:
                yield model, part, name, of_task(of)


def _losses(material: Material) -> Iterator[tuple[tuple[str, str], Measured]]:
    for (model, name), asked in tasks(material):
        for source, loss in (asked.of.get("losses") or {}).items():
            yield (model, f"{name}: {source}"), by_error(loss["loss"], loss.get("standard_error"), loss.get("num_sequences"))


def _lengths(material: Material) -> Iterator[tuple[tuple[str, str], Measured]]:
    return apart(_by_lengths(material))


def _by_lengths(material: Material) -> Iterator[tuple[str, str, str, Measured]]:
    """Yield scores by length: of a task whose questions are tagged with one, and of tasks of one name that end in lengths (retrieval_128, retrieval_512).

    The number of a published set's task is no length (aime_24, aime_25).
    """
    named = {task for one in material.evaluations for task, of in one.tasks.items() if of.get("set", {}).get("name") in ("file", *RETAINED)}
    stems = Counter(stem for stem, _ in {_stem(task) for task in named})
    for (model, name), asked in tasks(material):
        for length, score in (asked.of.get("by") or {}).get("length", {}).items():
            yield model, f"{name} at {length}", "", Measured(100 * float(score))
        stem, length = _stem(asked.task)
        if asked.task in named and length and stems[stem] > 1 and asked.of.get("score") is not None:
            yield model, f"{stem}{name.removeprefix(asked.task)} at {length}", name, of_task(asked.of)


def _stem(task: str) -> tuple[str, str]:
    stem, _, length = task.rpartition("_")
    return (stem, length) if stem and length.isdecimal() else (task, "")


def _table(materials: Sequence[Material], id: str, caption: str, cells: Cells, unit: str, form: str) -> list[Table]:
    if not cells:
        return []
    models, names = (list(dict.fromkeys(part)) for part in zip(*cells, strict=True))
    models = ancestors.in_order(materials, models)
    columns = (Column("model"), *(Column(name, unit, form) for name in names))
    return [Table(id, caption, columns, tuple((model, *(cells.get((model, name)) for name in names)) for model in models))]


def _by_length(cells: Cells) -> Iterator[Figure]:
    models, names = (list(dict.fromkeys(part)) for part in zip(*cells, strict=True))
    lengths = {name: float(length) for name in names if (length := name.rpartition(" at ")[2]).isdigit()}
    for number, task in enumerate(dict.fromkeys(name.rpartition(" at ")[0] for name in lengths)):
        own = sorted((length, name) for name, length in lengths.items() if name.rpartition(" at ")[0] == task)
        series = [Series(model, tuple(length for length, _ in own), tuple(cells.get((model, name)) for _, name in own)) for model in models]
        series = [one for one in series if any(number_of(value) is not None for value in one.y)]
        yield draw.lines(
            f"length_{number}", f"{task}: score by length of the context", Column("length", "tokens"), Column("score", "%", ".1f"), series
        )
