"""Gates: the verdicts on two evaluations, rule by rule and task by task, paired by question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_prism.report.document import Column, Measured, Section, Table, Value
from megatron_prism.report.material import Material, Result
from megatron_prism.report.sections.common import Paper, absent

ID, TITLE = "gates", "Gates"
TEXT = (
    "A verdict compares two evaluations question by question. Bounds are one-sided at the policy's alpha, so an interval here is one of 1 - 2 alpha: 90 % where alpha is 0.05. "
    "INCONCLUSIVE: there are too few pairs to say."
)


def section(materials: Sequence[Material], paper: Paper) -> Section:
    """Return the rules with their decisions, and the change of each task."""
    verdicts = [(one.name, verdict) for one in materials for verdict in one.verdicts]
    if not verdicts:
        return absent(ID, TITLE, "No verdict was given: prism evaluate compare writes one.")
    rules = tuple(row for name, verdict in verdicts for row in _rules(name, verdict))
    tasks = tuple(row for name, verdict in verdicts for row in _tasks(name, verdict))
    change = Column("change", "points", ".1f", signed=True)
    first = (Column("study"), Column("gate"))
    rule_columns = (
        *first,
        Column("rule"),
        Column("decision"),
        change,
        Column("must be over", "points", ".1f", signed=True),
        Column("pairs"),
        Column("why"),
    )
    task_columns = (
        *first,
        Column("task"),
        Column("before", "%", ".1f"),
        Column("after", "%", ".1f"),
        change,
        Column("pairs"),
        Column("lost"),
        Column("gained"),
        Column("p of no change", "", ".2g"),
    )
    tables = [Table("gates", "Rules, and what was decided", rule_columns, rules, num_keys=3)] if rules else []
    return Section(ID, TITLE, (TEXT,), (*tables, Table("gates_tasks", "Each task, paired by question", task_columns, tasks, num_keys=3)))


def _rules(study: str, verdict: Result) -> Iterator[tuple[Value, ...]]:
    for rule in verdict.values["rules"]:
        change = None if rule["change"] is None else Measured(rule["change"], rule["low"], rule["high"]).times(100)
        yield (study, verdict.name, rule["measure"], rule["decision"], change, 100 * rule["least_change"], rule["num_pairs"], rule["why"])


def _tasks(study: str, verdict: Result) -> Iterator[tuple[Value, ...]]:
    for task, of in verdict.values["tasks"].items():
        change = Measured(of["change"], of["low"], of["high"]).times(100)
        scores = (100 * of["old_score"], 100 * of["new_score"])
        yield (study, verdict.name, task, *scores, change, of["num_pairs"], of["num_lost"], of["num_gained"], of["p_no_change"])
