"""The claims of the paper that a study judges: their state in each study, and the figures behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_prism.report.document import Column, Measured, Section, Table, Value
from megatron_prism.report.material import Claim, Material
from megatron_prism.report.sections.common import Paper, absent, from_paper
from megatron_prism.report.statistics import over

ID, TITLE = "claims", "The claims"
TEXT = (
    "A claim holds where all its checks hold on this study's figures. Where a prerequisite is not met (the model never learned what the claim is about) it is not "
    "judged. Where its null does as well as the figure, it says no more than chance."
)


def section(materials: Sequence[Material], paper: Paper) -> Section:
    """Return the claims with their states, then every check with its figures."""
    studies = [one for one in materials if one.claims]
    if not studies:
        return absent(ID, TITLE, "No study with claims was given.")
    claims = list({claim.name: claim for one in studies for claim in one.claims}.values())
    by_study = [{claim.name: claim for claim in one.claims} for one in studies]
    states = [Column("state" if len(studies) == 1 else one.name) for one in studies]
    several = len(studies) > 1
    columns = (
        Column("claim"),
        *states,
        *([Column("holds in")] if several else []),
        Column("says"),
        Column("paper"),
        Column("judged at"),
        Column("note"),
    )
    rows = tuple(_row(claim, [of.get(claim.name) for of in by_study], several) for claim in claims)
    checks = tuple(row for claim in claims for row in _checks(claim.name, [of[claim.name] for of in by_study if claim.name in of]))
    check_columns = (
        Column("claim"),
        Column("part"),
        Column("figure"),
        Column("is", "", ".4g"),
        Column("must be"),
        Column("than", "", ".4g"),
        Column("margin", "", ".4g"),
        Column("holds"),
    )
    note = "Of several studies: the mean of a figure, with Student's 95 % interval." if several else ""
    tables = (
        Table("claims", "Each claim, and whether it holds", columns, rows),
        Table("claims_checks", "The checks behind each claim", check_columns, checks, note, num_keys=3),
        *from_paper(paper, "icml_poster", "claims_icml"),
    )
    return Section(ID, TITLE, (TEXT,), tables)


def _row(claim: Claim, of_studies: Sequence[Claim | None], several: bool) -> tuple[Value, ...]:
    states = [of.state if of else None for of in of_studies]
    count = [f"{states.count('holds')} of {len(states)}"] if several else []
    return (claim.name, *states, *count, claim.says, claim.source or None, claim.judged_at or None, claim.note or None)


def _checks(name: str, claims: Sequence[Claim]) -> Iterator[tuple[Value, ...]]:
    """Yield a row a check. Studies of one config have the same checks in the same order."""
    for place, check in enumerate(claims[0].checks):
        same = [(claim, claim.checks[place]) for claim in claims if place < len(claim.checks)]
        value, than = ([_figure(of[key], claim.figures) for claim, of in same] for key in ("value", "than"))
        held = [of.get("holds") for _, of in same]
        words = {True: "yes", False: "no", None: "not measured"}
        said = words.get(held[0], "") if len(same) == 1 else f"{held.count(True)} of {len(held)}"
        named = str(check["value"]) if not isinstance(check["than"], str) else f"{check['value']} against {check['than']}"
        yield (
            name,
            str(check["part"]),
            named,
            over_known(value),
            str(check["relation"]),
            over_known(than),
            float(check.get("by") or 0),
            said,
        )


def _figure(value: Any, figures: Mapping[str, Any]) -> Measured | None:
    number = figures.get(value) if isinstance(value, str) else value
    return Measured(float(number)) if isinstance(number, int | float) else None


def over_known(values: Sequence[Measured | None]) -> Measured | None:
    """Return the mean of the figures that are known."""
    return over([value for value in values if value is not None])
