"""`prism analyze weights --run`: how far the weights were from where they began, checkpoint by checkpoint; part of the section on weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_prism.report import draw
from megatron_prism.report.document import Column, Figure, Table, Value
from megatron_prism.report.draw import Series
from megatron_prism.report.material import Result
from megatron_prism.report.sections.common import mean_at

LINES = {
    "from the start": ("from_base", "total", "delta"),
    "from the checkpoint before": ("from_previous", "total", "delta"),
    "fp32 weights, from the start": ("masters", "from_base", "total", "delta"),
    "rounding as stored": ("masters", "rounding", "delta"),
}


def blocks(group: Sequence[Result], id: str) -> Iterator[Table | Figure]:
    """Yield a run's changes by step, as a table and a figure."""
    steps = sorted(group[0].values["checkpoints"], key=int)
    lines = {name: tuple(mean_at(group, "checkpoints", step, *at) for step in steps) for name, at in LINES.items()}
    known = {name: values for name, values in lines.items() if any(value is not None for value in values)}
    shares = {
        name: tuple(mean_at(group, "checkpoints", step, "from_base", "total", key, "0.01", factor=100) for step in steps)
        for name, key in (("changed by more than 1 %", "changed"), ("dense null", "changed_dense_null"))
    }
    columns = (Column("step"), *(Column(name, "relative") for name in known), *(Column(name, "% of entries", ".2f") for name in shares))
    rows: list[tuple[Value, ...]] = [
        (int(step), *(values[place] for values in known.values()), *(values[place] for values in shares.values()))
        for place, step in enumerate(steps)
    ]
    name = group[0].name
    yield Table(f"trajectory_{id}", f"{name}: change by checkpoint", columns, tuple(rows))
    if len(steps) > 1:
        series = [Series(words, tuple(map(float, steps)), values) for words, values in known.items()]
        yield draw.lines(f"trajectory_{id}_delta", f"{name}: relative change by step", Column("step"), Column("relative change"), series)
