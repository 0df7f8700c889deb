"""What was read, as a document: every section in order, and a summary above them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType

from megatron_prism.core.errors import printable
from megatron_prism.report.document import Document, Figure, Section, Table, without
from megatron_prism.report.material import Material
from megatron_prism.report.sections import (
    benchmarks,
    changes,
    claims,
    contamination,
    cost,
    gates,
    landscape,
    mixtures,
    pipeline,
    representations,
    responses,
    retention,
    spectra,
    training,
)
from megatron_prism.report.sections.common import Paper, slug

Write = Callable[[Sequence[Material], Paper], Section]
SECTIONS: tuple[ModuleType, ...] = (
    pipeline,
    claims,
    mixtures,
    training,
    benchmarks,
    gates,
    retention,
    contamination,
    changes,
    spectra,
    representations,
    landscape,
    responses,
    cost,
)
STATES = ("holds", "fails", "no more than its null", "prerequisite not met", "not measured")
UNFIT = (ValueError, LookupError, ArithmeticError, TypeError, AttributeError, RecursionError)  # what a damaged result raises


def build(materials: Sequence[Material], paper: Paper, title: str) -> Document:
    """Return the report. A section whose results are damaged says so, and the others stand."""
    sections = [_section(part, materials, paper) for part in SECTIONS]
    used: set[str] = set()
    named = (replace(section, blocks=tuple(_named(block, used) for block in section.blocks)) for section in sections)
    return Document(title, tuple(_lead(materials)), tuple(named))


def _named(block: Table | Figure, used: set[str]) -> Table | Figure:
    """Return a block under a name that no other has: names of tasks and stages come into it."""
    if isinstance(block, Figure):
        return replace(block, id=slug(block.id, used), table=replace(block.table, id=slug(block.table.id, used)))
    return replace(block, id=slug(block.id, used))


def _section(part: ModuleType, materials: Sequence[Material], paper: Paper) -> Section:
    try:
        section: Section = part.section(materials, paper)
        one = "study" if len(materials) == 1 else ""  # a column that would say the same in each row
        return replace(section, blocks=tuple(without(block, one) if isinstance(block, Table) else block for block in section.blocks))
    except UNFIT as error:
        why = printable(f"{type(error).__name__}: {error}")[:300]
        return Section(part.ID, part.TITLE, absent=f"A result is not in the form that this section reads ({why}).")


def _lead(materials: Sequence[Material]) -> list[str]:
    """Return the first sentences: what was read, what of the claims holds, what is damaged."""
    studies = [one for one in materials if one.stages]
    lead = []
    if studies:
        done = sum(stage.state in ("done", "no-go") for one in studies for stage in one.stages)
        lead.append(
            f"{len(studies)} {'study' if len(studies) == 1 else 'studies'}: {done} of {sum(len(one.stages) for one in studies)} stages have run."
        )
    judged = [[claim.state for claim in one.claims] for one in studies if one.claims]
    if len(judged) == 1:
        states = Counter(judged[0])
        counts = [f"{state} {states[state]}" for state in dict.fromkeys((*STATES, *states)) if states[state]]
        lead.append(f"Claims, {len(judged[0])} in all: {', '.join(counts)}.")
    elif judged:
        names = {claim.name for one in studies for claim in one.claims}
        every = sum(all(claim.state == "holds" for one in studies for claim in one.claims if claim.name == name) for name in names)
        lead.append(f"{every} of {len(names)} claims hold in each of the {len(judged)} studies that judge them.")
    if len({frozenset(stage.name for stage in one.stages) for one in studies}) > 1:
        lead.append("The studies have not the same stages: what is taken over studies counts each model and task of one name as the same.")
    lead.append("Square brackets hold 95 % intervals where nothing else is said. A dash stands where there is no figure.")
    return [*lead, *(f"Damaged: {line}." for one in materials for line in one.told)]
