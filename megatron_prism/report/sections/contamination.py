"""Contamination: which questions of evaluation sets stand in training data."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_prism.report.document import Column, Section, Table
from megatron_prism.report.material import Material
from megatron_prism.report.sections.common import Paper, absent

ID, TITLE = "contamination", "Contamination"
TEXT = "A hit is a question of which some document holds an n-gram; it is not yet a copy. Containment is the largest share of a question's n-grams that one document holds."


def section(materials: Sequence[Material], paper: Paper) -> Section:
    """Return a row for each source and set."""
    scans = [(one.name, scan) for one in materials for scan in one.contaminations]
    if not scans:
        return absent(ID, TITLE, "No scan was given: prism contaminate writes one.")
    rows = tuple(
        (
            study,
            row["source"],
            row["benchmark"],
            row["side"],
            row["num_hit"],
            row["num_whole"],
            row["num_searched"],
            row["num_documents_hit"],
            percent(row["containment"]),
            percent(row["max_containment"]),
        )
        for study, scan in scans
        for row in scan.values["table"]
    )
    counts = (Column("hit"), Column("held whole"), Column("looked for"), Column("documents"))
    columns = (
        Column("study"),
        Column("source"),
        Column("benchmark"),
        Column("side"),
        *counts,
        Column("containment", "%", ".2f"),
        Column("largest", "%", ".0f"),
    )
    ngrams = ", ".join(dict.fromkeys(str(scan.values["ngram"]) for _, scan in scans))
    return Section(
        ID,
        TITLE,
        (TEXT,),
        (Table("contamination", f"Evaluation sets in training data, by n-grams of {ngrams} words", columns, rows, num_keys=4),),
    )


def percent(share: float | None) -> float | None:
    """Return a share in percent."""
    return None if share is None else 100 * share
