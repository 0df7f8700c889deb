"""The pipeline: the stages of each study with their state."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_prism.report.document import Column, Section, Table, Value
from megatron_prism.report.material import Figures, Material, Result, Stage
from megatron_prism.report.names import free
from megatron_prism.report.sections.common import Paper

ID, TITLE = "pipeline", "The pipeline"


def section(materials: Sequence[Material], paper: Paper) -> Section:
    """Return the stages, a column of states for each study."""
    studies, merges = [one for one in materials if one.stages], _merges(materials)
    if not studies:
        return Section(ID, TITLE, blocks=tuple(merges), absent="" if merges else "No study was given: single folders have no stages.")
    stages = list({stage.name: stage for one in studies for stage in one.stages}.values())
    by_study = [{stage.name: stage for stage in one.stages} for one in studies]
    states = [Column("state" if len(studies) == 1 else one.name) for one in studies]
    columns = (Column("stage"), *states, Column("what it does"), Column("model"), Column("job"), Column("after"))
    rows = tuple(_row(stage, [of.get(stage.name) for of in by_study]) for stage in stages)
    return Section(ID, TITLE, blocks=(Table("pipeline", "Stages, in the order of the study", columns, rows), *_failures(studies), *merges))


def _row(stage: Stage, of_studies: Sequence[Stage | None]) -> tuple[Value, ...]:
    return (
        stage.name,
        *(of.state if of else None for of in of_studies),
        stage.title,
        stage.model,
        stage.job,
        ", ".join(stage.after) or None,
    )


def _merges(materials: Sequence[Material]) -> list[Table]:
    """Return what each merge is made of. Studies share their merges: those of the first that has each are shown. A copy of one is no other merge.

    Of single folders two merges of one name are told apart by a number.
    """
    merges: dict[str, Result] = {}
    seen: list[Figures] = []
    for one in materials:
        shared = set(merges) if one.stages else set()
        for merge in one.merges:
            if merge.values in seen:
                continue
            seen.append(merge.values)
            if merge.name not in shared:
                merges[free(merge.name, merges)] = merge
    columns = (Column("merge"), Column("method"), Column("of"), Column("weight"))
    rows = tuple(
        (name, str(merge.values["config"]["method"]), "/".join(str(parent["path"]).rstrip("/").split("/")[-2:]), parent["weight"])
        for name, merge in merges.items()
        for parent in merge.values["parents"]
    )
    return [Table("merges", "Merges, and what they are made of", columns, rows)] if rows else []


def _failures(studies: Sequence[Material]) -> list[Table]:
    rows = tuple(
        (one.name, of.name, of.state, of.failure or of.reason) for one in studies for of in one.stages if of.state not in ("done", "no-go")
    )
    columns = (Column("study"), Column("stage"), Column("state"), Column("why"))
    return [Table("pipeline_open", "Stages that are not done", columns, rows, num_keys=2)] if rows else []
