"""`prism analyze weights`: how much each component changed, the share above 1 % beside its nulls and the paper's, and cosines of updates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_prism.report import draw
from megatron_prism.report.document import Column, Figure, Measured, Section, Table, Value
from megatron_prism.report.draw import Series
from megatron_prism.report.material import Figures, Material, Result
from megatron_prism.report.sections import trajectory
from megatron_prism.report.sections.common import Paper, absent, analyses, from_paper, mean_at, seeds, slug

ID, TITLE = "weights", "Change of the weights"
TEXT = (
    "The relative change is the norm of the update over the norm of the weights. The share of entries that changed by more than 1 % follows from that norm alone where the "
    "update is dense: only a share below its nulls is sparse. The nulls: a Gaussian update of the same norm, the same as it is stored, and this update's own entries shuffled."
)
SHARES = {
    "changed": "changed",
    "changed_dense_null": "dense null",
    "changed_dense_null_stored": "dense null, stored",
    "changed_shuffled_null": "shuffled null",
}
PAPER = ("t12_weight_change", "t22_thresholds", "t23_changed_by_group")


def section(materials: Sequence[Material], paper: Paper) -> Section:
    """Return a table and a figure for each pair of models, and one table of all cosines."""
    groups, runs = analyses(materials, "weights"), analyses(materials, "trajectory")
    if not groups and not runs:
        return absent(ID, TITLE, "No result of prism analyze weights was given.")
    used: set[str] = set()
    blocks: list[Table | Figure] = [_totals(groups)] if groups else []
    for group in groups:
        blocks += _of_pair(group, slug(group[0].name, used))
    for group in runs:
        blocks += trajectory.blocks(group, slug(group[0].name, used))
    if cosines := _cosines(groups):
        blocks += [cosines, *from_paper(paper, "update_cosine", "weights_paper_cosine")]
    blocks += [table for name in PAPER for table in from_paper(paper, name, f"weights_paper_{name}")]
    return Section(ID, TITLE, tuple(filter(None, (TEXT, seeds(materials)))), tuple(blocks))


def _parts(of: Figures) -> dict[str, Figures]:
    """Return the figures of a result by component, kind and in all. A kind that is one component is named once."""
    return {
        **of["components"],
        **{f"all {name}": figures for name, figures in of["kinds"].items() if name not in of["components"]},
        "total": of["total"],
    }


def _mean(group: Sequence[Result], part: str, *keys: str, factor: float = 1.0) -> Measured | None:
    parts = [Result(result.name, result.model, _parts(result.values)) for result in group]
    return mean_at(parts, part, *keys, factor=factor)


def _totals(groups: Sequence[Sequence[Result]]) -> Table:
    columns = (
        Column("update"),
        Column("from"),
        Column("to"),
        Column("relative change"),
        Column("mean of tensors"),
        *(Column(name, "% of entries", ".2f") for name in SHARES.values()),
        Column("changed over dense null", "ratio", ".3g"),
    )
    rows = []
    for group in groups:
        values = group[0].values
        shares = [_mean(group, "total", key, "0.01", factor=100) for key in SHARES]
        ratio = None if not shares[0] or not shares[1] or not shares[1].value else shares[0].value / shares[1].value
        deltas = [_mean(group, "total", key) for key in ("delta", "delta_mean_of_tensors")]
        rows.append((group[0].name, _end(values["base"]), _end(values["other"]), *deltas, *shares, ratio))
    return Table("weights", "Each update in all: its size, and the share of entries that changed by more than 1 %", columns, tuple(rows))


def _of_pair(group: Sequence[Result], id: str) -> Iterator[Table | Figure]:
    parts = list(_parts(group[0].values))
    columns = (Column("component"), Column("entries"), Column("relative change"), *(Column(name, "%", ".2f") for name in SHARES.values()))
    rows: list[tuple[Value, ...]] = []
    for part in parts:
        shares = [_mean(group, part, key, "0.01", factor=100) for key in SHARES]
        rows.append((part, _parts(group[0].values)[part].get("parameters"), _mean(group, part, "delta"), *shares))
    name = group[0].name
    yield Table(f"weights_{id}", f"{name}: by component", columns, tuple(rows))
    series = [
        Series(words, (), tuple(_mean(group, part, key, "0.01", factor=100) for part in parts), "null" in key)
        for key, words in SHARES.items()
    ]
    yield draw.dots(
        f"weights_{id}_changed",
        f"{name}: entries that changed by more than 1 %, beside what chance changes",
        Column("changed", "% of entries", ".2f"),
        parts,
        series,
        "component",
    )
    thresholds = sorted(map(float, group[0].values["total"]["changed"]))
    by_threshold = [
        Series(
            words,
            tuple(100 * at for at in thresholds),
            tuple(_mean(group, "total", key, str(at), factor=100) for at in thresholds),
            "null" in key,
        )
        for key, words in SHARES.items()
        if key != "changed_dense_null_stored"
    ]
    yield draw.lines(
        f"weights_{id}_thresholds",
        f"{name}: share changed, by threshold",
        Column("threshold", "%"),
        Column("changed", "% of entries", ".2f"),
        by_threshold,
    )


def _cosines(groups: Sequence[Sequence[Result]]) -> Table | None:
    known = [group for group in groups if "cosine" in group[0].values["total"]]
    rows: list[tuple[Value, ...]] = []
    for group in known:
        for part in _parts(group[0].values):
            spread = _mean(group, part, "cosine_null_std")
            rows.append((group[0].name, part, _mean(group, part, "cosine"), None if spread is None else 2 * spread.value))
    columns = (Column("update"), Column("component"), Column("cosine", "", ".3f"), Column("independent updates: within +-", "", ".2g"))
    note = "The null is two standard deviations of independent dense updates. Compare with two draws of one mixture, where a study has them: the ceiling."
    return (
        Table("weights_cosine", "Cosine between two updates of one base (the paper's Equation 2)", columns, tuple(rows), note, num_keys=2)
        if rows
        else None
    )


def _end(path: object) -> str:
    """Return the last two parts of a path."""
    return "/".join(str(path).rstrip("/").split("/")[-2:])
