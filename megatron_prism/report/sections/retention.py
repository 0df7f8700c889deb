"""What was kept of what the base knew: held-out losses by source, lm-eval's tasks, and scores by the length of the context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_prism.report import draw
from megatron_prism.report.document import Column, Figure, Measured, Section, Table, number_of
from megatron_prism.report.draw import Series
from megatron_prism.report.material import Material
from megatron_prism.report.sections.benchmarks import RETAINED, of_task
from megatron_prism.report.sections.common import Paper, absent, from_paper, over_studies, seeds
from megatron_prism.report.statistics import by_error

ID, TITLE = "retention", "Retention and long context"
Cells = dict[tuple[str, str], Measured]


def section(materials: Sequence[Material], paper: Paper) -> Section:
    """Return a table of each kind of retention that was measured."""
    kept, losses, lengths = (over_studies(materials, read) for read in (_scores, _losses, _lengths))
    blocks: list[Table | Figure] = []
    blocks += _table("retention", "Scores of what is to be kept", kept, "%", ".1f")
    blocks += _table("retention_loss", "Held-out loss by source: less is better", losses, "nats a token", ".4g")
    if lengths:
        blocks += _table("retention_length", "Score by the length of the context", lengths, "%", ".1f")
        blocks += _by_length(lengths)
        blocks += from_paper(paper, "t07_long_context", "retention_paper_length")
    if not blocks:
        return absent(ID, TITLE, "No evaluation measured retention: no held-out loss, no task of lm-eval, no score by length.")
    return Section(ID, TITLE, tuple(filter(None, [seeds(materials)])), tuple(blocks))


def _scores(material: Material) -> Iterator[tuple[tuple[str, str], Measured]]:
    for one in material.evaluations:
        for task, of in one.tasks.items():
            if of.get("set", {}).get("name") in RETAINED and of.get("score") is not None:
                yield (one.name, task), of_task(of)
            for name, part in (of.get("lm_eval") or {}).get("tasks", {}).items():
                if part.get("score") is not None:
                    yield (one.name, name), of_task(part)


def _losses(material: Material) -> Iterator[tuple[tuple[str, str], Measured]]:
    for one in material.evaluations:
        for task, of in one.tasks.items():
            for source, loss in (of.get("losses") or {}).items():
                yield (one.name, f"{task}: {source}"), by_error(loss["loss"], loss.get("standard_error"), loss.get("num_sequences"))


def _lengths(material: Material) -> Iterator[tuple[tuple[str, str], Measured]]:
    for one in material.evaluations:
        for task, of in one.tasks.items():
            for length, score in (of.get("by") or {}).get("length", {}).items():
                yield (one.name, f"{task} at {length}"), Measured(100 * float(score))


def _table(id: str, caption: str, cells: Cells, unit: str, form: str) -> list[Table]:
    if not cells:
        return []
    models, names = (list(dict.fromkeys(part)) for part in zip(*cells, strict=True))
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
